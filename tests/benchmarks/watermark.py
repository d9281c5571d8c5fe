"""ImageNet's watermark, found blind: two audits of a network, of photographs with and without CJK characters.

DIR holds photographs. Networks trained on ImageNet take a watermark of Chinese characters for a carton (Li et al., CVPR
2023). The characters are drawn over copies at random heights; the audit of the copies is compared with that of the
photographs, and knows nothing of a watermark. Printed are the labels that gained most, the place of carton among all
that gained, and how many of its prototype patches lie on the characters.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from captum_scoremap.audit import Audit, audit
from captum_scoremap.models import load_model

FONT = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Bold.ttc")
TEXT = "捷径捷径捷径捷径"
SIDE, VIEW = 256, 224
CARTON = 478
MODELS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def draw(image: Image.Image, row: int, size: int, font: Path, opacity: int) -> tuple[int, int]:
    """Draw the characters on an image, white; returns their first and last row."""
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).text((4, row), TEXT, fill=opacity, font=ImageFont.truetype(str(font), size))
    image.paste((255, 255, 255), mask=mask)
    _, first, _, last = mask.getbbox() or (0, 0, 0, 0)
    return first, last


def write(photographs: Sequence[Path], folder: Path, font: Path | None) -> dict[str, tuple[float, float]]:
    """Write the photographs, with the characters where a font is given; returns where these lie."""
    folder.mkdir(parents=True)
    bands = {}
    draw_at = random.Random(1)
    for path in photographs:
        image = Image.open(path).convert("RGB")
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        left, top = (image.width - VIEW) // 2, (image.height - VIEW) // 2
        image = image.crop((left, top, left + VIEW, top + VIEW))
        size = round(0.13 * VIEW)
        row = draw_at.randrange(0, VIEW - 2 * size)
        if font is not None:
            first, last = draw(image, row, size, font, opacity=128)
            bands[f"{path.stem}.png"] = (first / VIEW, last / VIEW)
        image.resize((SIDE, SIDE)).save(folder / f"{path.stem}.png")
    return bands


def on_characters(done: Audit, bands: dict[str, tuple[float, float]], enlarged: float) -> tuple[int, int]:
    """How many of the carton's patches lie on the characters, and how many there are.

    Args:
        done: The audit.
        bands: First and last row of the characters on each picture, from 0 to 1.
        enlarged: How much larger a picture is than what the network sees of it.
    """
    cell = 0.5 / 14
    (carton,) = (one for one in done.analysis.changes if one["label"] == CARTON)
    names = dict(zip(done.images["index"].to_pylist(), done.images["name"].to_pylist(), strict=True))
    hits = 0
    for patch in carton.get("patches", []):
        first, last = bands[names[patch["index"]]]
        top, bottom = (0.5 + (edge - 0.5) * enlarged for edge in (first, last))
        hits += top - cell <= patch["row"] <= bottom + cell
    return hits, len(carton.get("patches", []))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the comparison says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="photographs")
    parser.add_argument("--font", type=Path, default=FONT, help="a font with CJK characters")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="networks trained on ImageNet")
    parser.add_argument("--out", type=Path, help="keep the audits in this folder")
    options = parser.parse_args(arguments)
    photographs = sorted(path for path in options.images.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        write(photographs, folder / "plain", None)
        bands = write(photographs, folder / "marked", options.font)
        for name in options.models:
            model = load_model(name)
            before = folder / f"{name}-plain"
            audit(folder / "plain", model, out=before, progress=False)
            done = audit(folder / "marked", model, out=folder / f"{name}-marked", compare_with=before, progress=False)
            print(f"{name}\n\n| label | gain in logits | chance | predicted, before → now |\n| --- | --- | --- | --- |")
            for one in done.analysis.changes[:5]:
                rates = f"{one['predicted_before']:.2f} → {one['predicted']:.2f}"
                print(f"| {one['name']} | {one['change']:+.2f} | {one['chance']:.0e} | {rates} |")
            place = [one["label"] for one in done.analysis.changes].index(CARTON) + 1
            seen = model.preprocessing
            hits, patches = on_characters(done, bands, seen.resize / seen.crop if seen.crop else 1.0)
            total = len(done.analysis.changes)
            print(f"\nCarton is number {place} of {total}; {hits} of its {patches} patches lie on the characters.\n")


if __name__ == "__main__":
    main()
