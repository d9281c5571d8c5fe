"""``report.html``: what an audit found, as a page that needs no server and no network.

The page stands in the audit's folder; what it shows lies beside it in ``report``: the pictures, an index of
all images, and the score maps, one script for each shard, read when an image is opened.
"""

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from captum_scoremap.audit.analysis import INEXACT, Analysis, lists
from captum_scoremap.audit.shards import Shards, write_whole

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN = 200  # rows of a table on the page
_BINS = 20
_SUFFIXES = {"image/jpeg": "jpg", "image/png": "png"}
_INDEX = (
    "index", "name", "width", "height", "predicted", "runner_up", "true", "score", "probability", "contrast",
    "crops", "insertion", "deletion",
)  # fmt: skip
_NUMBERS = ("sub_scores", "bias", "residual", "top10_share", "border_share", "region_share")


def write_report(
    shards: Shards,
    settings: Mapping[str, Any],
    analysis: Analysis,
    path_of: Callable[[int], Path | None] | None = None,
) -> Path:
    """Write the page of an audit.

    Args:
        shards: The results.
        settings: The audit's settings.
        analysis: The analysis of the whole set.
        path_of: The file of each image, where the page shall name it. By default no path of the machine that
            ran the audit is on the page.

    Returns:
        The page.

    Raises:
        OSError: If it cannot be written.
    """
    assets = shards.folder / "report"
    shutil.rmtree(assets, ignore_errors=True)
    layers = list(settings["layers"])
    images: dict[int, dict[str, Any]] = {}
    for number in shards.finished():
        for image in _shard(shards, number, layers, assets):
            image["unusual"] = _rounded(analysis.unusualness.get(image["index"]))
            image["path"] = str(path_of(image["index"]) or "") if path_of else ""
            images[image["index"]] = image
    names = {row["label"]: row["name"] for row in analysis.labels}
    names |= {image["runner_up"]: image.pop("runner_up_label") for image in images.values()}
    index = {
        "columns": {name: [image[name] for image in images.values()] for name in next(iter(images.values()), {})},
        "labels": names,
        "layers": layers,
    }
    write_whole(assets / "index.js", f"window.scoremapIndex = {_script(index)};\n")
    for name in ("report.css", "report.js"):
        write_whole(assets / name, (_TEMPLATES / name).read_bytes())
    page = shards.folder / "report.html"
    write_whole(page, _page(settings, analysis, images))
    return page


def _shard(shards: Shards, number: int, layers: Sequence[str], assets: Path) -> Iterator[dict[str, Any]]:
    """Write pictures and maps of one shard; yields what the index says of each image."""
    views = assets / "views" / f"{number:05d}"
    views.mkdir(parents=True, exist_ok=True)
    measured = {(row["index"], row["layer"]): row for row in shards.read("layers", number).to_pylist()}
    (assets / "maps").mkdir(exist_ok=True)
    content = _maps_of(shards, number, layers, measured)
    (assets / "maps" / f"{number:05d}.js").write_text(
        f"window.scoremapShard({number}, {_script(content)});\n", encoding="utf-8"
    )
    pictures: dict[int, str] = {}
    for row in shards.read("views", number).to_pylist():
        picture = views / f"{row['index']:06d}.{_SUFFIXES[row['format']]}"
        picture.write_bytes(row["view"])
        pictures[row["index"]] = picture.relative_to(assets.parent).as_posix()
    for row in shards.read("images", number).to_pylist():
        if row["error"] is None:
            image = {name: _rounded(row[name]) for name in _INDEX}
            numbers = [measured[row["index"], layer] for layer in layers]
            image["residual"] = _rounded(max(layer["residual"] for layer in numbers))
            image["border"] = _rounded(numbers[-1]["border_share"])
            image["shard"] = number
            image["view"] = pictures[row["index"]]
            image["runner_up_label"] = row["runner_up_label"]
            yield image


def _maps_of(
    shards: Shards, number: int, layers: Sequence[str], measured: Mapping[tuple[int, str], Mapping[str, Any]]
) -> dict[int, list[dict[str, Any]]]:
    """Return for each image and layer its numbers, and its maps in 255 steps."""
    content: dict[int, list[dict[str, Any]]] = {}
    table = shards.read("maps", number)
    for row, values in zip(table.drop_columns(["values"]).to_pylist(), lists(table["values"]), strict=True):
        if row["index"] not in content:
            content[row["index"]] = [
                {
                    "maps": {},
                    "numbers": {name: _rounded(measured[row["index"], layer][name]) for name in _NUMBERS},
                }
                for layer in layers
            ]
        scale = float(np.abs(values).max(initial=0))
        steps = np.round(values / (scale or 1) * 127).astype(np.int8)
        content[row["index"]][layers.index(row["layer"])]["maps"][row["label"]] = {
            "rows": row["rows"],
            "columns": row["columns"],
            "scale": _rounded(scale),
            "values": base64.b64encode(steps.tobytes()).decode(),
        }
    return content


def _page(settings: Mapping[str, Any], analysis: Analysis, images: Mapping[int, Mapping[str, Any]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["short"] = short
    residuals = [row["residual_max"] for row in analysis.summary["layers"] if row["residual_max"] is not None]
    return environment.get_template("report.html.j2").render(
        settings=settings,
        summary=analysis.summary,
        residual=max(residuals, default=None),
        limit=INEXACT,
        inexact=[row for row in analysis.summary["layers"] if row["inexact"]],
        findings=[_finding(row) for row in analysis.findings if row["confident"]],
        changes=[
            {
                **row,
                "patches": [
                    {**one, "left": _shift(one["column"]), "top": _shift(one["row"])} for one in row["patches"]
                ],
            }
            for row in analysis.changes
            if row["confident"] and "patches" in row
        ],
        against=bool(analysis.changes),
        compared=sum(row["kind"] != "confused pair" for row in analysis.findings),
        labels=[_label(row) for row in analysis.labels[:_SHOWN]],
        ranked=any(row["shortcut"] is not None for row in analysis.labels),
        more_labels=max(len(analysis.labels) - _SHOWN, 0),
        pairs=[_pair(row) for row in analysis.pairs[:_SHOWN]],
        more_pairs=max(len(analysis.pairs) - _SHOWN, 0),
        images=images,
        plots=list(_plots(images)),
    )


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "picture": heat(row["contrast_map"], row["rows"], row["columns"])}


def _finding(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "picture": heat(row["map"], row["rows"], row["columns"]),
        "patches": [
            {**patch, "left": _shift(patch["column"]), "top": _shift(patch["row"])} for patch in row["patches"]
        ],
    }


def _label(row: Mapping[str, Any]) -> dict[str, Any]:
    size = row["rows"], row["columns"]
    return {
        **row,
        "mean_picture": heat(row["mean_map"], *size) if row["mean_map"] else None,
        "private_picture": heat(row["private_map"], *size) if row["private_map"] else None,
        # A patch is a quarter of the picture wide, moved inside it where its center lies near an edge.
        "patches": [
            {**patch, "left": _shift(patch["column"]), "top": _shift(patch["row"])} for patch in row["patches"]
        ],
    }


def _shift(center: float) -> float:
    """Return where the enlarged picture must begin, in percent of the patch, so that its patch shows."""
    return -400 * min(max(center - 0.125, 0), 0.75)


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
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
