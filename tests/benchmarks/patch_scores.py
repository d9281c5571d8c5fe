"""How much of the label do the regions carry that score maps, gradients or activations choose?

    python -m tests.benchmarks patch_scores --images DIR

DIR holds photographs and a ``labels.csv`` with the columns ``file`` and ``imagenet_index``; those count that
EfficientNet-Lite0 classifies with more than 0.8. With ``--network vgg16`` the network is a VGG-16 with fully connected
layers, the paper's kind (see ``subjects.py``); it knows none of the photographs' labels, so its own predictions are
explained, on every other photograph, where it is sure of them by more than one half.

Of every image each method chooses one square: around the highest cell of its map, as ``semantic_patches`` does, or
the window over which its map has the largest sum, of both signs or of the positive part alone. The network's
probability for the label on the square alone, enlarged to one view, is the patch score. Printed are means with their
95% confidence intervals, as Markdown.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from captum.attr import LayerActivation
from torch import Tensor, nn
from tqdm import tqdm

from captum_scoremap import LayerScoreMap, receptive_field
from captum_scoremap.metrics import input_sized, patch_score, strongest_window
from captum_scoremap.models import LoadedModel, load_model, prepare, read_image
from tests.benchmarks.subjects import SUBJECTS

LAYERS = {
    "efficientnet_lite0": ("blocks.1", "blocks.2", "blocks.4", "blocks.6", "bn2"),
    "vgg16": ("features.8", "features.15"),  # after the fourth and the seventh convolution
}
SIZES = (64, 112, 160)
RANDOM = 10  # windows of each image
CONFIDENT = 0.8
BATCH = 16


def confident_images(folder: Path, loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    """The photographs that the network is sure of, (N, C, H, W), and their labels, (N,)."""
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    inputs = torch.stack([loaded.preprocessing(read_image(folder / row["file"])) for row in rows])
    target = torch.tensor([int(row["imagenet_index"]) for row in rows])
    with torch.no_grad():
        probabilities = torch.cat([loaded.module(batch).softmax(1) for batch in inputs.split(BATCH)])
    sure = probabilities.gather(1, target[:, None])[:, 0] > CONFIDENT
    return inputs[sure], target[sure]


def layer_maps(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What each method ranks the cells of a layer by, (N, 1, h, w)."""
    score_maps, gradients, activations = [], [], []
    for batch, labels in zip(inputs.split(BATCH), target.split(BATCH), strict=True):
        score_maps.append(LayerScoreMap(model, layer).attribute(batch, labels))
        coefficients = LayerScoreMap(model, layer, multiply_by_inputs=False)
        gradients.append(coefficients.attribute(batch, labels, attr_dim_summation=False).abs().amax(1, keepdim=True))
        activations.append(LayerActivation(model, layer).attribute(batch).detach().sum(1, keepdim=True))
    return {"SMSM": torch.cat(score_maps), "GSM": torch.cat(gradients), "activation": torch.cat(activations)}


def highest_cell(maps: Tensor, centers: Tensor, side: int, size: int) -> Tensor:
    """The window around the highest cell of each map, shifted to lie inside the image, (N, 4)."""
    center = centers.flatten(0, 1)[maps.flatten(1).argmax(1)]
    corner = (center - size / 2).round().long().clamp(0, side - size)
    return torch.cat([corner, corner + size], dim=1)


def interval(values: Tensor) -> str:
    """Mean and half the width of its 95% confidence interval (normal approximation)."""
    return f"{values.mean():.2f} ± {1.96 * values.std() / math.sqrt(len(values)):.2f}".replace("-", "−")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *[list(row.values()) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="photographs and labels.csv")
    parser.add_argument("--network", default="efficientnet_lite0", choices=list(LAYERS), help="default: %(default)s")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="layers of the network")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="PIXELS", help="sides of the squares")
    options = parser.parse_args(arguments)

    if options.network == "vgg16":
        subject = SUBJECTS["vgg16"](options.images, "odd")
        model, inputs, target = subject.module, subject.images, subject.target
    else:
        loaded = load_model(options.network)
        model = prepare(loaded.module)
        inputs, target = confident_images(options.images, loaded)
    side = inputs.shape[-1]
    generator = torch.Generator().manual_seed(0)

    def score(boxes: Tensor) -> Tensor:
        return patch_score(model, inputs, target, boxes)

    baselines = []
    for size in options.sizes:
        corners = torch.randint(side - size + 1, (len(inputs), RANDOM, 2), generator=generator)
        middle = torch.full((len(inputs), 2), (side - size) // 2)
        random = score(torch.cat([corners, corners + size], dim=-1)).mean(1)
        center = score(torch.cat([middle, middle + size], dim=-1))
        baselines.append({"pixels": str(size), "random": interval(random), "center": interval(center)})

    rows = []
    for name in tqdm(options.layers or LAYERS[options.network], unit="layer", leave=False):
        layer = model.get_submodule(name)
        maps = layer_maps(model, layer, inputs, target)
        field = receptive_field(model, layer, (side, side))
        height, width, _ = field.boxes.shape
        centers = torch.tensor([[field.center(row, col) for col in range(width)] for row in range(height)])
        for size in options.sizes:
            cell = {method: score(highest_cell(one, centers, side, size)) for method, one in maps.items()}
            summed = maps | {"SMSM, positive part": maps["SMSM"].clamp(min=0)}
            window = {
                method: score(strongest_window(input_sized(one, side, side), size)) for method, one in summed.items()
            }
            rows.append(
                {"layer": f"`{name}`", "pixels": str(size)}
                | {f"cell: {method}": interval(values) for method, values in cell.items()}
                | {"cell: SMSM − GSM": interval(cell["SMSM"] - cell["GSM"])}
                | {f"window: {method}": interval(values) for method, values in window.items()}
                | {"window: SMSM, positive part − GSM": interval(window["SMSM, positive part"] - window["GSM"])}
            )
    whole = score(torch.tensor([0, 0, side, side]).expand(len(inputs), 4))
    print(f"{len(inputs)} images; the score of the whole image is {interval(whole)}.\n")
    print(f"{table(baselines)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
