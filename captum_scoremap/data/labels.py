"""True labels: from a list, or from the folders that images lie in, as indices of the model's labels."""

import itertools
import os
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeAlias

from captum_scoremap.checks import nearest

__all__ = ["RawLabel", "folder_labels", "label_indices", "one_label", "some", "table_labels"]

RawLabel: TypeAlias = int | str | None
"""A label as it is written: an index, a name, or nothing."""

_NAMED = 3  # names in a message


def table_labels(
    paths: Sequence[str],
    table: Iterable[tuple[str, RawLabel]],
    names: Sequence[str] | None,
    root: Path,
    folder: Path | None = None,
) -> list[int | None]:
    """Return labels of a folder's images from a table; warns of what only one of the two has.

    An image is named by its path below the source, its path from the table's folder, its full path, or its file name
    alone where no other image has the same.

    Args:
        paths: Path of each image below ``root``.
        table: Name of an image and its label, row by row.
        names: Names of the model's labels, in order.
        root: Folder of the images.
        folder: Folder of the table, where it is a file.

    Returns:
        An index or None for each image.

    Raises:
        ValueError: If no image is named, a name stands for several images, or an image has two labels.

    Warns:
        UserWarning: Some images have no label, or some names are no image's.
    """
    places: dict[str, list[int]] = defaultdict(list)
    files: dict[str, list[int]] = defaultdict(list)
    for place, path in enumerate(paths):
        places[_spelled(path)].append(place)
        files[_spelled(PurePath(path).name)].append(place)
    found: dict[int, list[RawLabel]] = defaultdict(list)
    strangers = []
    rows = 0
    for name, label in table:
        rows += 1
        spellings = _spellings(name, root, folder)
        matches = next((places[one] for one in spellings if one in places), files.get(spellings[0], []))
        if len(matches) > 1:
            several = " and ".join(PurePath(paths[place]).as_posix() for place in matches[:_NAMED])
            raise ValueError(f"labels must name each image by its path, got {name!r} for {several}.")
        if matches:
            found[matches[0]].append(label)
        else:
            strangers.append(name)
    if not found:
        raise ValueError(
            f"labels must name images of the source, got {rows} names of which none is there, "
            f"such as {strangers[0] if strangers else ''!r}; the source has {PurePath(paths[0]).as_posix()!r}."
        )
    labels = [
        one_label(PurePath(path).as_posix(), found[place], names) if place in found else None
        for place, path in enumerate(paths)
    ]
    without = [PurePath(path).as_posix() for path, label in zip(paths, labels, strict=True) if label is None]
    if without or strangers:
        more = f"; {len(strangers)} of their {rows} names are no image's: {some(strangers)}" if strangers else ""
        none = f"; none for {some(without)}" if without else ""
        warnings.warn(
            f"labels are there for {len(paths) - len(without)} of {len(paths)} images{none}{more}.", stacklevel=5
        )
    return labels


def _spelled(name: str) -> str:
    """Return a path as it is compared: with forward slashes, letters with marks as one letter each."""
    return unicodedata.normalize("NFC", PurePath(name).as_posix())


def _spellings(name: str, root: Path, folder: Path | None) -> list[str]:
    """Return what an image of a table may be called below ``root``: as it is written, or from another folder."""
    written = [name, name.replace("\\", "/")] if "\\" in name else [name]  # by Windows
    spellings = [_spelled(one) for one in written]
    for base, one in itertools.product((folder, Path()), written):
        if base is not None and (base == folder or PurePath(one).is_absolute()):
            full = Path(os.path.abspath(base / one))  # noqa: PTH100  # links stay links
            if full.is_relative_to(os.path.abspath(root)):  # noqa: PTH100
                spellings.append(_spelled(str(full.relative_to(os.path.abspath(root)))))  # noqa: PTH100
    return spellings


def one_label(name: str, raw: Sequence[RawLabel], names: Sequence[str] | None) -> int | None:
    """Return the label of an image that has one, however often it is written.

    Args:
        name: What the image is called.
        raw: Its labels.
        names: Names of the model's labels, in order.

    Returns:
        The index, or None.

    Raises:
        ValueError: If there are two, or one is none of the model's.
    """
    indices = label_indices(raw, names)
    for label, index in zip(raw, indices, strict=True):
        if index != indices[0]:
            raise ValueError(
                f"labels must give each image one label, got {raw[0]!r} and {label!r} for {name!r}. Keep one row."
            )
    return indices[0]


