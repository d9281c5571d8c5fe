"""``report.html``: what an audit found, as a page that needs no server and no network.

The page stands in the audit's folder; what it shows lies beside it in ``report``, in packs of many images so that ten
thousand images are a few hundred files: sheets of thumbnails, an index of all images, and for each pack a script with
the pictures and score maps, read when an image is opened. Or all of it is in the page itself.
"""

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageOps

from captum_scoremap.audit.analysis import INEXACT, Analysis, lists
from captum_scoremap.audit.preparing import Prepared
from captum_scoremap.audit.shards import Shards, write_whole

__all__ = ["SINGLE_FILE_LIMIT", "write_report"]

SINGLE_FILE_LIMIT = 500
"""Images that a page of one file may have: all of their pictures and maps are in it."""

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN = 1000  # rows of a table on the page
_FIRST = 50  # rows of a table that are not hidden at first
_BINS = 20
_CALIBRATION_BINS = 10
_PACK = 128  # images in a pack; thumbnails on a sheet, 8 by 16
_COLUMNS, _ROWS = 8, 16
_THUMB = 128  # side of a square thumbnail, in pixels
_PATCH = 64
_INDEX = (
    "index", "name", "width", "height", "predicted", "runner_up", "true", "score", "probability", "contrast",
    "crops", "insertion", "deletion",
)  # fmt: skip
_NUMBERS = ("score", "sub_scores", "bias", "bias_share", "top10_share", "border_share", "region_share")


def write_report(
    shards: Shards,
    settings: Mapping[str, Any],
    analysis: Analysis,
    path_of: Callable[[int], Path | None] | None = None,
    single_file: bool = False,
    prepared: Prepared | None = None,
) -> Path:
    """Write the page of an audit.

    Args:
        shards: The results.
        settings: The audit's settings.
        analysis: The analysis of the whole set.
        path_of: The file of each image, where the page shall name it. By default no path of the machine that
            ran the audit is on the page.
        single_file: Whether all that the page shows shall be in the page itself.
        prepared: What preparing the model changed, where it was prepared.

    Returns:
        The page.

    Raises:
        OSError: If it cannot be written.
    """
    folder = shards.folder / "report"
    shutil.rmtree(folder, ignore_errors=True)
    assets = _Assets(None if single_file else folder)
    layers = list(settings["layers"])
    aspect = _aspect(shards)
    thumbs = _Sheets(assets, "thumbs", _THUMB, aspect)
    patches = _Sheets(assets, "patches", _PATCH, 1.0)
    wanted: dict[int, list[dict[str, Any]]] = {}
    rows = [_label(row) for row in analysis.labels[:_SHOWN]]
    findings = [_finding(row) for row in analysis.findings if row["confident"]]
    changes = [
        {**row, "patches": [dict(patch) for patch in row["patches"]]}
        for row in analysis.changes
        if row["confident"] and "patches" in row
    ]
    for row in (*rows, *findings, *changes):
        for patch in row["patches"]:
            wanted.setdefault(patch["index"], []).append(patch)
    images: dict[int, dict[str, Any]] = {}
    scales = [0.0] * len(layers)
    pack: dict[int, Any] = {}
    for number in shards.finished():
        for image, view, maps in _shard(shards, number, layers):
            index = image["index"]
            picture = Image.open(io.BytesIO(view[1])).convert("RGB")
            image["sheet"] = thumbs.add(picture)
            for patch in wanted.get(index, ()):
                patch["sheet"] = patches.add(_patch(picture, patch["row"], patch["column"]))
            image["unusual"] = _rounded(analysis.unusualness.get(index))
            image["path"] = str(path_of(index) or "") if path_of else ""
            for place, layer in enumerate(maps):
                scales[place] = max(scales[place], *(map_["scale"] for map_ in layer.values()))
            pack[index] = {"view": _data(view[0], view[1]), "layers": maps}
            images[index] = image
            if len(pack) == _PACK:
                assets.put_pack(pack)
                pack = {}
    if pack:
        assets.put_pack(pack)
    thumbs.close()
    patches.close()
    names = {row["label"]: row["name"] for row in analysis.labels}
    names |= {image["runner_up"]: image.pop("runner_up_label") for image in images.values()}
    columns = next(iter(images.values()), dict.fromkeys(_INDEX)).keys() - {"sheet"}
    index = {
        "columns": {name: [image[name] for image in images.values()] for name in sorted(columns)},
        "labels": names,
        "layers": layers,
        "maps": settings["maps"],
        "scales": scales,
        "pack": _PACK,
        "findings": [{"title": _finding_title(row), "images": list(row["images"])} for row in findings],
    }
    sheets = "".join(assets.sheets)
    if not single_file:
        assets.put("index.js", f"window.scoremapIndex = {_script(index)};\n")
        assets.put("sheets.css", sheets)
        for name in ("report.css", "report.js"):
            assets.put(name, (_TEMPLATES / name).read_bytes())
    code = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = shards.folder / "report.html"
    context = {
        "settings": settings,
        "prepared": prepared,
        "rows": rows,
        "findings": findings,
        "changes": changes,
        "images": images,
        "wide": aspect**0.5,
        "single": {
            "style": Markup(sheets + (_TEMPLATES / "report.css").read_text(encoding="utf-8")),
            "code": Markup(code),
            "code_hash": base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
            "index": Markup(_script(index)),
            "packs": [Markup(pack) for pack in assets.packs],
        }
        if single_file
        else None,
    }
    write_whole(page, _page(analysis, context))
    return page


