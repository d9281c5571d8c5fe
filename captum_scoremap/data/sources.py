"""Where the images of an audit come from: a folder, a list, a torchvision data set, any data set.

Every source is a sequence of samples with a stable order, so that an interrupted audit can go on and several
workers can share it.
"""

import hashlib
import inspect
import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from captum_scoremap.checks import nearest
from captum_scoremap.data.files import find_pictures, printable, signatures
from captum_scoremap.data.labels import RawLabel, folder_labels, label_indices, one_label, some, table_labels
from captum_scoremap.data.pictures import UnreadableError, read_picture, to_rgb
from captum_scoremap.data.tables import column_of, read_rows

__all__ = ["DatasetSource", "FileSource", "Region", "Sample", "Source", "open_source"]

Region: TypeAlias = tuple[float, float, float, float] | Path
"""Where the object is: a box ``x0, y0, x1, y1`` in pixels of the image, or a picture white at the object."""

_PATH_COLUMNS = ("path", "file", "filename", "image", "name")
_LABEL_COLUMNS = ("label", "target", "class", "index")
_BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_SAMPLED = 16  # items of a data set that its fingerprint looks at


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
        """Return a short text that differs for sources that differ in names, labels or contents."""


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
        """Return a hash of names, labels, regions, and each file's size, time of change and sample of bytes."""
        rows = zip(map(self.name, range(len(self))), self.labels, map(str, self.regions), strict=True)
        files = signatures(map(self.path, range(len(self))))
        masks = signatures(self.root / region for region in self.regions if isinstance(region, Path))
        return hashlib.sha256(json.dumps([list(rows), files, masks]).encode()).hexdigest()[:16]


class DatasetSource(Source):
    """Any ``torch.utils.data.Dataset`` with a length; its items are images or pairs ``(image, label)``.

    Args:
        dataset: The data set. Pictures are preprocessed for the model; tensors ``(C, H, W)`` are inputs as
            they are. A label is an index of the model's, or a name; None and negative ones are not known.
        title: What a report calls the source.
        names: Names of the model's labels, in order.

    Raises:
        TypeError: If the data set has no length or no items by position.
    """

    threads_safe = False

    def __init__(self, dataset: Dataset[Any], title: str | None = None, names: Sequence[str] | None = None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "source must be a data set with a length and items by position, got "
                f"{type(dataset).__name__}. Copy a stream to a list first."
            )
        self.dataset = dataset
        self.title = title or type(dataset).__name__
        self.names = names

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
            image, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else (item, None)
            if isinstance(image, (tuple, list)):
                image = image[0]
            if isinstance(image, Image.Image):
                image.load()  # where the data set opens files without reading them
                image = to_rgb(image)
        except Exception as error:
            raise UnreadableError(f"the data set raised {type(error).__name__}: {error}") from error
        if isinstance(image, Tensor):
            if image.dim() != 3 or not image.is_floating_point():
                raise UnreadableError(f"a tensor {tuple(image.shape)} of {image.dtype}, not (C, H, W) floating point")
        elif not isinstance(image, Image.Image):
            raise UnreadableError(
                f"{type(image).__name__} is neither a picture nor a tensor; an item must be one, or (image, label)"
            )
        return Sample(image, None if label is None else _index_of(label, self.names))

    def fingerprint(self) -> str:
        """Return kind, length and a sample of the items: not all of a data set can be read to compare it.

        Returns:
            A short text.

        Warns:
            UserWarning: The items differ each time they are read.
        """
        count = min(_SAMPLED, len(self))
        places = [place * len(self) // count for place in range(count)]
        first, second = ([self._digest(place) for place in places] for _ in range(2))
        kind = f"{type(self.dataset).__qualname__}:{len(self)}"
        if first != second:
            warnings.warn(
                "source must give the same item each time to be compared, got items that differ (random augmentation?)."
                " Results are of one draw, and resume cannot tell whether the data changed.",
                stacklevel=2,
            )
            return f"{kind}:random"
        return f"{kind}:{hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16]}"

    def _digest(self, index: int) -> str:
        try:
            sample = self.read(index)
        except UnreadableError:
            return "unreadable"
        if isinstance(sample.image, Tensor):
            image = sample.image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            image = sample.image.tobytes()
        return hashlib.sha256(f"{sample.label}".encode() + image).hexdigest()


def _index_of(label: Any, names: Sequence[str] | None) -> int:
    """Return a label of a data set as an index."""
    try:
        index = label_indices([label], names)[0] if isinstance(label, str) else int(label)
    except (TypeError, ValueError) as error:
        raise UnreadableError(f"a label that is no index, {label!r}") from error
    if index is None or (index != label and not isinstance(label, str)):
        raise UnreadableError(f"a label that is no index, {label!r}")
    return index


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
    if isinstance(source, (str, os.PathLike)) and not str(source).startswith("torchvision:"):
        path = Path(source).expanduser()
        if path.is_dir():
            return _folder_source(path, labels, names)
        if not path.exists():
            raise ValueError(f"source must be a folder or a list of images, got {str(source)!r}, which does not exist.")
        if labels is not None:
            raise ValueError("labels must be a column of the list when source is a list. Leave labels out.")
        return _list_source(path, names)
    if labels is not None:
        raise ValueError("labels must be left out when source is a data set. Let its items be (image, label).")
    if isinstance(source, Source):
        return source
    if isinstance(source, str):
        return _torchvision_source(source)
    if hasattr(source, "__getitem__"):
        return DatasetSource(cast("Dataset[Any]", source), names=names)
    raise TypeError(f"source must be a folder, a list, or a data set, got {type(source).__name__}.")


def _folder_source(
    root: Path, labels: "str | os.PathLike[str] | Mapping[str, int | str] | None", names: Sequence[str] | None
) -> FileSource:
    found, passed = find_pictures(root)
    if passed:
        warnings.warn(f"source has folders that were passed over: {some(passed)}.", stacklevel=4)
    if not found:
        raise ValueError(f"source must hold images, got the folder {root.name!r} without any.")
    if labels is None:
        return FileSource(root, found, folder_labels(found, names))
    if isinstance(labels, Mapping):
        return FileSource(root, found, table_labels(found, labels.items(), names, root))
    if not isinstance(labels, (str, os.PathLike)):
        raise TypeError(
            f"labels must be a list, .csv or .parquet, or a mapping from path to label, got {type(labels).__name__}."
        )
    path = Path(labels).expanduser()
    return FileSource(root, found, table_labels(found, _read_label_table(path), names, root, path.parent))


def _list_source(path: Path, names: Sequence[str] | None) -> FileSource:
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"source must hold images, got the list {path.name!r} without a row.")
    # abspath keeps symbolic links, whose targets may lie anywhere.
    absolute = [Path(os.path.abspath(_below(path.parent, name))) for name in _image_names(rows, path)]  # noqa: PTH100
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    paths = [str(file.relative_to(root)) for file in absolute]
    label = next((name for name in _LABEL_COLUMNS if name in rows[0]), None)
    raw = [row[label] if label else None for row in rows]
    given: dict[str, list[RawLabel]] = {}
    for image, one in zip(paths, raw, strict=True):
        given.setdefault(image, []).append(one)
    for image, several in given.items():
        if len(several) > 1:
            one_label(image, several, names)
    return FileSource(
        root,
        paths,
        label_indices(raw, names),
        [_region_of(row, number, path) for number, row in enumerate(rows, 1)],
        title=printable(path.name),
    )