def folder_labels(paths: Sequence[str], names: Sequence[str] | None) -> list[int | None]:
    """Return labels by the uppermost folder, or none where no folder is called like a label.

    Folders that the model knows by name count; so do, with a warning, numbers, and folders in alphabetical order (the
    ImageFolder layout) where there are as many as labels.

    Args:
        paths: Path of each image below the source's folder.
        names: Names of the model's labels, in order.

    Returns:
        An index or None for each.

    Warns:
        UserWarning: Some folders are none of the model's labels, or their labels are a guess.
    """
    tops = [PurePath(path).parts[0] if len(PurePath(path).parts) > 1 else None for path in paths]
    folders = sorted({top for top in tops if top is not None})
    labels = _labels_by_name(folders, names) or _labels_by_place(folders, names)
    found = [None if top is None else labels.get(top) for top in tops]
    unknown = [folder for folder in folders if folder not in labels]
    if labels and (unknown or None in tops):
        what = f"in folders that are no label of the model's, {some(unknown)}" if unknown else "in no folder"
        warnings.warn(f"labels are not known of {found.count(None)} of {len(found)} images, {what}.", stacklevel=5)
    return found


def _labels_by_name(folders: Sequence[str], names: Sequence[str] | None) -> dict[str, int]:
    """Return folders that are called like exactly one label."""
    places = _places_by_name(names)
    matches = {folder: places.get(_folded(folder), []) for folder in folders}
    return {folder: found[0] for folder, found in matches.items() if len(found) == 1}


def _labels_by_place(folders: Sequence[str], names: Sequence[str] | None) -> dict[str, int]:
    """Return folders that are numbers, or as many as labels, with a warning that this is a guess."""
    if all(folder.isdecimal() for folder in folders):
        labels, how = {folder: int(folder) for folder in folders}, "as the numbers of labels"
    else:
        labels, how = {folder: place for place, folder in enumerate(folders)}, "in alphabetical order"
        if names is not None and len(folders) != len(names):
            return {}
    if names is not None and any(label >= len(names) for label in labels.values()):
        return {}
    if labels and (names is not None or how == "in alphabetical order"):
        pairs = some([f"{folder} is {names[label] if names else label}" for folder, label in labels.items()])
        warnings.warn(f"folders are taken for true labels {how}: {pairs}. Give labels if this is wrong.", stacklevel=6)
    return labels


def some(names: Sequence[str]) -> str:
    """Return the first names, and how many there are besides.

    Args:
        names: The names.

    Returns:
        As text.

    Example:
        >>> some(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = len(names) - _NAMED
    return ", ".join(map(str, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def label_indices(raw: Sequence[RawLabel], names: Sequence[str] | None) -> list[int | None]:
    """Return labels as the model's indices.

    Args:
        raw: Indices or names, or None where unknown.
        names: Names of the model's labels, in order, or None where they are not known.

    Returns:
        An index or None for each.

    Raises:
        ValueError: If a label is none of the model's, or a name stands for several.

    Example:
        >>> label_indices(["dog", "1", None], ["cat", "dog"])
        [1, 1, None]
    """
    places = _places_by_name(names)
    for label in raw:
        if not isinstance(label, Hashable):  # several labels, or their probabilities
            raise ValueError(
                f"label must be one of the model's, got {label!r}. Give an index or a name for each image."
            )
    found = {label: _label_index(label, places, names) for label in set(raw)}
    return [found[label] for label in raw]


def _places_by_name(names: Sequence[str] | None) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names or ()):
        places.setdefault(_folded(name), []).append(place)
    return places


def _label_index(label: RawLabel, places: Mapping[str, list[int]], names: Sequence[str] | None) -> int | None:
    if label is None:
        return None
    # a number is an index, also where labels are called by numbers
    matches = places.get(_folded(label), []) if isinstance(label, str) else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(
            f"label must be one of the model's, got {label!r}, the name of labels {matches}. Give an index."
        )
    try:
        number = float(label)  # also "1.0", as a column with gaps is written
        index = int(number)
        if index != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        hint = nearest(_folded(str(label)), places) or " Give indices, or the names the model uses."
        raise ValueError(f"label must be one of the model's, got {label!r}.{hint}") from None
    if index < 0 or (names is not None and index >= len(names)):
        raise ValueError(f"label must be one of the model's {len(names or ())} labels from 0, got {label}.")
    return index


def _folded(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