@dataclass
class _Assets:
    """What the page shows: files in a folder, or texts to put in the page itself.

    Attributes:
        folder: The folder; None for the page itself.
        packs: Pictures and maps of each pack, as JSON, where there is no folder.
        sheets: A line of CSS for each sheet of small pictures.
    """

    folder: Path | None
    packs: list[str] = field(default_factory=list)
    sheets: list[str] = field(default_factory=list)
    written: int = 0

    def put(self, name: str, content: str | bytes) -> None:
        """Write a file."""
        if self.folder is not None:
            write_whole(self.folder / name, content)

    def put_pack(self, content: Mapping[int, Any]) -> None:
        """Keep pictures and maps of the next pack of images."""
        if self.folder is None:
            self.packs.append(_script(content))
        self.put(f"packs/{self.written:05d}.js", f"window.scoremapPack({self.written}, {_script(content)});\n")
        self.written += 1

    def put_sheet(self, kind: str, number: int, content: bytes) -> None:
        """Keep a sheet of small pictures, to be shown by the class ``KIND-NUMBER``."""
        name = f"{kind}/{number:05d}.jpg"
        self.put(name, content)
        address = name if self.folder is not None else _data("image/jpeg", content)
        self.sheets.append(f'.{kind}-{number} {{ background-image: url("{address}"); }}\n')


@dataclass
class _Sheets:
    """Small pictures of one kind, packed on sheets of 8 x 16."""

    assets: _Assets
    kind: str
    side: int
    aspect: float
    number: int = 0
    pictures: list[Image.Image] = field(default_factory=list)

    def add(self, picture: Image.Image) -> dict[str, Any]:
        """Put a picture on a sheet, whole, its aspect kept.

        Args:
            picture: It may be of any size.

        Returns:
            Class of the sheet, and the place on it in percent as CSS takes it.
        """
        size = (round(self.side * self.aspect**0.5), round(self.side / self.aspect**0.5))
        # pixels of tiny pictures stay sharp
        how = Image.Resampling.NEAREST if max(picture.size) < self.side / 2 else Image.Resampling.BICUBIC
        self.pictures.append(ImageOps.pad(picture, size, how, color=(244, 246, 249)))
        row, column = divmod(len(self.pictures) - 1, _COLUMNS)
        place = {
            "sheet": f"{self.kind}-{self.number}",
            "x": _rounded(100 * column / (_COLUMNS - 1)),
            "y": _rounded(100 * row / (_ROWS - 1)),
        }
        if len(self.pictures) == _COLUMNS * _ROWS:
            self.close()
        return place

    def close(self) -> None:
        """Write what has no full sheet yet."""
        if not self.pictures:
            return
        width, height = self.pictures[0].size
        sheet = Image.new("RGB", (_COLUMNS * width, _ROWS * height), "white")
        for place, picture in enumerate(self.pictures):
            row, column = divmod(place, _COLUMNS)
            sheet.paste(picture, (column * width, row * height))
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=80)
        self.assets.put_sheet(self.kind, self.number, buffer.getvalue())
        self.number, self.pictures = self.number + 1, []


