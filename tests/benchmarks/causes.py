"""Changes of photographs with a known place: parts of other photographs, and a watermark."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tests.benchmarks.subjects import Subject

FONT = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Bold.ttc")  # Debian's fonts-noto-cjk
LEAST_RISE = 0.5
"""Of pasted parts, in logits: a part that raises nothing has no effect that could be placed."""


@dataclass(frozen=True)
class Cases:
    """Images, the same with a change each, and the label whose score the change raises."""

    inputs: Tensor
    changed: Tensor
    target: Tensor


def pasted(subject: Subject, count: int, attempts: int = 2000) -> Cases:
    """A third of each side, from about the middle of one photograph, anywhere in another one of another label."""
    images, target = subject.images, subject.target
    generator = random.Random(0)
    height = images.shape[-1]
    side = height // 3
    with torch.no_grad():
        scores = torch.cat([subject.module(batch) for batch in images.split(8)])
    kept = []
    for _ in range(attempts):
        if len(kept) == count:
            break
        i, j = generator.sample(range(len(images)), 2)
        y, x = (generator.randrange(height - side) for _ in range(2))
        from_y, from_x = ((height - side) // 2 + generator.randrange(-side // 3, side // 3) for _ in range(2))
        label = int(target[j])
        if scores.shape[1] > 1 and label == int(target[i]):
            continue
        changed = images[i].clone()
        changed[:, y : y + side, x : x + side] = images[j, :, from_y : from_y + side, from_x : from_x + side]
        with torch.no_grad():
            rise = float(subject.module(changed[None])[0, label] - scores[i, label])
        if rise > LEAST_RISE:
            kept.append((images[i], changed, label))
    if len(kept) < 3:
        raise RuntimeError(f"only {len(kept)} of {attempts} pasted parts raised the score by {LEAST_RISE} logits.")
    return _cases(kept)


def watermarked(subject: Subject, count: int) -> Cases:
    """Eight characters across the whole width at any height, half transparent white; "carton" rises."""
    if subject.carton is None:
        raise ValueError(f"no label of {subject.name} is known to rise by a watermark.")
    height = subject.images.shape[-1]
    generator = random.Random(1)
    kept = []
    for image in subject.images[:count]:
        mask = _watermark(height, generator.randrange(height - int(height * 0.15) - 8))
        kept.append((image, image * (1 - mask) + subject.white * mask, subject.carton))
    return _cases(kept)


def _watermark(side: int, top: int) -> Tensor:
    """Opacity of the characters, (H, W)."""
    picture = Image.new("L", (side, side), 0)
    font = ImageFont.truetype(str(FONT), int(side * 0.13))
    ImageDraw.Draw(picture).text((4, top), "捷径" * 4, fill=128, font=font)
    return torch.from_numpy(np.asarray(picture).astype("float32") / 255)


def _cases(kept: list[tuple[Tensor, Tensor, int]]) -> Cases:
    inputs, changed, labels = zip(*kept, strict=True)
    return Cases(torch.stack(inputs), torch.stack(changed), torch.tensor(labels))
