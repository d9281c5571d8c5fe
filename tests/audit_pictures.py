"""Small data sets for the tests of the audit: digits as files, with every kind of damage where asked for."""

import io
import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from captum_scoremap.models import LoadedModel, Preprocessing

PREPROCESSING = Preprocessing(resize=32, crop=32, mean=(0.5,) * 3, std=(0.5,) * 3)


def tiny_model(labels: int = 10) -> LoadedModel:
    """A piecewise-linear network with random weights, the same in every process."""
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, labels),
    )
    return LoadedModel("tiny", module.eval(), PREPROCESSING, tuple(f"digit {label}" for label in range(labels)))


def write_digits(folder: Path, count: int, by_label: bool = False) -> None:
    """Write the first digits of scikit-learn as 32 x 32 pictures."""
    digits = load_digits()
    for place in range(count):
        label = int(digits.target[place])
        pixels = (digits.images[place] * 15.9).astype(np.uint8)
        below = folder / f"digit {label}" if by_label else folder
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((32, 32)).convert("RGB").save(below / f"{place:04d}.png")


def write_odd_files(folder: Path) -> dict[str, str | None]:
    """Write one file of each troublesome kind; returns names with a word of the reason, None where good."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "truncated.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture at all\n" * 20)
    (folder / "bomb.png").write_bytes(_bomb(30_000))
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=np.uint16)).save(folder / "sixteen.png")
    frames = [Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.save(folder / "naïve 猫 \N{CAT FACE}.png")
    picture.save(folder / "<img src=x onerror=alert(1)>&\"'.png")
    (folder / "notes.txt").write_text("passed over")
    return {
        "truncated.jpg": "truncated",
        "empty.png": "empty",
        "text.jpg": "not an image",
        "bomb.png": "exceeds limit",
        "cmyk.jpg": None,
        "sixteen.png": None,
        "animated.gif": None,
        "alpha.png": None,
        "naïve 猫 \N{CAT FACE}.png": None,
        "<img src=x onerror=alert(1)>&\"'.png": None,
    }


def _bomb(side: int) -> bytes:
    """A PNG of a few hundred kilobytes that claims, and holds, ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Digits(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Digits as tensors ``(1, 8, 8)``; where ``marked`` is given, that label carries a mark in the corner."""

    def __init__(self, start: int, stop: int, marked: int | None = None) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images[start:stop], dtype=torch.float32)[:, None] / 16
        self.labels = torch.tensor(digits.target[start:stop])
        if marked is not None:
            self.images[self.labels == marked, :, :2, :2] = 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class FatalDigits(Digits):
    """Digits of which one, the first time it is read, kills the process that reads it."""

    def __init__(self, start: int, stop: int, fatal: int, grave: Path) -> None:
        super().__init__(start, stop)
        self.fatal, self.grave = fatal, grave

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.fatal and not self.grave.exists():
            self.grave.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)
