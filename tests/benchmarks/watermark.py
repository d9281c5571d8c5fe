"""ImageNet's watermark, found blind: two audits of EfficientNet-Lite0, of photographs with and without CJK characters.

DIR holds photographs. Networks trained on ImageNet take a watermark of Chinese characters for a carton (Li et al., CVPR
2023). The characters are drawn over copies at random heights; the audit of the copies is compared with that of the
photographs, and knows nothing of a watermark. Printed are the labels that gained most, and how many of the carton's
prototype patches lie on the characters.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from captum_scoremap.audit import Audit, audit

FONT = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Bold.ttc")
TEXT = "捷径捷径捷径捷径"
SIDE, VIEW = 256, 224
CARTON = 478


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
            letters = ImageFont.truetype(str(font), size)
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).text((4, row), TEXT, fill=128, font=letters)
            _, first, _, last = mask.getbbox() or (0, 0, 0, 0)
            bands[f"{path.stem}.png"] = (first / VIEW, last / VIEW)
            image.paste((255, 255, 255), mask=mask)
        image.resize((SIDE, SIDE)).save(folder / f"{path.stem}.png")
    return bands


def on_characters(done: Audit, bands: dict[str, tuple[float, float]], cell: float) -> tuple[int, int]:
    """How many of the carton's patches lie on the characters, and how many there are."""
    (carton,) = (one for one in done.analysis.changes if one["label"] == CARTON)
    names = dict(zip(done.images["index"].to_pylist(), done.images["name"].to_pylist(), strict=True))
    hits = 0
    for patch in carton.get("patches", []):
        first, last = bands[names[patch["index"]]]
        top, bottom = (0.5 + (edge - 0.5) * SIDE / VIEW for edge in (first, last))
        hits += top - cell <= patch["row"] <= bottom + cell
    return hits, len(carton.get("patches", []))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the comparison says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="photographs")
    parser.add_argument("--font", type=Path, default=FONT, help="a font with CJK characters")
    parser.add_argument("--out", type=Path, help="keep both audits in this folder")
    options = parser.parse_args(arguments)
    photographs = sorted(path for path in options.images.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        write(photographs, folder / "plain", None)
        bands = write(photographs, folder / "marked", options.font)
        audit(folder / "plain", out=folder / "audit-plain", progress=False)
        done = audit(
            folder / "marked", out=folder / "audit-marked", compare_with=folder / "audit-plain", progress=False
        )
        print("| label | gain in logits | chance | predicted, before → now |\n| --- | --- | --- | --- |")
        for one in done.analysis.changes[:5]:
            rates = f"{one['predicted_before']:.2f} → {one['predicted']:.2f}"
            print(f"| {one['name']} | {one['change']:+.2f} | {one['chance']:.0e} | {rates} |")
        hits, patches = on_characters(done, bands, cell=0.5 / 14)
        print(f"\nPatches of carton on the characters: {hits} of {patches}.")


if __name__ == "__main__":
    main()
