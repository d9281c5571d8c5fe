"""The layers that maps of the image's size are made of, where the user names none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import check_layer, unwrap_parallel
from captum_scoremap.linear import main_modules
from captum_scoremap.multiview import MultiView
from captum_scoremap.rules import Rule
from captum_scoremap.tape import as_tuple_of_arguments

__all__ = ["MainLayers", "named_layers"]


def named_layers(
    forward_func: Callable[..., Any], layers: nn.Module | Sequence[nn.Module] | None
) -> list[nn.Module] | None:
    """Return the layers that a user names, one or several, checked; None for none."""
    named = [layers] if isinstance(layers, nn.Module) else layers
    for layer in named or ():
        check_layer(forward_func, layer)
    if named is not None and not named:
        raise ValueError("layers must name at least one module, got none. Leave it out for the default.")
    return None if named is None else list(named)


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
        self, forward_func: Callable[..., Any], image: Tensor, additional_forward_args: object
    ) -> dict[nn.Module, tuple[int, int]]:
        """Return layers, finest first, to their rows and columns; the model runs once for each size of the image."""
        forward_func, size = unwrap_parallel(forward_func), image.shape[1:]
        if size not in self._found:
            if not isinstance(forward_func, MultiView):
                additional = as_tuple_of_arguments(additional_forward_args)
                self._found[size] = main_modules(forward_func, image, additional, rules=self._rules)
            elif forward_func.views == "ten-crop":  # the layers see every image twice, also mirrored
                self._found[size] = {}
            else:
                self._found[size] = main_modules(forward_func.features, image, rules=self._rules)
        return self._found[size]
