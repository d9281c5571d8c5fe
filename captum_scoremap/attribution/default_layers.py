"""The layers that maps of the image's size are made of: those that a user names, or the main ones."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from captum_scoremap.checks import check_layers, unwrap_parallel
from captum_scoremap.layout import Grid
from captum_scoremap.linear import Subject, main_modules
from captum_scoremap.multiview import MultiView

__all__ = ["DefaultLayers", "named_layers"]

# Of each size of the image, and kind of views: the modules there were, and which of them are the layers.
_Found = dict[tuple[torch.Size, str | None], tuple[list["weakref.ref[nn.Module]"], WeakKeyDictionary[nn.Module, Grid]]]
# Of each model, whichever methods explain it; a method that is made anew for each image looks no more than once.
_FOUND: WeakKeyDictionary[Any, _Found] = WeakKeyDictionary()


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
        self._found: _Found = {}  # by rules of the user's, or of what cannot be told again

    def __call__(self, subject: Subject) -> dict[nn.Module, Grid]:
        """Return layers, finest first, to their rows and columns; the model runs once for each size of the image."""
        model, size = unwrap_parallel(subject.forward_func), subject.inputs[0].shape[1:]
        known = self._found if subject.rules is not None else self._shared(model)
        key = size, model.views if isinstance(model, MultiView) else None
        modules = list(model.modules()) if isinstance(model, nn.Module) else []  # a function's are not known
        if key not in known or [reference() for reference in known[key][0]] != modules:  # some have been replaced
            found = WeakKeyDictionary(_found_in(model, subject))
            known[key] = [weakref.ref(module) for module in modules], found
        return dict(known[key][1])

    def _shared(self, model: Callable[..., Any]) -> _Found:
        """Return what is known of a model."""
        try:
            return _FOUND.setdefault(model, {})
        except TypeError:  # a callable of the user's without a hash
            return self._found


def _found_in(model: Callable[..., Any], subject: Subject) -> dict[nn.Module, Grid]:
    """Return what the run of a model tells."""
    if not isinstance(model, MultiView):
        return main_modules(replace(subject, forward_func=model))
    if model.views == "ten-crop":  # the layers see every image twice, also mirrored
        return {}
    return main_modules(Subject(model.features, subject.inputs, rules=subject.rules))
