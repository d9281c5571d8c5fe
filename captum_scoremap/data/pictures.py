"""Image files of every kind that occur in the wild, as 8-bit RGB; and the samples that come installed."""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from captum_scoremap.checks import nearest
from captum_scoremap.data.extras import import_extra

__all__ = [
    "SAMPLES",
    "SAMPLE_PREFIX",
    "UnreadableError",
    "image_named",
    "is_picture_name",
    "misfit",
    "read_image",
    "read_picture",
    "strict_decoding",
    "to_rgb",
]

SAMPLE_PREFIX = "sample:"
_SCIKIT_IMAGE_SAMPLES = ("chelsea", "coffee", "rocket", "astronaut")
_SCIKIT_LEARN_SAMPLES = ("china", "flower")
# Pictures of kinds that Pillow cannot read by itself, or not in every build.
_OTHER_KINDS = frozenset(
    """.heic .heif .hif .avif .jxl .jxr .svg .svgz .exr .hdr .xcf
    .dng .cr2 .cr3 .nef .nrw .arw .srf .orf .raf .rw2 .pef .srw .x3f .raw""".split()
)
SAMPLES = _SCIKIT_IMAGE_SAMPLES + _SCIKIT_LEARN_SAMPLES


_NO_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableError(ValueError):
    """An image that cannot be audited; the message is the reason, without any path of this machine."""


def is_picture_name(name: str) -> bool:
    """Tell whether a file is called like a picture, be it of a kind that Pillow cannot read.

    Args:
        name: Name or path of the file.

    Returns:
        Whether the name's ending is that of a picture.

    Example:
        >>> is_picture_name("cat.JPEG"), is_picture_name("cat.heic"), is_picture_name("labels.csv")
        (True, True, False)
    """
    suffix = Path(name).suffix.lower()
    return suffix in _OTHER_KINDS or Image.registered_extensions().get(suffix) in Image.OPEN


@contextmanager
def image_named(source: object) -> Iterator[None]:
    """Let errors say which image it is that cannot be taken.

    Args:
        source: How the user calls it.

    Raises:
        misfit: A ValueError, if what is done with the image raises `UnreadableError`.

    Example:
        >>> with image_named("long.png"):
        ...     raise UnreadableError("it has no pixels")
        Traceback (most recent call last):
        ValueError: image must fit the model, got 'long.png': it has no pixels.
    """
    try:
        yield
    except UnreadableError as error:
        raise misfit(source, error) from error


def misfit(source: object, reason: UnreadableError) -> ValueError:
    """Return the error that says which image it is that cannot be taken, and why.

    Args:
        source: How the user calls it.
        reason: Why.

    Returns:
        The error.

    Example:
        >>> misfit("long.png", UnreadableError("it has no pixels"))
        ValueError("image must fit the model, got 'long.png': it has no pixels.")
    """
    return ValueError(f"image must fit the model, got {str(source)!r}: {reason}.")


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Make an oversized picture an error instead of a warning: few bytes can unpack to gigabytes.

    All threads of a process share its warning filters, so that one place around the whole run is enough.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


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
        return _decoded(path)
    except UnreadableError as error:
        hint = "" if path.exists() else _sample_hint(path)
        raise ValueError(f"image must be a readable file, got {str(path)!r}: {error}.{hint}") from error


def read_picture(path: Path) -> Image.Image:
    """Read a picture as 8-bit RGB, as people see it: first frame, upright by its EXIF orientation.

    Args:
        path: The file.

    Returns:
        The picture, mode ``RGB``.

    Raises:
        UnreadableError: If the file is missing, empty, damaged, too large or no picture.
    """
    try:
        return _decoded(path)
    except UnreadableError as error:
        raise UnreadableError(str(error).replace(str(path), path.name).rstrip(".")) from error


def _decoded(path: Path) -> Image.Image:
    """Return a picture file as RGB.

    Returns:
        The picture.

    Raises:
        UnreadableError: With the reason alone.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind in _NO_FILES:  # opening a pipe waits for a writer that may never come
            raise UnreadableError(f"{_NO_FILES[kind]}, not a file")
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like: SyntaxError, struct.error, EOFError, ...
        raise UnreadableError(f"{_reason(error, path)}") from error


def _reason(error: Exception, path: Path) -> object:
    """Return what is wrong with a file, in words for its owner."""
    if not isinstance(error, PIL.UnidentifiedImageError):
        return error
    if not path.stat().st_size:
        return "the file is empty"
    if path.suffix.lower() in _OTHER_KINDS:
        return f"Pillow cannot read {path.suffix.lower()} files; convert it to PNG or JPEG"
    return "not an image file that Pillow knows"


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as 8-bit RGB, without clipping deep values, what is transparent on white.

    Args:
        image: The picture.

    Returns:
        The picture in mode ``"RGB"``; itself where it is.

    Raises:
        ValueError: Deep values are outside the range of 16-bit integers, or of fractions of white.

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 257 * 200)).getpixel((0, 0))
        (200, 200, 200)
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
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