def _read_label_table(path: Path) -> list[tuple[str, RawLabel]]:
    if not path.is_file():
        raise ValueError(f"labels must be a list, .csv or .parquet, got {str(path)!r}, which is no file.")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"labels must hold a row for each image, got the list {path.name!r} without a row.")
    images, label = _image_names(rows, path), column_of(rows, _LABEL_COLUMNS, path)
    return [(image, row[label]) for image, row in zip(images, rows, strict=True)]


def _image_names(rows: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    """Return what the rows of a list call their images.

    Raises:
        ValueError: If a row does not say.
    """
    column = column_of(rows, _PATH_COLUMNS, path)
    for number, row in enumerate(rows, 1):
        if row[column] is None:
            raise ValueError(f"{path.name} must name an image in every row, got none in row {number}. Delete the row.")
    return [str(row[column]) for row in rows]


def _below(folder: Path, name: str) -> Path:
    """Return a file of a list, which may have been written on Windows."""
    path = folder / name
    return path if "\\" not in name or path.exists() else folder / name.replace("\\", "/")


def _region_of(row: Mapping[str, Any], number: int, path: Path) -> Region | None:
    if row.get("mask"):
        return _below(path.parent, str(row["mask"]))
    values = [row.get(column) for column in _BOX_COLUMNS]
    if all(value is None for value in values):
        return None
    try:
        x0, y0, x1, y1 = (float(value) for value in values)  # type: ignore[arg-type]  # None raises
    except (TypeError, ValueError):
        x0 = y0 = x1 = y1 = math.nan
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError(
            f"{path.name} must give a box as four numbers, {', '.join(_BOX_COLUMNS)}, or leave them empty, "
            f"got {', '.join(map(str, values))} in row {number}."
        )
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
