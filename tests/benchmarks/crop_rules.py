"""By what rule should a region be chosen from a score map?

    python -m tests.benchmarks crop_rules --images DIR

DIR holds photographs and a ``labels.csv`` with the columns ``file`` and ``imagenet_index``; those count that
EfficientNet-Lite0 classifies with more than 0.8. Every rule chooses one region of each image, from the score map of
one layer or of several; the network's probability for the label on the region alone, enlarged to one view, is the
patch score. Printed are means with their 95% confidence intervals, and those of the difference to the default rule of
``score_map_crops`` on the same images, as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from captum_scoremap import FusedScoreMap, score_map_crops
from captum_scoremap.metrics import input_sized, patch_score
from captum_scoremap.models import load_model, prepare
from tests.benchmarks.patch_scores import BATCH, confident_images, interval, layer_maps, table

LAYERS = ("blocks.2", "blocks.4", "blocks.6", "bn2")
PRODUCT = ("blocks.4", "blocks.6", "bn2")
SIZE = 112
OTHER_SIZES = (64, 160)

# What is summed over a window, given the score map at the image's size, (N, 1, H, W).
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive part": lambda maps: maps.clamp(min=0),
    "both signs": lambda maps: maps,
    "magnitude": torch.abs,
    "positive part, squared": lambda maps: maps.clamp(min=0) ** 2,
    "positive part above 0.3 of the maximum": lambda maps: (maps - 0.3 * maps.amax((2, 3), keepdim=True)).clamp(min=0),
    "positive part, smoothed (sigma 16)": lambda maps: gaussian_blur(maps.clamp(min=0), [97, 97], [16.0, 16.0]),
}
DEFAULT = "positive part"

REGIONS: dict[str, dict[str, Any]] = {
    "box": {},
    "box, threshold 0": {"threshold": 0.0},
    "box, threshold 0.15": {"threshold": 0.15},
    "box, threshold 0.3": {"threshold": 0.3},
    "box, square": {"aspect": 1.0},
    "component, 0.15 of the maximum": {"rule": "component"},
    "component, 0.2 of the maximum": {"rule": "component", "threshold": 0.2},
    "component, quantile 0.95": {"rule": "component", "quantile": 0.95},
}


def centered_window_sums(maps: Tensor, size: int) -> Tensor:
    """Sums over windows that count the middle most: a triangle in rows times one in columns."""
    tent = 1 - (torch.arange(size) + 0.5 - size / 2).abs() / (size / 2)
    along_rows = F.conv2d(maps, tent.to(maps)[None, None, :, None])
    return F.conv2d(along_rows, tent.to(maps)[None, None, None, :])


def best_window(sums: Tensor, size: int) -> Tensor:
    """The window with the largest of given sums (N, 1, rows, columns), (N, 4)."""
    best = sums.flatten(1).argmax(1)
    y0, x0 = best // sums.shape[-1], best % sums.shape[-1]
    return torch.stack([x0, y0, x0 + size, y0 + size], dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="photographs and labels.csv")
    options = parser.parse_args(arguments)

    loaded = load_model()
    model = prepare(loaded.module)
    inputs, target = confident_images(options.images, loaded)
    side = inputs.shape[-1]
    known: dict[tuple[int, ...], Tensor] = {}

    def score(boxes: Tensor) -> Tensor:
        """Patch scores, of boxes not met before by the network."""
        keys = [(image, *box) for image, box in enumerate(boxes.tolist())]
        new = torch.tensor([image for image, key in enumerate(keys) if key not in known], dtype=torch.long)
        if len(new):
            scores = patch_score(model, inputs[new], target[new], boxes[new])
            known.update({keys[image]: one for image, one in zip(new.tolist(), scores, strict=True)})
        return torch.stack([known[key] for key in keys])

    sized = {}
    for layer in LAYERS:
        maps = layer_maps(model, model.get_submodule(layer), inputs, target)
        sized[layer] = {method: input_sized(one, side, side)[:, None] for method, one in maps.items()}
    score_maps = {layer: maps["SMSM"] for layer, maps in sized.items()}
    product = torch.stack([score_maps[layer].clamp(min=0) for layer in PRODUCT]).prod(0)
    score_maps[" × ".join(PRODUCT)] = product
    fused = FusedScoreMap(model)
    score_maps["FusedScoreMap"] = torch.cat([
        fused.attribute(*batch) for batch in zip(inputs.split(BATCH), target.split(BATCH), strict=True)
    ])

    windows = []
    for layer, maps in tqdm(score_maps.items(), unit="layer", leave=False):
        for size in (SIZE, *OTHER_SIZES):
            reference = score(score_map_crops(maps, (side, side), size=size)[:, 0])
            names = list(WEIGHTS) if size == SIZE else [DEFAULT, "both signs"]
            chosen = {
                name: score_map_crops(WEIGHTS[name](maps), (side, side), size=size, sign="all")[:, 0] for name in names
            }
            if size == SIZE:
                chosen["positive part, the middle counts most"] = best_window(
                    centered_window_sums(maps.clamp(min=0), size), size
                )
            if layer in sized:
                chosen["gradient magnitude (GSM)"] = score_map_crops(sized[layer]["GSM"], (side, side), size=size)[:, 0]
            for name, boxes in chosen.items():
                scores = score(boxes)
                windows.append(
                    {"score map": layer, "pixels": str(size), "summed": name, "patch score": interval(scores)}
                    | {"minus default": interval(scores - reference) if name != DEFAULT else ""}
                )

    regions = []
    for layer, maps in tqdm(score_maps.items(), unit="layer", leave=False):
        for name, how in REGIONS.items():
            boxes = score_map_crops(maps, (side, side), **how)[:, 0]
            area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / side**2
            same_area = [
                score_map_crops(one[None], (side, side), size=max(1, round(side * float(share) ** 0.5)))[:, 0]
                for one, share in zip(maps, area, strict=True)
            ]
            scores, squares = score(boxes), score(torch.cat(same_area))
            regions.append(
                {"score map": layer, "rule": name, "area": f"{area.mean():.2f}", "patch score": interval(scores)}
                | {"window of the same area": interval(squares), "difference": interval(scores - squares)}
            )

    print(f"{len(inputs)} images.\n\nWindows:\n\n{table(windows)}\n\nRegions of free size:\n\n{table(regions)}")


if __name__ == "__main__":
    main()
