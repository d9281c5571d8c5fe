"""Where the images of an audit come from: a folder, a list, a torchvision data set, any data set.

Every source is a sequence of samples with a stable order, so that an interrupted audit can go on and several
workers can share it.
"""

import csv
import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from captum_scoremap.checks import nearest
from captum_scoremap.data.extras import import_extra
from captum_scoremap.data.pictures import UnreadableError, is_picture_name, read_picture

__all__ = ["DatasetSource", "FileSource", "Region", "Sample", "Source", "open_source"]

Region: TypeAlias = tuple[float, float, float, float] | Path
"""Where the object is: a box ``x0, y0, x1, y1`` in pixels of the image, or a picture white at the object."""

_PATH_COLUMNS = ("path", "file", "filename", "image", "name")
_LABEL_COLUMNS = ("label", "target", "class", "index")
_BOX_COLUMNS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Sample:
    """One image as it was read.

    Attributes:
        image: An RGB picture, still to be preprocessed, or a tensor ``(C, H, W)`` that is the model's input
            as it is.
        label: Index of the true label among the model's, or None where it is not known.
        region: Picture of the same size that is white where the object is, or None.
    """

    image: Image.Image | Tensor
    label: int | None
    region: Image.Image | None = None


class Source(ABC):
    """Images in a stable order.

    Attributes:
        title: What a report calls the source.
        threads_safe: Whether several threads may read at once.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
        >>> source = open_source(data)
        >>> len(source), source.read(1).label
        (2, 1)
    """

    title: str
    threads_safe: bool

    @abstractmethod
    def __len__(self) -> int:
        """Return how many images there are, readable or not."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what the image is called in results and report: never a path of this machine."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Read one image.

        Args:
            index: Its position.

        Returns:
            The image with what is known about it.

        Raises:
            UnreadableError: If that is not possible.
        """

    def path(self, index: int) -> Path | None:
        """Return the file of an image, or None where it has none."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short text that differs for sources that differ in names or labels."""


class FileSource(Source):
    """Picture files, with labels and regions where these are known.

    Args:
        root: Folder that the paths are relative to.
        paths: Path of each picture below ``root``.
        labels: Index of each label, or None.
        regions: Box or mask file of each picture, or None.
        title: What a report calls the source.
    """

    threads_safe = True

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int | None],
        regions: Sequence[Region | None] | None = None,
        title: str | None = None,
    ) -> None:
        self.root = root
        self.paths = tuple(paths)
        self.labels = tuple(labels)
        self.regions = tuple(regions) if regions is not None else (None,) * len(self.paths)
        self.title = title or printable(root.name)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path below the source's folder, with forward slashes."""
        return printable(Path(self.paths[index]).as_posix())

    def path(self, index: int) -> Path:
        """Return the picture's file."""
        return self.root / self.paths[index]

    def read(self, index: int) -> Sample:
        """Decode one picture, and its region where it has one.

        Args:
            index: Its position.

        Returns:
            Picture, label and region.

        Raises:
            UnreadableError: If the file is missing, empty, damaged, too large or no picture.
        """
        image = read_picture(self.path(index))
        return Sample(image, self.labels[index], _region_picture(self.regions[index], self.root, image.size))

    def fingerprint(self) -> str:
        """Hash of all names, labels and regions."""
        rows = zip(map(self.name, range(len(self))), self.labels, map(str, self.regions), strict=True)
        return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:16]


