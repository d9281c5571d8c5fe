"""Digits whose place is known, and small networks that learn them.

A canvas of noise holds one of scikit-learn's digits, at any place and in any size and light color, and pieces of other
digits as clutter. Canvases of training and of test share no digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["SIDE", "AlexNet", "Canvases", "ViT", "canvases", "train"]

SIDE = 48
_SIZES = (18, 30)  # of a digit, in pixels
_CLUTTER, _PIECE = 4, (7, 12)  # pieces, and their sizes
_TRAINING = 1200  # digits; the others are for testing

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Canvases:
    """Images (N, 3, H, W) from -1 to 1, labels (N,), and where the digit is, boolean (N, H, W)."""

    images: Tensor
    labels: Tensor
    places: Tensor


def canvases(count: int, seed: int, *, test: bool) -> Canvases:
    """Draw canvases."""
    data = load_digits()
    chosen = slice(_TRAINING, None) if test else slice(0, _TRAINING)
    digits, of_digit = data.images[chosen].astype(np.float32) / 16, data.target[chosen]
    rng = np.random.default_rng([seed, int(test)])
    images = np.empty((count, 3, SIDE, SIDE), dtype=np.float32)
    places = np.zeros((count, SIDE, SIDE), dtype=bool)
    labels = np.empty(count, dtype=np.int64)
    for number in range(count):
        image = 0.15 + 0.2 * rng.random() + rng.normal(0, 0.04, (3, SIDE, SIDE)).astype(np.float32)
        for _ in range(_CLUTTER):
            row, column = rng.integers(0, 5, 2)
            piece = digits[rng.integers(len(digits)), row : row + 4, column : column + 4]
            _paste(image, piece, int(rng.integers(*_PIECE)), rng)
        which = int(rng.integers(len(digits)))
        size = int(rng.integers(*_SIZES))
        row, column = _paste(image, digits[which], size, rng)
        images[number] = image.clip(0, 1) * 2 - 1
        places[number, row : row + size, column : column + size] = True
        labels[number] = of_digit[which]
    return Canvases(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(places))


def _paste(image: Array, drawing: Array, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Put a drawing anywhere on an image (3, H, W), in any light color; returns its upper left corner."""
    mask = F.interpolate(torch.from_numpy(drawing)[None, None], size=(size, size), mode="bilinear")[0, 0].numpy()
    row, column = rng.integers(0, SIDE - size + 1, 2).tolist()
    color = rng.uniform(0.5, 1.0, (3, 1, 1)).astype(np.float32)
    part = image[:, row : row + size, column : column + size]
    part += mask * (color - part)
    return row, column


class AlexNet(nn.Module):
    """Convolutions, ReLU, max-pooling, and fully connected layers on a map of 6 x 6 cells: the paper's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64 * 36, 128), nn.ReLU(), nn.Linear(128, 10))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 48, 48) to scores (N, 10)."""
        scores: Tensor = self.classifier(self.features(x))
        return scores


class ViT(VisionTransformer):  # type: ignore[misc]  # timm is not typed
    """A vision transformer of four blocks, with a class token and a token for each 8 x 8 pixels.

    Two convolutions stand before its patches (Xiao et al. 2021, *Early Convolutions Help Transformers See Better*):
    without them it takes many times as long to learn.
    """

    def __init__(self) -> None:
        super().__init__(img_size=SIDE, patch_size=8, num_classes=10, embed_dim=96, depth=4, num_heads=3, mlp_ratio=2)
        self.patch_embed.proj = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 96, 2, stride=2),
        )

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens of a block (N, 1 + 36, 96) to scores (N, 10), as though it were the last."""
        scores: Tensor = self.forward_head(self.norm(tokens))
        return scores


def train(model: nn.Module, *, images: int = 6000, epochs: int = 20, rate: float = 2e-3) -> nn.Module:
    """Train a network on canvases; from one seed, so that it is the same each time on one machine."""
    data = canvases(images, seed=0, test=False)
    batch = 64
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-images // batch))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(images, generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[chosen]), data.labels[chosen], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)
