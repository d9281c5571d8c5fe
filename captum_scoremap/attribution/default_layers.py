"""The layers that maps of the image's size are made of: those that a user names, or the main ones."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from captum_scoremap.checks import as_tuple_of_arguments, check_layers, unwrap_parallel
from captum_scoremap.layout import Grid
from captum_scoremap.linear import Subject, main_modules
from captum_scoremap.multiview import MultiView
from captum_scoremap.scores import Target, is_function
from captum_scoremap.tape import Route

__all__ = ["DefaultLayers", "named_layers"]

T = TypeVar("T")
Layers = dict[nn.Module, Grid]
_Modules = list["weakref.ref[nn.Module]"]
# The layers that were found, for each route through a model that images took, the latest last.
_Routes = dict[Route, tuple[_Modules, list[Grid]]]
# Of each size of the image, and kind of views: the modules there were, and the layers.
_Found = dict[tuple[torch.Size, str | None], tuple[_Modules, _Routes]]
# Of each target that is a function, for heads have layers of their own, and of all labels together.
_OfTargets = WeakKeyDictionary[Any, _Found]
# Of each model, whichever methods explain it; a method that is made anew for each image looks no more than once.
_FOUND: WeakKeyDictionary[Any, _OfTargets] = WeakKeyDictionary()
_MOST_ROUTES = 100  # that are remembered of a model


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


class _OtherRouteError(Exception):
    """The image takes another route through the model than the one for which layers were found."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route


class DefaultLayers:
    """The last main layer of each resolution of a model, found once for each size of the image and target function.

    A model that branches, as one with early exits, has layers for each route that an image takes through it. Of a
    multi-view network those below the sliding layer count: above it, a position is a view, not a place.
    """

    def __init__(self) -> None:
        self._found: _OfTargets = WeakKeyDictionary()  # of what is not shared

    def __reduce__(self) -> Any:
        """Leave out of pickles and copies what was found: weak references to modules that are not theirs."""
        return DefaultLayers, ()

    def explained(self, subject: Subject, target: Target, explain: Callable[[Subject, Layers], T]) -> T:
        """Return what is explained of a subject at its layers, which are given as they run, to rows and columns.

        The model runs once more where the layers are not known yet: at the first image, where modules have been
        replaced, and where the image takes another route.
        """
        model = unwrap_parallel(subject.forward_func)
        routes = self._routes(subject, model, target)

        def explained_at(route: Route, *, may_differ: bool = False) -> T:
            known = _layers_there(routes.get(route))
            layers = _found_in(model, subject, target) if known is None else known

            def check(taken: Route) -> None:
                if taken != route and known is not None and not may_differ:
                    raise _OtherRouteError(taken)
                routes.pop(taken, None)
                routes[taken] = list(map(weakref.ref, layers)), list(layers.values())
                if len(routes) > _MOST_ROUTES:
                    routes.pop(next(iter(routes)), None)

            return explain(replace(subject, on_route=check), layers)

        try:
            return explained_at(next(reversed(routes), frozenset()))
        except _OtherRouteError as error:
            route = error.route
        return explained_at(route, may_differ=True)  # as where the route is drawn

    def _routes(self, subject: Subject, model: Callable[..., Any], target: Target) -> _Routes:
        """Return the routes of a model as it is, of which those are forgotten where a module has been replaced."""
        known = self._known(subject, model, target)
        key = subject.inputs[0].shape[1:], model.views if isinstance(model, MultiView) else None
        modules = list(model.modules()) if isinstance(model, nn.Module) else []  # a function's are not known
        before, routes = known.get(key, ([], {}))
        if [reference() for reference in before] != modules:
            routes = {}
        known[key] = list(map(weakref.ref, modules)), routes
        return routes

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


def _layers_there(found: tuple[_Modules, list[Grid]] | None) -> Layers | None:
    """Return the layers that were found, with their grids; None where none were, or one is gone."""
    if found is None:
        return None
    references, grids = found
    layers = [layer for reference in references if (layer := reference()) is not None]
    return dict(zip(layers, grids, strict=True)) if len(layers) == len(grids) else None


def _found_in(model: Callable[..., Any], subject: Subject, target: Target) -> Layers:
    """Return what the run of a model tells."""
    if not isinstance(model, MultiView):
        return main_modules(replace(subject, forward_func=model), target)
    if model.views == "ten-crop":  # the layers see every image twice, also mirrored
        return {}
    return main_modules(Subject(model.features, subject.inputs, rules=subject.rules))