class DatasetSource(Source):
    """Any ``torch.utils.data.Dataset`` with a length; its items are images or pairs ``(image, label)``.

    Args:
        dataset: The data set. Pictures are preprocessed for the model; tensors ``(C, H, W)`` are inputs as
            they are.
        title: What a report calls the source.

    Raises:
        TypeError: If the data set has no length or no items by position.
    """

    threads_safe = False

    def __init__(self, dataset: Dataset[Any], title: str | None = None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "source must be a data set with a length and items by position, got "
                f"{type(dataset).__name__}. Copy a stream to a list first."
            )
        self.dataset = dataset
        self.title = title or type(dataset).__name__

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Return the position, padded so that names sort."""
        return f"{index:0{len(str(max(len(self) - 1, 0)))}d}"

    def read(self, index: int) -> Sample:
        """Take one item; whatever goes wrong in the user's code is the reason.

        Args:
            index: Its position.

        Returns:
            Image and label.

        Raises:
            UnreadableError: If the data set raises, or the item is no image.
        """
        try:
            item = self.dataset[index]
        except Exception as error:
            raise UnreadableError(f"the data set raised {type(error).__name__}: {error}") from error
        image, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else (item, None)
        if isinstance(image, (tuple, list)):
            image = image[0]
        if isinstance(image, Tensor):
            if image.dim() != 3 or not image.is_floating_point():
                raise UnreadableError(f"a tensor {tuple(image.shape)} of {image.dtype}, not (C, H, W) floating point")
        elif isinstance(image, Image.Image):
            image = image.convert("RGB")
        else:
            raise UnreadableError(f"{type(image).__name__} is neither a picture nor a tensor")
        return Sample(image, None if label is None else int(label))

    def fingerprint(self) -> str:
        """Kind and length: items of a data set cannot be compared without reading them all."""
        return f"{type(self.dataset).__qualname__}:{len(self)}"


def open_source(
    source: "str | os.PathLike[str] | Dataset[Any] | Source",
    labels: "str | os.PathLike[str] | Mapping[str, int | str] | None" = None,
    names: Sequence[str] | None = None,
) -> Source:
    """Make a source of whatever names one.

    A folder is searched to any depth; its uppermost folders are the labels where their names are (or are as
    many as the model has labels, in alphabetical order, the ImageFolder layout). A list is a ``.csv`` or
    ``.parquet`` file with a column ``path`` (or ``file``, ``filename``, ``image``, ``name``), relative to the
    list's folder, and where known ``label`` (an index or a name), ``x0, y0, x1, y1`` (a box in pixels) or
    ``mask`` (a picture, white at the object).

    Args:
        source: A folder, a list, ``torchvision:NAME[/SPLIT]:ROOT``, or a data set.
        labels: For a folder: a list as above that names the labels, or a mapping from path to label.
        names: Names of the model's labels, in order.

    Returns:
        The source.

    Raises:
        ValueError: If there is nothing to audit there, or a label is not the model's.
        TypeError: If ``source`` is of another kind.

    Example:
        >>> import torch
        >>> dataset = torch.utils.data.TensorDataset(torch.zeros(3, 1, 8, 8), torch.arange(3))
        >>> source = open_source(dataset)
        >>> len(source), source.name(2), source.read(2).label
        (3, '2', 2)
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, str) and source.startswith("torchvision:"):
        return _torchvision_source(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if path.is_dir():
            return _folder_source(path, labels, names)
        if not path.exists():
            raise ValueError(f"source must be a folder or a list of images, got {str(source)!r}, which does not exist.")
        if labels is not None:
            raise ValueError("labels must be a column of the list when source is a list. Leave labels out.")
        return _list_source(path, names)
    if hasattr(source, "__getitem__"):
        return DatasetSource(source)
    raise TypeError(f"source must be a folder, a list, or a data set, got {type(source).__name__}.")


def printable(name: str) -> str:
    """Return the name as valid Unicode: bytes of a file name that are none are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folder_source(
    root: Path, labels: "str | os.PathLike[str] | Mapping[str, int | str] | None", names: Sequence[str] | None
) -> FileSource:
    found: list[str] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        below = Path(folder).relative_to(root)
        found += [str(below / file) for file in files if is_picture_name(file) and not file.startswith(".")]
    found.sort()
    if not found:
        raise ValueError(f"source must hold images, got the folder {root.name!r} without any.")
    if labels is None:
        return FileSource(root, found, _folder_labels(found, names))
    table = labels if isinstance(labels, Mapping) else _read_label_table(Path(labels))
    raw = [table.get(Path(path).as_posix(), table.get(Path(path).name)) for path in found]
    if all(label is None for label in raw):
        raise ValueError(
            f"labels must name images of the source, got {len(table)} names of which none is there, "
            f"such as {next(iter(table), '')!r}; the source has {Path(found[0]).as_posix()!r}."
        )
    return FileSource(root, found, label_indices(raw, names))


def _folder_labels(paths: Sequence[str], names: Sequence[str] | None) -> list[int | None]:
    """Labels by the uppermost folder, or none where the folders do not look like labels."""
    tops = [Path(path).parts[0] if len(Path(path).parts) > 1 else None for path in paths]
    folders = sorted({top for top in tops if top is not None})
    if not folders:
        return [None] * len(paths)
    try:
        by_name: dict[str, int | None] = dict(zip(folders, label_indices(folders, names), strict=True))
    except ValueError:
        if names is not None and len(folders) != len(names):
            return [None] * len(paths)
        by_name = {folder: position for position, folder in enumerate(folders)}
    return [by_name[top] if top is not None else None for top in tops]


def _list_source(path: Path, names: Sequence[str] | None) -> FileSource:
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"source must hold images, got the list {path.name!r} without a row.")
    column = _column(rows[0], _PATH_COLUMNS, path)
    # abspath keeps symbolic links, whose targets may lie anywhere.
    absolute = [Path(os.path.abspath(path.parent / str(row[column]))) for row in rows]  # noqa: PTH100
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    label = next((name for name in _LABEL_COLUMNS if name in rows[0]), None)
    return FileSource(
        root,
        [str(file.relative_to(root)) for file in absolute],
        label_indices([row[label] for row in rows] if label else [None] * len(rows), names),
        [_region_of(row, path.parent) for row in rows],
        title=printable(path.name),
    )


def _read_label_table(path: Path) -> dict[str, int | str | None]:
    if not path.is_file():
        raise ValueError(f"labels must be a list, .csv or .parquet, got {str(path)!r}, which is no file.")
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"labels must hold a row for each image, got the list {path.name!r} without a row.")
    image, label = _column(rows[0], _PATH_COLUMNS, path), _column(rows[0], _LABEL_COLUMNS, path)
    return {Path(str(row[image])).as_posix(): row[label] for row in rows}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        parquet = import_extra("pyarrow.parquet", "audit")
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    if path.suffix.lower() != ".csv":
        raise ValueError(f"a list must be a .csv or .parquet file, got {path.name!r}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [{key: value or None for key, value in row.items() if key} for row in csv.DictReader(file)]
    except UnicodeDecodeError as error:
        raise ValueError(f"a list must be UTF-8, got {path.name!r}: {error}. Save it as UTF-8.") from error


def _column(row: Mapping[str, object], known: Sequence[str], path: Path) -> str:
    found = next((name for name in known if name in row), None)
    if found is None:
        raise ValueError(f"{path.name} must have a column {' or '.join(known)}, got {', '.join(row)}. Rename one.")
    return found


def _region_of(row: Mapping[str, Any], folder: Path) -> Region | None:
    if row.get("mask"):
        return folder / str(row["mask"])
    values = [row.get(column) for column in _BOX_COLUMNS]
    if any(value is None for value in values):
        return None
    x0, y0, x1, y1 = (float(value) for value in values if value is not None)
    return x0, y0, x1, y1


def _region_picture(region: Region | None, root: Path, size: tuple[int, int]) -> Image.Image | None:
    """A region as a picture of the image's size: it takes the image's way through preprocessing."""
    if region is None:
        return None
    if isinstance(region, Path):
        mask = read_picture(root / region)
        if mask.size != size:
            raise UnreadableError(f"its mask has {mask.size[0]} x {mask.size[1]} pixels, not {size[0]} x {size[1]}")
        return mask
    picture = Image.new("RGB", size)
    x0, y0, x1, y1 = region
    if x1 <= x0 or y1 <= y0:
        raise UnreadableError(f"its box {region} is empty")
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill="white")
    return picture


def _torchvision_source(text: str) -> DatasetSource:
    """Open ``torchvision:NAME[/SPLIT]:ROOT``; nothing is downloaded."""
    import torchvision.datasets

    _, _, rest = text.partition(":")
    head, _, root = rest.partition(":")
    name, _, split = head.partition("/")
    split = split or "test"
    kind = getattr(torchvision.datasets, name, None)
    if kind is None or not isinstance(kind, type) or not root:
        raise ValueError(
            f"source must be torchvision:NAME[/SPLIT]:ROOT, got {text!r}."
            f"{nearest(name, torchvision.datasets.__all__)} For instance torchvision:CIFAR10/test:data."
        )
    parameters = inspect.signature(kind).parameters
    choice: dict[str, Any] = {"root": str(Path(root).expanduser())}
    if "train" in parameters:
        choice["train"] = split == "train"
    for parameter in ("split", "image_set"):
        if parameter in parameters:
            choice[parameter] = split
    if "download" in parameters:
        choice["download"] = False
    try:
        dataset = kind(**choice)
    except TypeError as error:
        raise ValueError(
            f"source must be a data set that is opened by its folder alone, got {text!r}: {error}. "
            "Open it in Python and hand it to captum_scoremap.audit.audit()."
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"source must be a data set that is there, got {text!r}: {error}") from error
    return DatasetSource(dataset, title=f"torchvision {name} ({split})")


def label_indices(raw: Sequence[int | str | None], names: Sequence[str] | None) -> list[int | None]:
    """Labels as the model's indices.

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
    by_name: dict[str, list[int]] = {}
    for position, name in enumerate(names or ()):
        by_name.setdefault(_folded(name), []).append(position)
    found = {label: _label_index(label, by_name, names) for label in set(raw)}
    return [found[label] for label in raw]


def _label_index(label: int | str | None, by_name: Mapping[str, list[int]], names: Sequence[str] | None) -> int | None:
    if label is None:
        return None
    matches = by_name.get(_folded(str(label)), [])
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(
            f"label must be one of the model's, got {label!r}, the name of labels {matches}. Give an index."
        )
    try:
        index = int(label)
    except ValueError:
        hint = nearest(_folded(str(label)), by_name) or " Give indices, or the names the model uses."
        raise ValueError(f"label must be one of the model's, got {label!r}.{hint}") from None
    if index < 0 or (names is not None and index >= len(names)):
        raise ValueError(f"label must be one of the model's {len(names or ())} labels from 0, got {index}.")
    return index


def _folded(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
