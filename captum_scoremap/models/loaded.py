"""A classifier with what is needed to use it on an image, and what every loader does."""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captum_scoremap.checks import nearest
from captum_scoremap.models.preprocessing import Preprocessing

__all__ = ["LoadedModel", "readable_download", "seeded"]


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A classifier and what is needed to use it on an image.

    Attributes:
        name: How it was asked for, for titles and messages.
        module: The network, in eval mode.
        preprocessing: PIL image in, tensor (C, H, W) out.
        labels: Names of the labels, in the order of the scores; empty where they are unknown.

    Example:
        >>> LoadedModel("two", nn.Identity(), labels=("cat", "dog")).label_name(1)
        'dog'
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: tuple[str, ...] = ()

    def __repr__(self) -> str:
        known = f"{len(self.labels)} labels" if self.labels else "labels without names"
        return f"LoadedModel({self.name!r}: {type(self.module).__name__}, {known}, images of {self._side} pixels)"

    @property
    def _side(self) -> int | tuple[int, int]:
        """Pixels along a side of the images that the network takes."""
        return self.preprocessing.crop or self.preprocessing.resize

    def _repr_html_(self) -> str:
        first = ", ".join(self.labels[:3]) + (", ..." if len(self.labels) > 3 else "")
        rows = {
            "model": f"{self.name} ({type(self.module).__name__})",
            "parameters": f"{sum(one.numel() for one in self.module.parameters()):,}",
            "images": f"{self._side} x {self._side} pixels",
            "labels": f"{len(self.labels)}: {first}" if self.labels else "without names",
        }
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{cells}</table>"

    def example(self) -> Tensor:
        """Return an image of noise, as the network takes it.

        Returns:
            (1, C, H, W), float32, on the CPU.

        Example:
            >>> LoadedModel("any", nn.Identity()).example().shape
            torch.Size([1, 3, 224, 224])
        """
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        return self.preprocessing(Image.fromarray(noise))[None]

    def check_labels(self, count: int) -> None:
        """Raise unless there is a name for each score, or none for any.

        Args:
            count: Scores that the network gives an image.

        Raises:
            ValueError: There are names, of another number.

        Example:
            >>> LoadedModel("two", nn.Identity(), labels=("cat", "dog")).check_labels(2)
        """
        if self.labels and len(self.labels) != count:
            raise ValueError(
                f"labels of {self.name} must be as many as its scores, got {len(self.labels)} names for {count} "
                "scores. Return a LoadedModel with a name for each, or without names."
            )

    def label_name(self, index: int) -> str:
        """Return the name of a label, or ``"label 7"`` where names are not known."""
        return self.labels[index] if index < len(self.labels) else f"label {index}"

    def label_index(self, label: str) -> int:
        """Return the place of a label among the scores.

        Args:
            label: Its name, in any case; or its index in digits, where no label is called by them.

        Returns:
            The index.

        Raises:
            ValueError: No label, or more than one, has this name.

        Example:
            >>> LoadedModel("two", nn.Identity(), labels=("cat", "dog")).label_index("Dog")
            1
        """
        matches = [index for index, name in enumerate(self.labels) if name.casefold() == label.casefold()]
        if len(matches) > 1:
            raise ValueError(f"label must be unique, got {label!r}, the name of {matches}. Use the index.")
        if matches:
            return matches[0]
        if label.isdecimal():
            index = int(label)
            if self.labels and index >= len(self.labels):
                raise ValueError(f"label must be less than {len(self.labels)}, got {index}.")
            return index
        if not self.labels:
            raise ValueError(f"label must be an index, as the label names of {self.name} are not known; got {label!r}.")
        raise ValueError(f"label must be one of {self.name}'s, got {label!r}.{nearest(label, self.labels)}")


@contextmanager
def seeded() -> Iterator[None]:
    """Random weights that are the same in every run, without touching the user's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def readable_download(name: str, instead: str = "none or a file") -> Iterator[None]:
    """Say what to do where the weights of a zoo cannot be fetched."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"weights of {name} must be on the network or in the cache, got {reason.rstrip('.')}. Use {instead}."
        ) from error
