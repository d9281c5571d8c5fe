"""Image files of every kind that occur in the wild, as 8-bit RGB; and the samples that come installed."""

from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from captum_scoremap.checks import nearest
from captum_scoremap.data.extras import import_extra

SAMPLE_PREFIX = "sample:"
_SCIKIT_IMAGE_SAMPLES = ("chelsea", "coffee", "rocket", "astronaut")
_SCIKIT_LEARN_SAMPLES = ("china", "flower")
SAMPLES = _SCIKIT_IMAGE_SAMPLES + _SCIKIT_LEARN_SAMPLES


def read_image(source: str | Path) -> Image.Image:
    """Read an image file, or an installed sample, as 8-bit RGB.

    Grayscale, palette, CMYK and 16-bit images are converted (16-bit values divided by 257), transparent
    pixels are put on white, and the rotation that a camera notes in EXIF is carried out.

    Args:
        source: A path, or ``"sample:NAME"`` with a name of `SAMPLES`.

    Returns:
        The image in mode ``"RGB"``; of an animation the first frame.

    Raises:
        ValueError: There is no such file or sample, or the file is empty, truncated, too large to be decoded
            safely, or no image; the message has the path and the reason.

    Example:
        >>> read_image("sample:chelsea").size
        (451, 300)
    """
    if str(source).startswith(SAMPLE_PREFIX):
        return _read_sample(str(source).removeprefix(SAMPLE_PREFIX))
    path = Path(source)
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ValueError(
            f"image must be a readable file, got {str(path)!r}: no such file.{_sample_hint(path)}"
        ) from None
    except Exception as error:  # Pillow's decoders raise what they like: SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"image must be a readable file, got {str(path)!r}: {_reason(error, path)}.") from error


def _reason(error: Exception, path: Path) -> object:
    """What is wrong with a file, in words for its owner."""
    if not isinstance(error, PIL.UnidentifiedImageError):
        return error
    return "not an image file that Pillow knows" if path.stat().st_size else "the file is empty"


def _sample_hint(path: Path) -> str:
    """Advice for a user who typed the bare name of a sample."""
    return f" Did you mean '{SAMPLE_PREFIX}{path}'?" if str(path) in SAMPLES else ""


def _read_sample(name: str) -> Image.Image:
    """One of the images that scikit-image and scikit-learn carry."""
    if name in _SCIKIT_IMAGE_SAMPLES:
        return Image.fromarray(getattr(import_extra("skimage.data", "demo"), name)())
    if name in _SCIKIT_LEARN_SAMPLES:
        return Image.fromarray(import_extra("sklearn.datasets", "demo").load_sample_image(f"{name}.jpg"))
    raise ValueError(f"sample must be one of {', '.join(SAMPLES)}, got {name!r}.{nearest(name, SAMPLES)}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB, without clipping deep values and without losing transparency."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bit(np.asarray(image), image.mode))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Deep grayscale values as bytes: integers are taken as 16-bit, floats as fractions of white."""
    white = 1.0 if mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= white):
        raise ValueError(f"values of a {mode!r} image must lie in 0 to {white:g}, got {low:g} to {high:g}")
    return np.round(values.astype(np.float64) * (255.0 / white)).astype(np.uint8)
