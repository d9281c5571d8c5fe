"""The layers that maps of the image's size are made of: those that a user names, or the main ones."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from captum_scoremap.checks import as_tuple_of_arguments, check_layers, unwrap_parallel
from captum_scoremap.layout import Grid
from captum_scoremap.linear import Subject, main_modules
from captum_scoremap.multiview import MultiView
from captum_scoremap.scores import Target, is_function

__all__ = ["DefaultLayers", "named_layers"]

_Modules = list["weakref.ref[nn.Module]"]
# Of each size of the image, and kind of views: the modules there were, and which of them are the layers, with grids.
_Found = dict[tuple[torch.Size, str | None], tuple[_Modules, _Modules, list[Grid]]]
# Of each target that is a function, for heads have layers of their own, and of all labels together.
_OfTargets = WeakKeyDictionary[Any, _Found]
# Of each model, whichever methods explain it; a method that is made anew for each image looks no more than once.
_FOUND: WeakKeyDictionary[Any, _OfTargets] = WeakKeyDictionary()


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
    """The last main layer of each resolution of a model, found once for each size of the image and target function.

    Of a multi-view network those below the sliding layer count: above it, a position is a view, not a place.
    """

    def __init__(self) -> None:
        self._found: _OfTargets = WeakKeyDictionary()  # of what is not shared

    def __call__(self, subject: Subject, target: Target) -> dict[nn.Module, Grid]:
        """Return layers, as they run, to their rows and columns; the model runs if it is not known, or has changed."""
        model, size = unwrap_parallel(subject.forward_func), subject.inputs[0].shape[1:]
        known = self._known(subject, model, target)
        key = size, model.views if isinstance(model, MultiView) else None
        modules = list(model.modules()) if isinstance(model, nn.Module) else []  # a function's are not known
        before, references, grids = known.get(key, ([], [], []))
        layers = [layer for reference in references if (layer := reference()) is not None]
        are_there = key in known and len(layers) == len(grids)
        if are_there and [reference() for reference in before] == modules:  # none has been replaced
            return dict(zip(layers, grids, strict=True))
        found = _found_in(model, subject, target)
        known[key] = list(map(weakref.ref, modules)), list(map(weakref.ref, found)), list(found.values())
        return found

    def _known(self, subject: Subject, model: Callable[..., Any], target: Target) -> _Found:
        """Return what is known of a model and a target; what makes no weak key is remembered by the object, or not."""
        of_targets = self._found
        # others may have other rules, or arguments that lead another way
        if subject.rules is None and not as_tuple_of_arguments(subject.additional_forward_args):
            with suppress(TypeError):
                of_targets = _FOUND.setdefault(model, WeakKeyDictionary())
        try:
            return of_targets.setdefault(target if is_function(target) else DefaultLayers, {})
        except TypeError:
            return {}


def _found_in(model: Callable[..., Any], subject: Subject, target: Target) -> dict[nn.Module, Grid]:
    """Return what the run of a model tells."""
    if not isinstance(model, MultiView):
        return main_modules(replace(subject, forward_func=model), target)
    if model.views == "ten-crop":  # the layers see every image twice, also mirrored
        return {}
    return main_modules(Subject(model.features, subject.inputs, rules=subject.rules))
