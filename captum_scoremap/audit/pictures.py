"""Picture files: which there are, and why one cannot be read, in words fit for a report."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from captum_scoremap.models import read_image

__all__ = ["UnreadableError", "is_picture_name", "read_picture", "strict_decoding"]


class UnreadableError(ValueError):
    """An image that cannot be audited; the message is the reason, without any path of this machine."""


def is_picture_name(name: str) -> bool:
    """Tell whether a file is called like a picture that Pillow can read.

    Args:
        name: Name or path of the file.

    Returns:
        Whether the name's ending is that of a picture.

    Example:
        >>> is_picture_name("cat.JPEG"), is_picture_name("labels.csv")
        (True, False)
    """
    suffix = Path(name).suffix.lower()
    return Image.registered_extensions().get(suffix) in Image.OPEN


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Make an oversized picture an error instead of a warning: few bytes can unpack to gigabytes.

    All threads of a process share its warning filters, so that one place around the whole run is enough.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


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
        return read_image(path)
    except ValueError as error:
        _, _, reason = str(error).partition(f"got {str(path)!r}: ")
        raise UnreadableError((reason or str(error)).replace(str(path), path.name).rstrip(".")) from error
