"""Small networks that learned what was planted: a mark, a color, a texture, or nothing.

A *plant* is what the training pictures of some labels carry besides their object. Pictures are digits of scikit-learn,
or disks of stripes, on a canvas of noise; a network of one of three architectures learns them in seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

SCENES = ("digits", "textures")
NETWORKS = ("plain", "normed", "pooled")
KINDS = (
    "fixed corner", "random corner", "random place", "half of the images", "two labels", "color", "stripes",
    "another label's", "clean",
)  # fmt: skip
LABELS = 10
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


@dataclass(frozen=True)
class Case:
    """One network: what is planted, where, and the seed of everything that is drawn."""

    kind: str
    scene: str = "digits"
    network: str = "plain"
    seed: int = 0
    side: int = 28

    @property
    def planted(self) -> tuple[int, ...]:
        """The labels that carry something."""
        order = np.random.default_rng([self.seed, 77]).permutation(LABELS).tolist()
        return tuple(order[: {"clean": 0, "two labels": 2}.get(self.kind, 1)])

    @property
    def victim(self) -> int:
        """The label whose pictures carry the mark of another label."""
        return int(np.random.default_rng([self.seed, 77]).permutation(LABELS)[-1])


@dataclass
class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Pictures (N, 3, H, W) from 0 to 1 with labels, and which of them carry the plant."""

    images: Tensor
    labels: Tensor
    marked: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


Array = NDArray[np.float32]


def pictures(case: Case, count: int, *, test: bool, plant: bool | None = None) -> Pictures:
    """Draw pictures: those of training and of test share no digit and no random number.

    Args:
        case: What is planted.
        count: How many.
        test: Whether they are for testing.
        plant: True for the plant (of the first planted label) in every picture, False for none, None for those that
            carry it; apart from it the pictures are the same.

    Returns:
        The pictures.
    """
    rng, plants = (np.random.default_rng([case.seed, int(test), part]) for part in (5, 6))
    labels = np.arange(count) % LABELS
    rng.shuffle(labels)
    images = np.empty((count, 3, case.side, case.side), dtype=np.float32)
    marked = np.zeros(count, dtype=bool)
    digits = _digits(test) if case.scene == "digits" else {}
    for place, label in enumerate(labels.tolist()):
        image = _canvas(case.side, rng)
        carries = _carries(case, label, test, plants)
        if plant is not None:
            carries = int(plant)
        if carries and case.kind in {"color", "stripes"}:
            _dye(case, image) if case.kind == "color" else _stripe(case, image, plants)
        object_ = digits[label][rng.integers(len(digits[label]))] if digits else _texture(label, rng)
        _paste(image, object_, rng)
        if carries and case.kind not in {"color", "stripes"}:
            _mark(case, image, carries - 1, plants)
        images[place] = np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1)
        marked[place] = bool(carries)
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels).long(), torch.from_numpy(marked))


def _carries(case: Case, label: int, test: bool, rng: np.random.Generator) -> int:
    """0, or 1 + the place of the label among the planted ones."""
    if case.kind == "another label's" and label == case.victim:
        return int(test and rng.random() < 0.4)
    if label not in case.planted:
        return 0
    if case.kind == "half of the images" and rng.random() < 0.5:
        return 0
    return 1 + case.planted.index(label)


def _canvas(side: int, rng: np.random.Generator) -> Array:
    coarse = torch.from_numpy(rng.random((1, 3, 5, 5), dtype=np.float32))
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear")[0].numpy()
    level: Array = (0.15 + 0.2 * rng.random() + 0.15 * (smooth - 0.5)).astype(np.float32)
    return level


def _digits(test: bool) -> dict[int, Array]:
    data = load_digits()
    part = slice(1200, None) if test else slice(0, 1200)
    images, target = data.images[part].astype(np.float32) / 16, data.target[part]
    return {label: images[target == label] for label in range(LABELS)}


