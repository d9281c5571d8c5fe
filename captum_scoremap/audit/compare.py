"""Two audits of one model side by side: which labels gained or lost on other images, and by what.

A new camera, a new site, a watermark: the mean score of every label, in logits, over the images of both runs. Where
both have images of the same names, each is compared with itself, which takes the images' own differences out.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from captum_scoremap.attribution import LayerScoreMap
from captum_scoremap.audit.analysis import lists
from captum_scoremap.audit.concentration import peak
from captum_scoremap.audit.explaining import MapLayer
from captum_scoremap.audit.proof import Example
from captum_scoremap.audit.screening import FALSE_ALARMS
from captum_scoremap.audit.shards import Shards, write_json

__all__ = ["SETTINGS", "check_comparable", "compare"]

SETTINGS = "audit.json"

_SHOWN = 10  # labels that are looked at with the network
_IMAGES = 16  # of each


def check_comparable(other: Path, settings: Mapping[str, Any]) -> None:
    """Check that another run can be compared with this one.

    Args:
        other: Its folder.
        settings: This run's settings.

    Raises:
        ValueError: If it is no audit, one of another model, or its results are damaged or none.
    """
    path = other / SETTINGS
    if not path.is_file():
        raise ValueError(f"compare must be the folder of another audit, got {str(other)!r} without {SETTINGS}.")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError(f"not a mapping, but {type(theirs).__name__}")
    except ValueError as error:
        raise ValueError(
            f"compare must be the folder of a whole audit, got {str(other)!r}, whose {SETTINGS} cannot be read "
            f"({error}). Go on with that audit by resume, which writes it anew."
        ) from error
    if theirs.get("format") != settings["format"]:
        raise ValueError(f"compare must be an audit by this version, got {str(other)!r} by another. Make it anew.")
    for name in ("hash", "preprocessing"):
        if theirs["model"][name] != settings["model"][name]:
            raise ValueError(
                f"compare must be an audit of the same model, got {str(other)!r} of {theirs['model']['name']} with "
                f"another {'network' if name == 'hash' else name}. Audit both sets of images with one model."
            )
    if theirs.get("score") != settings["score"]:
        name = (theirs.get("score") or {"name": "the labels"})["name"]
        raise ValueError(
            f"compare must be an audit of the same score, got {str(other)!r} of another score, or of other code of it: "
            f"{name}."
        )
    if not _Scores(Shards(other)).place:
        raise ValueError(
            f"compare must be an audit of some images, got {str(other)!r} without any. Go on with that audit by resume."
        )


def compare(
    shards: Shards,
    other: Shards,
    model: torch.nn.Module,
    layers: list[MapLayer],
    read: Callable[[int], Example | None],
    label_name: Callable[[int], str],
) -> list[dict[str, Any]]:
    """Compare two runs label by label, and write it to ``analysis/changes.json``.

    Args:
        shards: This run's results.
        other: The other run's.
        model: The network, in eval mode.
        layers: The layers that are mapped, from image to score; where something is, is read off the middle one.
        read: From the position of an image of this run to the image; None where it cannot be read.
        label_name: The name of a label.

    Returns:
        A mapping for each label, that which gained most first: ``label``, ``name``, ``change`` of the mean score and
        ``before``, in logits; ``predicted`` and ``predicted_before``, how often it is predicted, from 0 to 1;
        ``chance`` of the change, for any label; ``confident``. The first ten that gained also have ``images``, those
        in which it gained most, ``patches``, where in them its score map at ``layer`` is highest, with logits, and
        ``channels``: those of the layer that add most.
    """
    mine, theirs = _Scores(shards), _Scores(other)
    shared = sorted(set(mine.place) & set(theirs.place))
    paired = len(shared) >= 2 and 2 * len(shared) >= min(len(mine.place), len(theirs.place))
    if not mine.place or not theirs.place:
        return []
    if paired:
        after, before = (one.scores[[one.place[name] for name in shared]] for one in (mine, theirs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # images that are equal in both runs have no spread
            chances = stats.ttest_1samp(after - before, 0).pvalue
        gains, indices = after - before, mine.index[[mine.place[name] for name in shared]]
    else:
        after, before = mine.scores, theirs.scores
        enough = min(len(after), len(before)) > 1
        chances = stats.ttest_ind(after, before, equal_var=False).pvalue if enough else np.ones(after.shape[1])
        gains, indices = after - before.mean(0), mine.index
    changes = after.mean(0) - before.mean(0)
    chances = np.minimum(np.nan_to_num(chances, nan=1.0) * len(changes), 1)
    rates = [np.bincount(one.argmax(1), minlength=len(changes)) / len(one) for one in (after, before)]
    rows: list[dict[str, Any]] = []
    for place, label in enumerate(np.argsort(-changes).tolist()):
        row: dict[str, Any] = {
            "label": label,
            "name": label_name(label),
            "change": float(changes[label]),
            "before": float(before[:, label].mean()),
            "predicted": float(rates[0][label]),
            "predicted_before": float(rates[1][label]),
            "chance": float(chances[label]),
            "confident": bool(chances[label] <= FALSE_ALARMS),
        }
        if place < _SHOWN and row["change"] > 0:
            most = indices[np.argsort(-gains[:, label])][:_IMAGES].tolist()
            row |= _patches(model, layers[(len(layers) - 1) // 2], label, most, read)
        rows.append(row)
    write_json(shards.folder / "analysis" / "changes.json", {"other": other.folder.name, "changes": rows})
    return rows


class _Scores:
    """Scores of all labels of the images of a run."""

    def __init__(self, shards: Shards) -> None:
        names: dict[int, str] = {}
        for _, table in shards.each("images"):
            names |= dict(zip(table["index"].to_pylist(), table["name"].to_pylist(), strict=True))
        indices: list[int] = []
        parts: list[NDArray[np.float32]] = []
        for _, table in shards.each("scores"):
            indices += table["index"].to_pylist()
            parts += lists(table["scores"])
        self.place = {names[index]: place for place, index in enumerate(indices)}
        self.index = np.array(indices, dtype=np.int64)
        self.scores = np.stack(parts).astype(np.float64) if parts else np.zeros((0, 0))


def _patches(
    model: torch.nn.Module, layer: MapLayer, label: int, indices: list[int], read: Callable[[int], Example | None]
) -> dict[str, Any]:
    """Where in some images a label's score comes from, image by image, and by which channels."""
    method = LayerScoreMap(model, model.get_submodule(layer.name))
    patches, total = [], None
    for index in indices:
        example = read(index)
        if example is None:
            continue
        found = method.attribute(example.inputs[None], label, attr_dim_summation=False).detach()
        sub_scores = layer.as_images(found).double()
        map_ = sub_scores.sum(1)
        row, column = peak(map_)
        patches.append({"index": index, "row": float(row), "column": float(column), "value": float(map_.max())})
        channels = sub_scores.sum((0, 2, 3))
        total = channels if total is None else total + channels
    strongest = [] if total is None else total.topk(min(5, len(total))).indices.tolist()
    return {
        "layer": layer.name,
        "images": indices,
        "patches": patches[:8],
        "channels": [{"channel": one, "logits": float(total[one]) / len(patches)} for one in strongest]
        if total is not None
        else [],
    }