def _aspect(shards: Shards) -> float:
    """Return width to height of most images, from 1/4 to 4."""
    shapes = [
        width / height
        for number in shards.finished()
        for width, height in zip(
            *(shards.read("images", number)[name].to_pylist() for name in ("width", "height")), strict=True
        )
        if width
    ]
    return float(np.clip(np.median(shapes), 0.25, 4)) if shapes else 1.0


def _patch(picture: Image.Image, row: float, column: float) -> Image.Image:
    """Return the square around a spot, a quarter of the picture's longer side wide, moved inside of the picture."""
    width, height = picture.size
    side = max(min(max(width, height) // 4, width, height), 1)
    left = min(max(round(column * width - side / 2), 0), width - side)
    top = min(max(round(row * height - side / 2), 0), height - side)
    return picture.crop((left, top, left + side, top + side))


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _shard(
    shards: Shards, number: int, layers: Sequence[str]
) -> Iterator[tuple[dict[str, Any], tuple[str, bytes], list[dict[int, Any]]]]:
    """What the index says of each image of a shard, its picture, and its maps by layer and label."""
    measured = {(row["index"], row["layer"]): row for row in shards.read("layers", number).to_pylist()}
    maps = _maps_of(shards, number, layers)
    views = {row["index"]: (row["format"], row["view"]) for row in shards.read("views", number).to_pylist()}
    for row in shards.read("images", number).to_pylist():
        if row["error"] is None:
            image = {name: _rounded(row[name]) for name in _INDEX}
            numbers = [measured[row["index"], layer] for layer in layers]
            image["residual"] = _rounded(max(layer["residual"] for layer in numbers))
            image["border"] = _rounded(numbers[-1]["border_share"])
            image["runner_up_label"] = row["runner_up_label"]
            yield image, views[row["index"]], maps[row["index"]]


def _maps_of(shards: Shards, number: int, layers: Sequence[str]) -> dict[int, list[dict[int, Any]]]:
    """Return for each image, layer and label the map in 255 steps, and its numbers."""
    content: dict[int, list[dict[int, Any]]] = {}
    table = shards.read("maps", number)
    for row, values in zip(table.drop_columns(["values"]).to_pylist(), lists(table["values"]), strict=True):
        found = content.setdefault(row["index"], [{} for _ in layers])
        scale = float(np.abs(values).max(initial=0))
        steps = np.round(values / (scale or 1) * 127).astype(np.int8)
        found[layers.index(row["layer"])][row["label"]] = {
            "rows": row["rows"],
            "columns": row["columns"],
            "scale": _rounded(scale),
            "values": base64.b64encode(steps.tobytes()).decode(),
            # With its sign, so that the residual of a contrast is the difference of two.
            "rest": float(f"{row['score'] - row['sub_scores'] - row['bias']:.3g}"),
            **{name: _rounded(row[name]) for name in _NUMBERS},
        }
    return content


@cache
def _template() -> jinja2.Template:
    """Return the page's template, compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["short"] = short
    return environment.get_template("report.html.j2")


def _page(analysis: Analysis, context: Mapping[str, Any]) -> str:
    summary = analysis.summary
    residuals = [row["residual_max"] for row in summary["layers"] if row["residual_max"] is not None]
    return _template().render(
        **context,
        summary=summary,
        residual=max(residuals, default=None),
        limit=INEXACT,
        inexact=[row for row in summary["layers"] if row["inexact"]],
        compared=sum(row["kind"] != "confused pair" for row in analysis.findings),
        against=bool(analysis.changes),
        mostly_bias=[row for row in summary["layers"] if (row["bias_share"] or 0) > 0.5],
        first=_FIRST,
        ranked=any(row["shortcut"] is not None for row in analysis.labels),
        more_labels=max(len(analysis.labels) - _SHOWN, 0),
        pairs=[_pair(row) for row in analysis.pairs[:_SHOWN]],
        more_pairs=max(len(analysis.pairs) - _SHOWN, 0),
        plots=list(_plots(context["images"])),
        calibration=_calibration(context["images"]),
    )


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "picture": heat(row["contrast_map"], row["rows"], row["columns"])}


def _finding(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "picture": heat(row["map"], row["rows"], row["columns"]),
        "patches": [dict(patch) for patch in row["patches"][:4]],
    }


def _finding_title(row: Mapping[str, Any]) -> str:
    pair = f", which {row['true_name']} is taken for" if row["kind"] == "confused pair" else ""
    return f"{row['name']}{pair}: {row['kind']}"


def _label(row: Mapping[str, Any]) -> dict[str, Any]:
    size = row["rows"], row["columns"]
    return {
        **row,
        "mean_picture": heat(row["mean_map"], *size) if row["mean_map"] else None,
        "private_picture": heat(row["private_map"], *size) if row["private_map"] else None,
        "patches": [dict(patch) for patch in row["patches"][:3]],
    }


def _calibration(images: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return accuracy by probability, and the expected calibration error (Guo et al. 2017); None without true labels.

    ECE = sum over bins of n_b / N |accuracy_b − mean probability_b|.

    Args:
        images: What the index says of each image.

    Returns:
        The error and the bins that are not empty.
    """
    known = [image for image in images.values() if image["true"] is not None]
    if not known:
        return None
    probability = np.array([image["probability"] for image in known])
    correct = np.array([image["true"] == image["predicted"] for image in known], dtype=float)
    bins = np.minimum((probability * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    error, bars = 0.0, []
    for place in range(_CALIBRATION_BINS):
        inside = bins == place
        if not inside.any():
            continue
        accuracy, mean = float(correct[inside].mean()), float(probability[inside].mean())
        error += inside.mean() * abs(accuracy - mean)
        bars.append({
            "low": place / _CALIBRATION_BINS,
            "high": (place + 1) / _CALIBRATION_BINS,
            "count": int(inside.sum()),
            "accuracy": accuracy,
            "probability": mean,
        })
    return {"error": float(error), "bars": bars}


def _plots(images: Mapping[int, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Histograms of the numbers that tell most, as bars ready to draw."""
    for name, caption in (
        ("score", "score of the predicted label, in logits"),
        ("border", "share of the positive score in the border (an even map: 0.36)"),
        ("unusual", "unusualness: 0 is like all maps of the label, 1 has nothing in common"),
    ):
        known = [image for image in images.values() if image[name] is not None]
        if not known:
            continue
        values = np.array([image[name] for image in known], dtype=float)
        wrong = np.array([image["true"] is not None and image["true"] != image["predicted"] for image in known])
        low, high = min(values.min(), 0.0) if name != "score" else values.min(), values.max()
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        every, some = (np.histogram(part, edges)[0] for part in (values, values[wrong]))
        unit = 100 / max(every.max(), 1)
        width = 320 / _BINS
        yield {
            "caption": caption,
            "low": short(edges[0]),
            "high": short(edges[-1]),
            "most": int(every.max()),
            "description": f"Histogram: {caption}. The median is {short(float(np.median(values)))}.",
            "bars": [
                {
                    "x": place * width + 1,
                    "width": width - 2,
                    "wrong_y": 110 - bad * unit,
                    "wrong_height": bad * unit,
                    "right_y": 110 - both * unit,
                    "right_height": (both - bad) * unit,
                }
                for place, (both, bad) in enumerate(zip(every.tolist(), some.tolist(), strict=True))
            ],
        }


def heat(values: Sequence[float], rows: int, columns: int) -> str:
    """Return a map as a small picture for a page: white at zero, red above, blue below.

    Args:
        values: The map, row by row.
        rows: Its height in cells.
        columns: Its width in cells.

    Returns:
        A ``data:`` address.

    Example:
        >>> heat([0.0, 1.0], 1, 2)[:21]
        'data:image/png;base64'
    """
    map_ = np.asarray(values, dtype=float).reshape(rows, columns)
    strength = np.abs(map_)[..., None] / (np.abs(map_).max() or 1)
    color = np.where(map_[..., None] > 0, (178, 24, 43), (33, 102, 172))
    picture = Image.fromarray((255 - strength * (255 - color)).round().astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _data("image/png", buffer.getvalue())


def short(value: float, digits: int = 3) -> str:
    """Return a number with few digits.

    Args:
        value: The number.
        digits: Significant digits.

    Returns:
        As text.

    Example:
        >>> short(0.123456), short(12345.6), short(1.2e-7, 1)
        ('0.123', '1.23e+04', '1e-07')
    """
    return f"{value:.{digits}g}"


def _rounded(value: Any) -> Any:
    """Return floats with six digits, to spare the page; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _script(value: Any) -> str:
    """Return JSON that is safe within a script, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
