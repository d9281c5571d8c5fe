"""The layers that maps of the image's size are made of: those that a user names, or the main ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from captum_scoremap.checks import check_layers, unwrap_parallel
from captum_scoremap.linear import Subject, main_modules
from captum_scoremap.multiview import MultiView

__all__ = ["DefaultLayers", "named_layers"]


def named_layers(
    forward_func: Callable[..., Any], layers: nn.Module | Sequence[nn.Module] | None
) -> list[nn.Module] | None:
    """Return the layers that a user names, one or several, checked; None for none."""
    if layers is None:
        return None
    named = check_layers(forward_func, layers)
    if not named:
        raise ValueError("layers must name at least one module, got none. Leave it out for the default.")
    return named


class DefaultLayers:
    """The last main layer of each resolution of a model, found once for each size of the image and set of modules.

    Of a multi-view network those below the sliding layer count: above it, a position is a view, not a place.
    """

    def __init__(self) -> None:
        self._found: dict[torch.Size, dict[nn.Module, tuple[int, int]]] = {}
        self._modules: list[nn.Module] = []

    def __call__(self, subject: Subject) -> dict[nn.Module, tuple[int, int]]:
        """Return layers, finest first, to their rows and columns; the model runs once for each size of the image."""
        model, size = unwrap_parallel(subject.forward_func), subject.inputs[0].shape[1:]
        modules = list(model.modules()) if isinstance(model, nn.Module) else self._modules  # a function's are not known
        if modules != self._modules:  # some have been replaced
            self._found, self._modules = {}, modules
        if size not in self._found:
            if not isinstance(model, MultiView):
                self._found[size] = main_modules(replace(subject, forward_func=model))
            elif model.views == "ten-crop":  # the layers see every image twice, also mirrored
                self._found[size] = {}
            else:
                self._found[size] = main_modules(Subject(model.features, subject.inputs, rules=subject.rules))
        return self._found[size]
