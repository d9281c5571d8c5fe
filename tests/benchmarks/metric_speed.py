"""How fast are the pixel metrics, beside those of Quantus with the same numbers?

    python -m tests.benchmarks metric_speed

A small network on gray images of 28 x 28 pixels, so that the metric is measured and not the network. Both get
the same maps. Pixel flipping is deletion; ROAD's imputation is compared alone, without noise, for what Quantus reports
after it is the accuracy over images and not a value of each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import quantus
import torch
from quantus.functions.perturb_func import noisy_linear_imputation
from torch import Tensor, nn

from captum_scoremap import metrics
from captum_scoremap.metrics.remove_and_debias import impute


def network() -> nn.Module:
    """A small one, from gray images to ten labels."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def seconds(runs: Sequence[Callable[[], Any]], repeats: int) -> tuple[list[float], list[Any]]:
    """Processor time of the best turn of each, and what each returned; they take turns."""
    taken = []
    for _ in range(repeats):
        turn, found = [], []
        for run in runs:
            start = time.process_time()
            found.append(run())
            turn.append(time.process_time() - start)
        taken.append(turn)
    return [min(one) for one in zip(*taken, strict=True)], found


def flipping(images: Tensor, target: Tensor, maps: Tensor, steps: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of ours, of Quantus, and the largest difference of probabilities."""
    model = network()
    pixels = images.shape[-1] * images.shape[-2]
    options = {"normalise": False, "disable_warnings": True, "return_aggregate": False}
    pixel_flipping = quantus.PixelFlipping(features_in_step=pixels // steps, perturb_baseline=0.0, **options)
    data = {"x_batch": images.numpy(), "y_batch": target.numpy(), "a_batch": maps.numpy(), "channel_first": True}
    runs = (
        lambda: metrics.deletion(model, lambda *_: maps, images, target, steps=steps, batch_size=512),
        lambda: pixel_flipping(model=model, softmax=True, device="cpu", **data),
    )
    (ours, theirs), (curve, flipped) = seconds(runs, repeats)
    return ours, theirs, float(np.abs(curve.probabilities[:, 1:].numpy() - np.array(flipped)).max())


def imputation(images: Tensor, maps: Tensor, repeats: int) -> tuple[float, float, float]:
    """Seconds of ours, of Quantus, and the largest difference of pixels, with half of the pixels removed."""
    count = maps[0].numel() // 2
    order = maps.flatten(1).argsort(1, descending=True)[:, :count]
    holes = torch.zeros(maps.flatten(1).shape, dtype=torch.bool).scatter(1, order, True).view(maps[:, 0].shape)

    def theirs() -> np.ndarray:
        pairs = zip(images.numpy(), order.numpy(), strict=True)
        return np.stack([noisy_linear_imputation(image.copy(), which, noise=0.0) for image, which in pairs])

    def ours() -> Tensor:
        return torch.stack([impute(image, hole) for image, hole in zip(images, holes, strict=True)])

    taken, (mine, other) = seconds((ours, theirs), repeats)
    return taken[0], taken[1], float(np.abs(mine.numpy() - other.reshape(images.shape)).max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, metavar="N", help="number of images (default 32)")
    parser.add_argument("--size", type=int, default=28, metavar="PIXELS", help="their sides (default 28)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the best counts (default 3)")
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    shape = (options.images, 1, options.size, options.size)
    images, maps = (torch.rand(shape, generator=generator) for _ in range(2))
    target = torch.randint(10, (options.images,), generator=generator)
    print(f"{options.images} images of {options.size} x {options.size}, torch {torch.__version__}\n")
    print("| | ours, s | Quantus, s | ratio | largest difference |\n|---|---|---|---|---|")
    rows = {
        f"deletion, {steps} steps": flipping(images, target, maps, steps, options.repeats)
        for steps in (options.size, options.size**2)
    }
    rows["imputation of ROAD"] = imputation(images, maps, options.repeats)
    for title, (ours, theirs, difference) in rows.items():
        print(f"| {title} | {ours:.4f} | {theirs:.4f} | {theirs / ours:.1f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
