"""The main layers of a model: those whose outputs are maps of the image, as a run of the model tells."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from captum_scoremap import layout
from captum_scoremap.rules import Rule, with_rules
from captum_scoremap.tape import Recording, Site

from .placement import Placement

__all__ = ["main_layers", "main_modules"]


def main_modules(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    additional: tuple[Any, ...] = (),
    *,
    rules: Mapping[Any, Rule] | None = None,
) -> dict[nn.Module, tuple[int, int]]:
    """Return the last module of each resolution on the main path, in the order in which they run.

    As :func:`captum_scoremap.layout.main_modules`, without those that only look like it: object queries may be as many
    as the cells of a map.

    Args:
        forward_func: The model, or a function that calls it; it runs twice, and more often where some look like it.
        inputs: Images, (N, C, H, W).
        additional: Additional arguments.
        rules: Operation to rule, to replace or add some.

    Returns:
        Modules whose outputs are maps of more than one cell, to their rows and columns; empty if there are none.

    Raises:
        UnsupportedOperationError: If operations have no rule; all are listed.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> main_modules(network, torch.randn(1, 3, 10, 10)) == {network[1]: (8, 8), network[2]: (4, 4)}
        True
    """
    without: set[nn.Module] = set()
    while True:
        found = layout.main_modules(forward_func, inputs, additional, without)
        strays = _elsewhere(forward_func, inputs, additional, rules, found)
        if not strays:
            return found
        kinds = {type(stray) for stray in strays}
        members = forward_func.modules() if isinstance(forward_func, nn.Module) else ()
        alike = [module for module in members if type(module) in kinds]
        without |= strays | _elsewhere(forward_func, inputs, additional, rules, alike)


def _elsewhere(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    additional: tuple[Any, ...],
    rules: Mapping[Any, Rule] | None,
    modules: Iterable[nn.Module],
) -> set[nn.Module]:
    """Return which modules return what depends on no image, or stands at no positions of one."""
    sites: list[Site] = [(module, False) for module in modules]
    recording = Recording(forward_func, with_rules(rules), sites)
    recording.record((inputs,), additional)
    placement = Placement(recording.tape, inputs.shape)
    values = {site[0]: recording.tapped[site].values for site in sites if site in recording.tapped}
    return {
        module
        for module, some in values.items()
        if any(not one.sites & 1 or not placement.has_place(one) for one in some)
    }


def main_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """Return the names of the main modules.

    Args:
        model: The model.
        inputs: Images, (N, C, H, W).

    Returns:
        Names of layers that run once and give maps of more than one cell, in the order in which they run.

    Raises:
        UnsupportedOperationError: As :func:`main_modules`.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> main_layers(network, torch.randn(1, 3, 10, 10))
        ['1', '2']
    """
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in main_modules(model, inputs)]