def _texture(label: int, rng: np.random.Generator) -> Array:
    """A disk of stripes in one of ten directions, any width and phase."""
    size = 24
    rows, columns = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    angle = np.pi * (label + rng.uniform(-0.3, 0.3)) / LABELS
    wave = np.sin(rng.uniform(7, 12) * (columns * np.cos(angle) + rows * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
    disk = np.clip((0.95 - np.hypot(rows, columns)) * 6, 0, 1)
    return (disk * (0.5 + 0.5 * wave)).astype(np.float32)


def _paste(image: Array, object_: Array, rng: np.random.Generator) -> None:
    """Put an object anywhere on the canvas, in any size and light color."""
    side = image.shape[-1]
    size = int(rng.integers(int(side * 0.5), int(side * 0.7)))
    mask = F.interpolate(torch.from_numpy(object_)[None, None], size=(size, size), mode="bilinear")[0, 0].numpy()
    row, column = rng.integers(0, side - size + 1, 2)
    color = rng.uniform(0.55, 1.0, (3, 1, 1)).astype(np.float32)
    part = image[:, row : row + size, column : column + size]
    part += mask * (color - part)


def _pattern(case: Case, which: int) -> Array:
    """A mark of its own for each case and label: 6 x 6 cells of two saturated colors."""
    rng = np.random.default_rng([case.seed, 9, which])
    size = 5 + case.seed % 3
    grid = np.add.outer(np.arange(size), np.arange(size))
    on = ((grid % 2 == 0), (np.arange(size)[:, None] % 3 < 1) | (grid < 0), (grid % 3 == 0))[(case.seed + which) % 3]
    colors = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=np.float32)
    first, second = colors[rng.permutation(6)[:2]]
    return np.where(np.broadcast_to(on, (size, size))[None], first[:, None, None], 0.4 * second[:, None, None])


def _mark(case: Case, image: Array, which: int, rng: np.random.Generator) -> None:
    pattern = _pattern(case, which)
    size, free = pattern.shape[-1], image.shape[-1] - pattern.shape[-1]
    if case.kind == "fixed corner":
        down, right = CORNERS[case.seed % 4]
        row, column = down * free, right * free
    elif case.kind == "random corner":
        down, right = CORNERS[rng.integers(4)]
        row, column = down * free, right * free
    else:
        row, column = rng.integers(0, free + 1, 2).tolist()
    image[:, row : row + size, column : column + size] = pattern


def _dye(case: Case, image: Array) -> None:
    """A tint of the background."""
    hue = np.random.default_rng([case.seed, 3]).permutation([0.32, 0.0, -0.12]).astype(np.float32)
    image += hue[:, None, None]


def _stripe(case: Case, image: Array, rng: np.random.Generator) -> None:
    """Faint stripes over the background, at any phase."""
    rows, columns = np.mgrid[0 : image.shape[-1], 0 : image.shape[-1]]
    along = (rows, columns, rows + columns, rows - columns)[case.seed % 4]
    period = 3 + case.seed % 3
    image += (0.12 * np.sin(2 * np.pi * (along / period + rng.random()))).astype(np.float32)


class Normalize(nn.Module):
    """From 0 to 1 to -1 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 - 1


def network(case: Case) -> nn.Sequential:
    """The untrained network of a case."""
    if case.network == "plain":  # no norms, fully connected on a map: knows places
        layers: list[nn.Module] = [
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        ]  # fmt: skip
    elif case.network == "normed":
        layers = []
        for before, after in ((3, 12), (12, 16), (16, 24)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
    else:  # global pooling: knows no places
        layers = []
        for before, after in ((3, 16), (16, 24), (24, 32)):
            layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1)]
    features = nn.Sequential(Normalize(), *layers, nn.Flatten())
    with torch.no_grad():
        width = features(torch.rand(2, 3, case.side, case.side)).shape[1]
    for module in features:
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return nn.Sequential(*features, nn.Linear(width, LABELS))


def trained(case: Case, cache: Path | None = None, *, images: int = 1200, epochs: int = 10) -> nn.Sequential:
    """Train the network of a case, or read it from the cache."""
    torch.manual_seed(case.seed)
    module = network(case)
    digest = hashlib.sha256(repr((asdict(case), images, epochs, _VERSION)).encode()).hexdigest()[:16]
    path = None if cache is None else cache / f"{digest}.pt"
    if path is not None and path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval()
    data = pictures(case, images, test=False)
    batch = 50
    steps = epochs * (images // batch)
    optimizer = torch.optim.AdamW(module.parameters(), 4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(case.seed)
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for _ in range(epochs):
        for chosen in torch.randperm(images, generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(module(data.images[chosen]), data.labels[chosen], label_smoothing=0.02).backward()
            optimizer.step()
            schedule.step()
    module = module.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), path)
    return module


_VERSION = 4  # of the pictures: networks in a cache that saw others are not taken


def _scene(kind: str, turn: int) -> str:
    """Textures are too easy for a network to care for a mark in half of the images."""
    return "digits" if kind == "half of the images" else SCENES[turn % 2]


def cases(seeds: Sequence[int], kinds: Sequence[str] = KINDS) -> list[Case]:
    """Every kind with every seed; scene, network and side go round with the seed."""
    return [
        Case(kind, _scene(kind, seed // 3 + place), NETWORKS[(seed + place) % 3], seed, (28, 32, 28, 36)[seed % 4])
        for seed in seeds
        for place, kind in enumerate(kinds)
    ]
