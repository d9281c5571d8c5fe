"""The layers that maps of the image's size are made of, where the user names none."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.linear import main_modules
from captum_scoremap.multiview import MultiView
from captum_scoremap.rules import Rule

__all__ = ["MainLayers"]


class MainLayers:
    """The last main layer of each resolution of a model, found once for each size of the image.

    Of a multi-view network those below the sliding layer count: above it, a position is a view, not a place.

    Args:
        rules: Operation to rule, to replace or add some.
    """

    def __init__(self, rules: Mapping[Any, Rule] | None = None) -> None:
        self._rules = rules
        self._found: dict[torch.Size, dict[nn.Module, tuple[int, int]]] = {}

    def __call__(
        self, forward_func: Callable[..., Any], image: Tensor, additional: tuple[Any, ...]
    ) -> dict[nn.Module, tuple[int, int]]:
        """Return the layers, finest first; the model runs once more where the size of the image is a new one.

        Args:
            forward_func: The model, or a function that calls it.
            image: (N, C, H, W).
            additional: Additional arguments.

        Returns:
            Modules that return maps, to their rows and columns; empty if there are none.
        """
        size = image.shape[1:]
        if size not in self._found:
            if not isinstance(forward_func, MultiView):
                self._found[size] = main_modules(forward_func, image, additional, rules=self._rules)
            elif forward_func.views == "ten-crop":  # the layers see every image twice, also mirrored
                self._found[size] = {}
            else:
                self._found[size] = main_modules(forward_func.features, image, rules=self._rules)
        return self._found[size]
