"use strict";
// The report's tables, gallery and viewer, in plain JavaScript: each is some forty lines over what the page holds
// already, less than a table or gallery library would ask for to be set up. Data comes from index.js and, one pack of
// images at a time, from packs/*.js: scripts, because a page opened from a file may not fetch; or from the page itself.
// All text is set as text, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const inPage = (id) => { const found = byId(id); return found && JSON.parse(found.textContent); };
  const { columns, labels, layers, scales, pack, findings, maps: kind } = window.scoremapIndex ?? inPage("scoremap-index");
  const complete = kind === "complete";
  const images = columns.index.map((_, row) =>
    Object.fromEntries([["row", row], ...Object.entries(columns).map(([name, values]) => [name, values[row]])]));
  const rowOf = new Map(images.map((image) => [image.index, image.row]));
  const short = (value) => {
    if (value === null || value === undefined) return "–";
    return value && Math.abs(value) < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(3)).toString();
  };
  const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
  const labelName = (label) => labels[label] ?? `label ${label}`;
  const verdict = (image) => (image.true === null ? "" : image.true === image.predicted ? "right" : "wrong");
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // ---- tables: sorted by a click on a head, searched by a field above; long ones show their first rows
  const FIRST = 50;
  document.querySelectorAll("table.sortable").forEach((table) => {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 2) return;
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const heads = [...table.tHead.rows[0].cells];
    let order = rows.map((_, place) => place);
    let all = rows.length <= FIRST;
    const title = table.closest("section").querySelector("h2").textContent;
    const search = make("input", { type: "search", placeholder: "search" });
    search.setAttribute("aria-label", `Search in ${title}`);
    const more = make("button", { type: "button", textContent: `Show all ${rows.length} rows` });
    const show = () => {
      const wanted = search.value.toLowerCase();
      const found = order.filter((place) => texts[place].includes(wanted));
      const shown = new Set(all ? found : found.slice(0, FIRST));
      rows.forEach((row, place) => { row.hidden = !shown.has(place); });
      more.hidden = all || found.length <= FIRST;
    };
    heads.forEach((head, column) => {
      if (head.dataset.sort === "no") return;
      const button = make("button", { type: "button", className: "sort" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const values = rows.map((row) => {
          const cell = row.cells[column];
          return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
        });
        const missing = (value) => value === "–";
        order.sort((a, b) => missing(values[a]) - missing(values[b]) || (down ? -1 : 1) *
          (typeof values[a] === "number" && typeof values[b] === "number" ? values[a] - values[b]
            : String(values[a]).localeCompare(String(values[b]), undefined, { numeric: true })));
        table.tBodies[0].append(...order.map((place) => rows[place]));
        show();
      });
    });
    search.addEventListener("input", show);
    more.addEventListener("click", () => { all = true; show(); });
    table.parentElement.before(make("p", { className: "tools" }, search));
    table.parentElement.after(more);
    show();
  });

  // ---- confusion matrix: all labels where these are few, else those with the most errors
  const MATRIX = 20;
  const drawMatrix = (target) => {
    const counts = new Map();
    const errors = new Map();
    const count = (map, key) => map.set(key, (map.get(key) ?? 0) + 1);
    const known = images.filter((image) => image.true !== null);
    known.forEach((image) => {
      for (const label of [image.true, image.predicted]) errors.set(label, errors.get(label) ?? 0);
      if (image.true !== image.predicted) { count(errors, image.true); count(errors, image.predicted); }
    });
    let shown = [...errors.keys()];
    if (shown.length > MATRIX) {
      shown = shown.sort((a, b) => errors.get(b) - errors.get(a)).slice(0, MATRIX);
      byId("confusion-note").textContent = ` Shown are the ${MATRIX} of ${errors.size} labels with the most errors.`;
    }
    shown.sort((a, b) => a - b);
    const place = new Map(shown.map((label, at) => [label, at]));
    const rest = errors.size > shown.length;
    known.forEach((image) =>
      count(counts, `${place.get(image.true) ?? shown.length} ${place.get(image.predicted) ?? shown.length}`));
    const names = [...shown.map(labelName), ...(rest ? ["others"] : [])];
    const sums = names.map((_, row) => names.reduce((sum, __, column) => sum + (counts.get(`${row} ${column}`) ?? 0), 0));
    const head = make("tr", {}, make("td"), ...names.map((name) => {
      const cell = make("th", { scope: "col" }, make("span", { textContent: name, title: name }));
      return cell;
    }));
    const body = names.map((name, row) => {
      const line = make("tr", {}, make("th", { scope: "row", textContent: name }));
      names.forEach((other, column) => {
        const number = counts.get(`${row} ${column}`) ?? 0;
        const cell = line.insertCell();
        if (!number) return;
        const color = row === column ? "68 119 170" : "238 102 119";
        cell.style.background = `rgb(${color} / ${Math.round(100 * number / sums[row])}%)`;
        const link = row < shown.length && column < shown.length;
        cell.append(link ? make("a", { href: `#?true=${shown[row]}&predicted=${shown[column]}`, textContent: number,
          title: `${number} of ${sums[row]} ${name}: ${other}` }) : String(number));
      });
      return line;
    });
    target.replaceChildren(make("table", { className: "matrix" }, make("thead", {}, head), make("tbody", {}, ...body)));
  };
  if (byId("matrix")) drawMatrix(byId("matrix"));

  // ---- what is chosen stands in the address: filters and order, and the image that is open
  const filters = byId("filters");
  const chosen = (name) => filters.elements.namedItem(name).value;
  const selection = () => [...new FormData(filters)].filter(([, value]) => value !== "");
  let written = null;
  const address = (open) => {
    const parts = new URLSearchParams(selection());
    if (open && current) {
      parts.set("image", current.index);
      parts.set("layer", layers[Number(byId("layer").value)]);
      if (wanted !== "predicted") parts.set("map", wanted);
      if (byId("common").checked) parts.set("scale", "common");
    }
    const text = String(parts);
    return text ? `#?${text}` : "#";
  };
  const remember = () => {
    written = address(byId("viewer").open);
    byId("link").href = address(false) === "#" ? "#?" : address(false);
    byId("permalink").href = address(true);
    if (location.hash !== written && !(written === "#" && !location.hash.startsWith("#?"))) {
      history.replaceState(null, "", written);
    }
  };
  const restore = () => {
    if (!location.hash.startsWith("#?") || location.hash === written) return;
    written = location.hash;
    const parts = new URLSearchParams(location.hash.slice(2));
    filters.reset();
    for (const [name, value] of parts) {
      const field = filters.elements.namedItem(name);
      if (field) field.value = value;
    }
    wanted = parts.get("map") ?? wanted;
    byId("common").checked = parts.get("scale") === "common";
    if (layers.includes(parts.get("layer"))) byId("layer").value = layers.indexOf(parts.get("layer"));
    refresh();
    const index = Number(parts.get("image"));
    if (parts.has("image") && rowOf.has(index)) open(index);
    else {
      if (byId("viewer").open) byId("viewer").close();
      byId("gallery").scrollIntoView();
    }
  };

  // ---- gallery: only the rows in sight are in the page
  let shown = [];
  let nodes = new Map(); // position to element
  const thumbs = byId("thumbs");
  const GAP = 10;
  const CAPTION = 46;
  const SPARE = 2; // rows above and below

  const matches = () => {
    const name = chosen("name").toLowerCase();
    const [label, isTrue, predicted, right] = ["label", "true", "predicted", "verdict"].map(chosen);
    const [low, high, score, unusual] = ["min", "max", "score", "unusual"].map((field) => parseFloat(chosen(field)));
    const among = chosen("finding") === "" ? null : new Set(findings[Number(chosen("finding"))].images);
    return images.filter((image) =>
      (!name || image.name.toLowerCase().includes(name)) &&
      (label === "" || image.predicted === Number(label) || image.true === Number(label)) &&
      (isTrue === "" || image.true === Number(isTrue)) &&
      (predicted === "" || image.predicted === Number(predicted)) &&
      (!right || verdict(image) === right) &&
      (!among || among.has(image.index)) &&
      (Number.isNaN(low) || image.probability >= low) &&
      (Number.isNaN(high) || image.probability <= high) &&
      (Number.isNaN(score) || image.score >= score) &&
      (Number.isNaN(unusual) || (image.unusual ?? -1) >= unusual));
  };

  const inOrder = (found) => {
    const [, key, down] = (chosen("order") || "index").match(/^(\w+)(-?)$/);
    const sign = down ? -1 : 1;
    // Images without the number come last, whichever way it goes.
    return found.sort((a, b) => (a[key] === null) - (b[key] === null) || sign * (a[key] - b[key]) || a.index - b.index);
  };

  const thumbnail = (image, position) => {
    const picture = make("span", { className: `sheet thumbs-${Math.floor(image.row / 128)}` });
    const place = image.row % 128;
    picture.style.backgroundPosition = `${(100 * (place % 8)) / 7}% ${(100 * Math.floor(place / 8)) / 15}%`;
    const wrong = verdict(image) === "wrong";
    const line = wrong ? `wrong, should be ${labelName(image.true)}` : verdict(image) || image.name;
    const button = make("button", { type: "button", title: image.name, className: wrong ? "is-wrong" : "" }, picture,
      make("span", { className: "caption", textContent: labelName(image.predicted) }),
      make("span", { className: "caption verdict", textContent: line }));
    button.dataset.index = image.index;
    const item = make("div", {}, button);
    item.setAttribute("role", "listitem");
    item.setAttribute("aria-setsize", shown.length);
    item.setAttribute("aria-posinset", position + 1);
    return item;
  };

  const wide = Number(getComputedStyle(document.body).getPropertyValue("--wide")) || 1;
  const render = () => {
    const space = thumbs.clientWidth;
    const least = Math.min(128 * wide, space);
    const across = Math.max(Math.floor((space + GAP) / (Math.min(least, Math.max(space / 3 - GAP, 96)) + GAP)), 1);
    const width = (space + GAP) / across - GAP;
    const height = width / (wide * wide) + CAPTION + GAP;
    thumbs.style.height = `${Math.ceil(shown.length / across) * height}px`;
    const top = -thumbs.getBoundingClientRect().top;
    // Some rows are always there, so that the keyboard finds its way in from above and below.
    const rows = Math.ceil(shown.length / across);
    const first = Math.max(Math.min(Math.floor(top / height), rows) - SPARE, 0) * across;
    const last = Math.min((Math.max(Math.ceil((top + innerHeight) / height), 0) + SPARE) * across, shown.length);
    for (const [position, item] of nodes) {
      if (position < first || position >= last) { item.remove(); nodes.delete(position); }
    }
    let next = thumbs.firstChild;
    for (let position = first; position < last; position += 1) {
      let item = nodes.get(position);
      if (!item) {
        item = thumbnail(shown[position], position);
        nodes.set(position, item);
        thumbs.insertBefore(item, next);
      } else {
        next = item.nextSibling;
      }
      item.style.width = `${width}px`;
      item.style.transform = `translate(${(position % across) * (width + GAP)}px, ${Math.floor(position / across) * height}px)`;
    }
  };

  const refresh = () => {
    shown = inOrder(matches());
    nodes.forEach((item) => item.remove());
    nodes = new Map();
    byId("count").textContent = `${shown.length} of ${images.length} images`;
    byId("none").hidden = shown.length > 0;
    render();
  };

  const present = (...names) => [...new Set(names.flatMap((name) => columns[name]))].filter((label) => label !== null)
    .sort((a, b) => labelName(a).localeCompare(labelName(b), undefined, { numeric: true }))
    .map((label) => new Option(labelName(label), label));
  filters.elements.namedItem("label").append(...present("true", "predicted"));
  filters.elements.namedItem("true").append(...present("true"));
  filters.elements.namedItem("predicted").append(...present("predicted"));
  filters.elements.namedItem("finding").append(...findings.map(({ title }, place) => new Option(title, place)));
  filters.elements.namedItem("finding").parentElement.hidden = !findings.length;
  for (const name of ["true", "verdict"]) {
    filters.elements.namedItem(name).parentElement.hidden = images.every((image) => image.true === null);
  }
  const changed = () => { refresh(); remember(); };
  filters.addEventListener("input", changed);
  filters.addEventListener("reset", () => setTimeout(changed));
  filters.addEventListener("submit", (event) => event.preventDefault());
  let waits = false;
  const soon = () => {
    if (!waits) requestAnimationFrame(() => { waits = false; render(); });
    waits = true;
  };
  addEventListener("scroll", soon, { passive: true });
  addEventListener("resize", () => { soon(); if (byId("viewer").open) layOut(current); });

  const csv = () => {
    const names = Object.keys(columns).filter((name) => name !== "crops" && !(name === "path" && !images[0]?.path));
    const withLabels = names.flatMap((name) =>
      ["true", "predicted", "runner_up"].includes(name) ? [name, `${name}_label`] : [name]);
    const cell = (image, name) => {
      const value = name.endsWith("_label") ? labels[image[name.slice(0, -6)]] : image[name];
      const isFormula = typeof value === "string" && /^[=+\-@\t\r]/.test(value); // to a spreadsheet, which runs it
      const text = value === null || value === undefined ? "" : isFormula ? `'${value}` : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [withLabels, ...shown.map((image) => withLabels.map((name) => cell(image, name)))]
      .map((line) => line.join(",")).join("\r\n") + "\r\n";
  };
  byId("csv").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    make("a", { href: url, download: "images.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });

  // ---- pictures and maps, by pack; the last few are kept
  const KEPT = 3;
  const packs = new Map();
  const arrived = new Map();
  window.scoremapPack = (number, content) => { arrived.set(number, content); };
  const loadPack = (number) => {
    const found = packs.get(number) ?? new Promise((resolve, reject) => {
      const here = inPage(`scoremap-pack-${number}`);
      if (here) { resolve(here); return; }
      const script = make("script", { src: `report/packs/${String(number).padStart(5, "0")}.js` });
      script.onload = () => { script.remove(); resolve(arrived.get(number)); arrived.delete(number); };
      script.onerror = () => { script.remove(); packs.delete(number); reject(new Error(`${script.src} is missing`)); };
      document.head.append(script);
    });
    packs.delete(number);
    packs.set(number, found); // the last asked for is the last to go
    if (packs.size > KEPT) packs.delete(packs.keys().next().value);
    return found;
  };

  const decode = (map) => {
    const bytes = Uint8Array.from(atob(map.values), (letter) => letter.charCodeAt(0));
    return { ...map, values: Float32Array.from(new Int8Array(bytes.buffer), (step) => (step / 127) * map.scale) };
  };

  const minus = (one, other) => {
    const [score, sub_scores, bias, rest] = ["score", "sub_scores", "bias", "rest"].map((name) => one[name] - other[name]);
    return {
      rows: one.rows, columns: one.columns, values: one.values.map((value, place) => value - other.values[place]),
      score, sub_scores, bias, rest, bias_share: Math.abs(bias) / (Math.abs(bias) + Math.abs(sub_scores) || 1),
    };
  };

  // ---- viewer
  let current = null;
  let token = 0;
  let wanted = "predicted"; // which map, from image to image

  const choices = (image) => {
    const own = image.predicted;
    const found = [["predicted", `predicted: ${labelName(own)}`, [own]]];
    const other = image.true !== null && image.true !== own;
    if (other) found.push(["true", `true: ${labelName(image.true)}`, [image.true]]);
    if (image.runner_up !== null) {
      found.push(["runner-up", `runner-up: ${labelName(image.runner_up)}`, [image.runner_up]]);
      found.push(["contrast", `contrast: ${labelName(own)} − ${labelName(image.runner_up)}`, [own, image.runner_up]]);
    }
    if (other) found.push(["contrast-true", `contrast: ${labelName(own)} − ${labelName(image.true)}`, [own, image.true]]);
    return found;
  };
  // Where the true label is the predicted one, or not known, these stand in; the choice stays for the next image.
  const STANDS_IN = { true: "predicted", "contrast-true": "contrast" };
  const choice = (image) => {
    const found = choices(image);
    return found.find(([key]) => key === wanted) ?? found.find(([key]) => key === STANDS_IN[wanted]) ?? found[0];
  };

  const paint = (map, place) => {
    const canvas = byId("overlay");
    canvas.width = map.columns;
    canvas.height = map.rows;
    const common = byId("common").checked;
    const limit = common ? scales[place] : map.values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const pixels = new ImageData(map.columns, map.rows);
    map.values.forEach((value, cell) => {
      const color = value > 0 ? [178, 24, 43] : [33, 102, 172];
      pixels.data.set([...color, limit ? Math.round((255 * Math.min(Math.abs(value), limit)) / limit) : 0], 4 * cell);
    });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    byId("legend-low").textContent = short(-limit);
    byId("legend-high").textContent = `+${short(limit)}`;
  };

  const fillNumbers = (image, map, text) => {
    const contrast = wanted.startsWith("contrast");
    byId("numbers-of").textContent = map ? `Numbers of ${text}` : "";
    const rows = [["predicted", labelName(image.predicted)], ["true", image.true === null ? "–" : labelName(image.true)],
      ["probability", percent(image.probability)]];
    if (map) {
      rows.unshift(
        [contrast ? "difference of scores S" : "score S", `${short(map.score)} logits`],
        [complete ? "sum of the map" : "A·Y at this layer", `${short(map.sub_scores)} logits`],
        [complete ? "without a place" : "B", `${short(map.bias)} logits`],
        [complete ? "share without a place" : "share of B", percent(map.bias_share)],
        ["residual", `${short(Math.abs(map.rest))} logits`],
        ["in the best tenth", percent(map.top10_share)], ["in the border", percent(map.border_share)],
        ["in the region", percent(map.region_share)]);
    }
    rows.push(["S minus runner-up's", image.contrast === null ? "–" : `${short(image.contrast)} logits`],
      ["unusualness", short(image.unusual)], ["insertion", short(image.insertion)], ["deletion", short(image.deletion)]);
    if (image.path) rows.push(["file", image.path]);
    byId("numbers").tBodies[0].replaceChildren(...rows.filter(([, value]) => value !== "–").map(([name, value]) =>
      make("tr", {}, make("th", { scope: "row", textContent: name }), make("td", { textContent: value }))));
    const most = map && map.bias_share > 0.5;
    byId("mostly-bias").hidden = !most;
    byId("mostly-bias").textContent = most ? `${complete ? "What has no place" : "B"} is ${percent(map.bias_share)} of ` +
      `this ${contrast ? "difference" : "score"}: the map shows the smaller part.` : "";
  };

  const layOut = (image) => {
    const frame = byId("frame");
    byId("viewer").classList.toggle("wide", image.width > 1.8 * image.height);
    const lower = image.width > 1.8 * image.height;
    const room = lower ? 0.6 * innerHeight : frame.clientHeight;
    const fit = Math.min(frame.clientWidth / image.width, room / image.height);
    const scale = fit * Number(byId("zoom").value);
    frame.style.height = lower ? `${Math.min(image.height * scale, room) + 2}px` : "";
    byId("stage").style.width = `${image.width * scale}px`;
    byId("stage").style.height = `${image.height * scale}px`;
    byId("view").classList.toggle("small", Math.min(image.width, image.height) < 96);
    byId("overlay").classList.toggle("cells", byId("cells").checked);
    byId("overlay").style.opacity = byId("opacity").value;
    byId("crops").replaceChildren(...(byId("show-crops").checked ? image.crops : []).map(([x0, y0, x1, y1]) => {
      const box = make("i");
      box.style.left = `${(100 * x0) / image.width}%`;
      box.style.top = `${(100 * y0) / image.height}%`;
      box.style.width = `${(100 * (x1 - x0)) / image.width}%`;
      box.style.height = `${(100 * (y1 - y0)) / image.height}%`;
      return box;
    }));
  };

  const draw = async () => {
    const image = current;
    const mine = ++token;
    const place = Number(byId("layer").value);
    byId("layer-name").textContent = layers[place];
    byId("layer").setAttribute("aria-valuetext", layers[place]);
    layOut(image);
    remember();
    let content;
    try {
      content = (await loadPack(Math.floor(image.row / pack)))[image.index];
    } catch (error) {
      byId("message").textContent = "The maps of this image are missing: keep the folder “report” beside this page.";
      return;
    }
    if (mine !== token) return; // something else was chosen while this was loading
    byId("view").src = content.view;
    const [, text, pair] = choice(image);
    const [first, second] = pair.map((label) => decode(content.layers[place][label]));
    const map = second ? minus(first, second) : first;
    paint(map, place);
    byId("overlay").setAttribute("aria-label", `${complete ? "Complete" : "Score"} map of ${text} at layer ${layers[place]}`);
    byId("message").textContent = "";
    fillNumbers(image, map, text);
  };

  const open = (index) => {
    current = images[rowOf.get(index)];
    const [key] = choice(current);
    byId("role").replaceChildren(...choices(current).map(([one, text]) => new Option(text, one, false, one === key)));
    byId("viewer-title").textContent = current.name;
    byId("view").alt = `${current.name}, as the model saw it`;
    const position = shown.indexOf(current);
    byId("previous").disabled = position <= 0;
    byId("next").disabled = position < 0 || position >= shown.length - 1;
    fillNumbers(current, null);
    if (!byId("viewer").open) byId("viewer").showModal();
    draw();
  };

  const step = (by) => {
    const next = shown[shown.indexOf(current) + by];
    if (next) open(next.index);
  };

  byId("layer").max = layers.length - 1;
  byId("layer").value = layers.length - 1;
  byId("layer").addEventListener("input", draw);
  byId("common").addEventListener("input", draw);
  byId("role").addEventListener("input", () => { wanted = byId("role").value; draw(); });
  for (const id of ["opacity", "zoom", "cells", "show-crops"]) byId(id).addEventListener("input", () => layOut(current));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => byId("viewer").close());
  byId("viewer").addEventListener("close", remember);
  // On the document: a button that has just been disabled, at either end, has lost the focus.
  document.addEventListener("keydown", (event) => {
    if (!byId("viewer").open || event.target.matches("input, select") || event.target === byId("frame")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-index]");
    if (button) open(Number(button.dataset.index));
    const link = event.target.closest('a[href^="#?"]');
    // a link to what is shown already changes no address
    if (link && link.getAttribute("href") === location.hash) { written = null; restore(); }
  });
  addEventListener("hashchange", restore);
  refresh();
  restore();
  remember();
})();
