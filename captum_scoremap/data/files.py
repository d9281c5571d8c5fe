"""Files on disk: which of a folder's are pictures, and whether a file is still the one that it was."""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from captum_scoremap.data.pictures import is_picture_name

__all__ = ["AUDIT_FILE", "find_pictures", "printable", "signatures"]

AUDIT_FILE = "audit.json"
"""A folder with this file holds the results of an audit, whose pictures are none to audit."""

_SAMPLE = 1 << 14  # bytes at the start, in the middle and at the end of a file that its signature looks at
_THREADS = 8


def find_pictures(root: Path) -> tuple[list[str], list[str]]:
    """Find everything below a folder that is called like a picture, to any depth.

    Symbolic links are followed, but no folder is entered twice: a link to a folder that is met elsewhere, such as a
    parent, would multiply the data.

    Args:
        root: The folder.

    Returns:
        Paths below ``root``, sorted; and a line for each folder that was passed over, with the reason.

    Example:
        >>> find_pictures(Path("no such folder"))
        ([], ['.: No such file or directory'])
    """
    found: list[str] = []
    passed: list[str] = []
    # Folders that lie here come before those that are linked here: a folder keeps its own name.
    own, linked = deque([Path()]), deque[Path]()
    met: dict[tuple[int, int], Path] = {}
    while own or linked:
        below = (own or linked).popleft()
        try:
            state = (root / below).stat()
            with os.scandir(root / below) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            passed.append(f"{below}: {error.strerror}")
            continue
        first = met.setdefault((state.st_dev, state.st_ino), below)
        if first != below:
            passed.append(f"{below}: a link to a folder that is searched already, {first}")
        elif any(entry.name == AUDIT_FILE for entry in entries):
            passed.append(f"{below}: the results of an audit")
        else:
            for entry in entries:
                if _is_folder(entry):
                    (linked if entry.is_symlink() else own).append(below / entry.name)
                elif is_picture_name(entry.name) and not entry.name.startswith("."):
                    found.append(str(below / entry.name))
    return sorted(found), [printable(line) for line in passed]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def signatures(paths: Iterable[Path]) -> list[str]:
    """Return what tells whether files have changed: size, time of the last change, and a sample of the bytes.

    Args:
        paths: The files.

    Returns:
        A short text for each, also for one that cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_signature, paths))


def _signature(path: Path) -> str:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            return "no regular file"
        digest = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode())
        with path.open("rb") as file:
            for start in (0, (state.st_size - _SAMPLE) // 2, state.st_size - _SAMPLE):
                file.seek(max(start, 0))
                digest.update(file.read(_SAMPLE))
    except OSError as error:
        return type(error).__name__
    return digest.hexdigest()


def printable(name: str) -> str:
    """Return the name as valid Unicode: bytes of a file name that are none are written as escapes.

    Args:
        name: A file's name.

    Returns:
        The name.

    Example:
        >>> printable("cat.png")
        'cat.png'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")
