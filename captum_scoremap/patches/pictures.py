"""Images for a network: read, preprocessed and batched; and patches cut from the originals."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from captum_scoremap.data.ahead import map_ahead
from captum_scoremap.data.pictures import UnreadableError, misfit, read_image
from captum_scoremap.patches.geometry import Box, Geometry, geometry

__all__ = ["Example", "Picture", "Preprocess", "Unreadable", "batches", "examples"]

Picture: TypeAlias = Tensor | Image.Image | str | os.PathLike[str]
Preprocess: TypeAlias = Callable[[Image.Image], Tensor]
Unreadable: TypeAlias = Callable[[Path, ValueError], object]

_END: Any = object()


@dataclass(frozen=True, eq=False)
class Example:
    """One image.

    Attributes:
        name: Position in the sequence, or path.
        original: As it was before preprocessing.
        inputs: What the network takes, (C, H, W).
        target: Its label, where one was given.
        geometry: Where pixels of ``inputs`` lie in ``original``; None where they are the same.
    """

    name: int | Path
    original: Tensor | Image.Image
    inputs: Tensor
    target: int | None
    geometry: Geometry | None = None

    def cut(self, box: Box) -> tuple[Box, Tensor]:
        """Cut a box of the network's input out of the original.

        Args:
            box: ``x0, y0, x1, y1`` in pixels of the input.

        Returns:
            The box in pixels of the original, and these pixels, (C, H, W), in memory of their own.
        """
        if isinstance(self.original, Tensor):
            x0, y0, x1, y1 = box
            return box, self.original[:, y0:y1, x0:x1].detach().cpu().clone()
        if self.geometry is not None:
            box = self.geometry.to_original(box)
        return box, pil_to_tensor(self.original.crop(box))


def examples(
    images: Iterable[Picture],
    targets: int | Iterable[int | None] | None,
    preprocess: Preprocess | None,
    on_unreadable: Unreadable | None,
    ahead: int = 1,
) -> Iterator[Example]:
    """Read and preprocess one image after another, the next ones in a thread while the caller computes.

    Args:
        images: Paths, PIL images, or tensors (C, H, W) as the network takes them.
        targets: Label of all images, or one for each, or None.
        preprocess: From a PIL image to a tensor (C, H, W).
        on_unreadable: Called with path and reason of a file that is no image, which is then left out; None to
            raise.
        ahead: How many images may be read before they are needed.

    Yields:
        What could be read.

    Raises:
        TypeError: An image is of no such kind.
        ValueError: A file cannot be read, a tensor has another shape, targets are too few or too many, or
            ``preprocess`` is missing or moves pixels in other ways than `geometry` knows.
    """
    geometries: dict[tuple[tuple[int, int], str], Geometry] = {}

    def read(item: tuple[int, Picture, int | None]) -> Example | tuple[Path, ValueError]:
        number, picture, target = item
        if isinstance(picture, Tensor):
            return Example(number, _checked(picture), picture, target)
        name = number if isinstance(picture, Image.Image) else _path(picture)
        if preprocess is None:
            raise ValueError(
                "preprocess must be given for files and PIL images, got None. "
                "Pass a function from a PIL image to a tensor (C, H, W)."
            )
        try:
            image = picture if isinstance(picture, Image.Image) else read_image(_path(picture))
        except ValueError as error:
            return _path(picture), error
        key = (image.size, image.mode)
        try:
            if key not in geometries:
                geometries[key] = geometry(preprocess, image)
            return Example(name, image, preprocess(image), target, geometries[key])
        except UnreadableError as error:
            if isinstance(picture, Image.Image):
                raise
            return _path(picture), misfit(picture, error)

    with closing(map_ahead(read, _labeled(images, targets), ahead)) as found:
        for example in found:
            if isinstance(example, Example):
                yield example
            elif on_unreadable is None:
                raise example[1]
            else:
                on_unreadable(*example)


def _labeled(
    images: Iterable[Picture], targets: int | Iterable[int | None] | None
) -> Iterator[tuple[int, Picture, int | None]]:
    """Give each image its position and its label.

    Yields:
        The three.

    Raises:
        ValueError: Labels are too few or too many.
    """
    labels = iter(targets) if isinstance(targets, Iterable) else repeat(targets)
    number = 0
    for number, picture in enumerate(images, start=1):
        label = next(labels, _END)
        if label is _END:
            raise ValueError(f"targets must be one label for each image, got {number - 1}, and more images.")
        yield number - 1, picture, None if label is None else int(label)
    if isinstance(targets, Iterable) and next(labels, _END) is not _END:
        raise ValueError(f"targets must be one label for each of the {number} images, got more.")


def _path(picture: Any) -> Path:
    if not isinstance(picture, (str, os.PathLike)):
        kind = type(picture).__name__
        raise TypeError(f"an image must be a path, a PIL image or a tensor (C, H, W), got {kind}.")
    return Path(picture)


def _checked(image: Tensor) -> Tensor:
    if image.ndim != 3:
        raise ValueError(f"an image must be a tensor (C, H, W), got {tuple(image.shape)}. Pass single ones.")
    return image


def batches(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Group images of one size that follow one another.

    Args:
        examples: The images.
        batch_size: How many at most.

    Yields:
        Groups in the order of the images.
    """
    batch: list[Example] = []
    for example in examples:
        if len(batch) == batch_size or (batch and example.inputs.shape != batch[0].inputs.shape):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
