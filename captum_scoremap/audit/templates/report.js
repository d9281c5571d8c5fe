"use strict";
// The report's gallery and viewer. Data comes from index.js and, one shard at a time, from maps/*.js: scripts, because a
// page opened from a file may not fetch. All text is set as text, never as markup.
(() => {
  const { columns, labels, layers, size } = window.scoremapIndex;
  const PAGE = 200;
  const byId = (id) => document.getElementById(id);
  const images = columns.index.map((_, row) =>
    Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[row]])));
  const rowOf = new Map(images.map((image, row) => [image.index, row]));
  const short = (value) => {
    if (value === null || value === undefined) return "–";
    return value && Math.abs(value) < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(3)).toString();
  };
  const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
  const labelName = (label) => labels[label] ?? `label ${label}`;
  const verdict = (image) => (image.true === null ? "" : image.true === image.predicted ? "right" : "wrong");

  // ---- gallery
  let shown = [];
  let rendered = 0;

  const matches = () => {
    const name = byId("filter-name").value.toLowerCase();
    const label = byId("filter-label").value;
    const correct = byId("filter-correct").value;
    const score = parseFloat(byId("filter-score").value);
    const unusual = parseFloat(byId("filter-unusual").value);
    return images.filter((image) =>
      (!name || image.name.toLowerCase().includes(name)) &&
      (!label || image.predicted === Number(label) || image.true === Number(label)) &&
      (!correct || verdict(image) === (correct === "1" ? "right" : "wrong")) &&
      (Number.isNaN(score) || image.score >= score) &&
      (Number.isNaN(unusual) || (image.unusual ?? -1) >= unusual));
  };

  const inOrder = (found) => {
    const [, key, down] = byId("order").value.match(/^(\w+)(-?)$/);
    const sign = down ? -1 : 1;
    // Images without the number come last, whichever way it goes.
    return found.sort((a, b) => (a[key] === null) - (b[key] === null) || sign * (a[key] - b[key]) || a.index - b.index);
  };

  const thumbnail = (image) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const picture = document.createElement("img");
    const name = document.createElement("span");
    const line = document.createElement("span");
    button.type = "button";
    button.dataset.index = image.index;
    button.title = image.name;
    picture.loading = "lazy";
    picture.alt = "";
    picture.src = image.view;
    name.textContent = labelName(image.predicted);
    line.className = "verdict";
    line.textContent = verdict(image) === "wrong" ? `wrong, should be ${labelName(image.true)}` : verdict(image) || image.name;
    button.classList.toggle("is-wrong", verdict(image) === "wrong");
    button.append(picture, name, line);
    item.append(button);
    return item;
  };

  const showMore = () => {
    byId("thumbs").append(...shown.slice(rendered, rendered + PAGE).map(thumbnail));
    rendered = Math.min(rendered + PAGE, shown.length);
    byId("more").hidden = rendered >= shown.length;
  };

  const refresh = () => {
    shown = inOrder(matches());
    rendered = 0;
    byId("thumbs").replaceChildren();
    byId("count").textContent = `${shown.length} of ${images.length} images`;
    byId("none").hidden = shown.length > 0;
    showMore();
  };

  const present = new Set([...columns.predicted, ...columns.true].filter((label) => label !== null));
  [...present].sort((a, b) => labelName(a).localeCompare(labelName(b))).forEach((label) => {
    byId("filter-label").append(new Option(labelName(label), label));
  });
  let typing;
  byId("filters").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(refresh, 150); });
  byId("filters").addEventListener("reset", () => setTimeout(refresh));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", showMore);
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && rendered && showMore(),
    { rootMargin: "400px" }).observe(byId("more"));

  // ---- maps, by shard
  const waiting = new Map();
  const shards = new Map();
  window.scoremapShard = (number, content) => { shards.set(number, content); };
  const loadShard = (number) => {
    if (!waiting.has(number)) {
      waiting.set(number, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `report/maps/${String(number).padStart(5, "0")}.js`;
        script.onload = () => { script.remove(); resolve(shards.get(number)); };
        script.onerror = () => { waiting.delete(number); reject(new Error(`${script.src} is missing`)); };
        document.head.append(script);
      }));
    }
    return waiting.get(number);
  };

  const decode = ({ rows, columns: width, scale, values }) => {
    const bytes = Uint8Array.from(atob(values), (letter) => letter.charCodeAt(0));
    return { rows, columns: width, values: Float32Array.from(new Int8Array(bytes.buffer), (step) => (step / 127) * scale) };
  };

  const minus = (one, other) => ({ ...one, values: one.values.map((value, place) => value - other.values[place]) });

  // ---- viewer
  let current = null;
  let token = 0;

  const choices = (image) => {
    const found = [[`predicted: ${labelName(image.predicted)}`, [image.predicted]]];
    if (image.true !== null && image.true !== image.predicted) found.push([`true: ${labelName(image.true)}`, [image.true]]);
    found.push([`runner-up: ${labelName(image.runner_up)}`, [image.runner_up]]);
    found.push([`contrast: ${labelName(image.predicted)} − ${labelName(image.runner_up)}`, [image.predicted, image.runner_up]]);
    if (image.true !== null && image.true !== image.predicted && image.true !== image.runner_up) {
      found.push([`contrast: ${labelName(image.predicted)} − ${labelName(image.true)}`, [image.predicted, image.true]]);
    }
    return found;
  };

  const paint = (map) => {
    const canvas = byId("overlay");
    canvas.width = map.columns;
    canvas.height = map.rows;
    const limit = map.values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const pixels = new ImageData(map.columns, map.rows);
    map.values.forEach((value, place) => {
      const color = value > 0 ? [178, 24, 43] : [33, 102, 172];
      pixels.data.set([...color, limit ? Math.round((255 * Math.abs(value)) / limit) : 0], 4 * place);
    });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    byId("legend-low").textContent = short(-limit);
    byId("legend-high").textContent = `+${short(limit)}`;
  };

  // S, A·Y, B and shares are kept for the predicted label alone: say so, whichever map is shown.
  const fillNumbers = (image, layer) => {
    byId("numbers-of").textContent = `Numbers of the predicted label, ${labelName(image.predicted)}, ` +
      (byId("role").value === "0" ? "whose map is shown" : "not of the map shown");
    const rows = [
      ["predicted", labelName(image.predicted)], ["true", image.true === null ? "–" : labelName(image.true)],
      ["score S", `${short(image.score)} logits`], ["probability", percent(image.probability)],
      ["runner-up", labelName(image.runner_up)], ["S minus runner-up's", `${short(image.contrast)} logits`],
      ["unusualness", short(image.unusual)], ["insertion", short(image.insertion)], ["deletion", short(image.deletion)],
    ];
    if (layer) {
      rows.push(["A·Y at this layer", `${short(layer.sub_scores)} logits`], ["B", `${short(layer.bias)} logits`],
        ["residual", `${short(layer.residual)} logits`], ["in the best tenth", percent(layer.top10_share)],
        ["in the border", percent(layer.border_share)], ["in the region", percent(layer.region_share)]);
    }
    if (image.path) rows.push(["file", image.path]);
    byId("numbers").tBodies[0].replaceChildren(...rows.filter(([, value]) => value !== "–").map(([name, value]) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      row.append(head);
      row.insertCell().textContent = value;
      return row;
    }));
  };

  const layOut = (image) => {
    const frame = byId("frame");
    const fit = Math.min(frame.clientWidth / image.width, frame.clientHeight / image.height);
    const scale = fit * Number(byId("zoom").value);
    byId("stage").style.width = `${image.width * scale}px`;
    byId("stage").style.height = `${image.height * scale}px`;
    byId("view").classList.toggle("small", image.width < 96);
    byId("overlay").classList.toggle("cells", byId("cells").checked);
    byId("overlay").style.opacity = byId("opacity").value;
    byId("crops").replaceChildren(...(byId("show-crops").checked ? image.crops : []).map(([x0, y0, x1, y1]) => {
      const box = document.createElement("i");
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
    let content;
    try {
      content = (await loadShard(image.shard))[image.index];
    } catch (error) {
      byId("message").textContent = "The maps of this image are missing: keep the folder “report” beside this page.";
      return;
    }
    if (mine !== token) return; // something else was chosen while this was loading
    const chosen = choices(image)[Number(byId("role").value)];
    const { maps, numbers } = content[place];
    const [first, second] = chosen[1].map((label) => decode(maps[label]));
    paint(second ? minus(first, second) : first);
    byId("overlay").setAttribute("aria-label", `Score map of ${chosen[0]} at layer ${layers[place]}`);
    byId("message").textContent = "";
    fillNumbers(image, numbers);
  };

  const open = (index) => {
    current = images[rowOf.get(index)];
    const role = byId("role");
    role.replaceChildren(...choices(current).map(([text], place) => new Option(text, place)));
    byId("viewer-title").textContent = current.name;
    byId("view").src = current.view;
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
  for (const id of ["layer", "role"]) byId(id).addEventListener("input", draw);
  for (const id of ["opacity", "zoom", "cells", "show-crops"]) byId(id).addEventListener("input", () => layOut(current));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => byId("viewer").close());
  // On the document: a button that has just been disabled, at either end, has lost the focus.
  document.addEventListener("keydown", (event) => {
    if (!byId("viewer").open || event.target.matches("input, select") || event.target === byId("frame")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-index], button[data-label]");
    if (!button) return;
    if (button.dataset.index !== undefined) {
      open(Number(button.dataset.index));
    } else {
      byId("filter-label").value = button.dataset.label;
      refresh();
      byId("gallery").scrollIntoView();
      byId("filter-label").focus({ preventScroll: true });
    }
  });
  refresh();
})();
