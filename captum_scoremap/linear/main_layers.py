"""The main layers of a model: those whose outputs are maps of the image, as a run of the model tells."""

from collections.abc import Iterable

from torch import Tensor, nn

from captum_scoremap import layout
from captum_scoremap.checks import as_tuple_of_arguments
from captum_scoremap.rules import with_rules
from captum_scoremap.tape import Recording, Site

from .placement import Placement
from .subject import Subject

__all__ = ["main_layers", "main_modules"]


def main_modules(subject: Subject) -> dict[nn.Module, tuple[int, int]]:
    """Return the last module of each resolution on the main path, to its rows and columns, in the order they run.

    As :func:`captum_scoremap.layout.main_modules`, without those that only look like it: object queries may be as many
    as the cells of a map. The model runs twice, and more often where some look like it.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> found = main_modules(Subject(network, (torch.randn(1, 3, 10, 10),)))
        >>> found == {network[1]: (8, 8), network[2]: (4, 4)}
        True
    """
    (image,), model = subject.inputs, subject.forward_func
    additional = as_tuple_of_arguments(subject.additional_forward_args)
    without: set[nn.Module] = set()
    while True:
        found = layout.main_modules(model, image, additional, without)
        strays = _elsewhere(subject, found)
        if not strays:
            return found
        kinds = {type(stray) for stray in strays}
        members = model.modules() if isinstance(model, nn.Module) else ()
        without |= strays | _elsewhere(subject, [module for module in members if type(module) in kinds])


def _elsewhere(subject: Subject, modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Return which modules return what depends on no image, or stands at no positions of one."""
    sites: list[Site] = [(module, False) for module in modules]
    recording = Recording(subject.forward_func, with_rules(subject.rules), sites)
    recording.record(subject.inputs, as_tuple_of_arguments(subject.additional_forward_args))
    placement = Placement(recording.tape, subject.inputs[0].shape)
    values = {site[0]: recording.tapped[site].values for site in sites if site in recording.tapped}
    return {
        module
        for module, some in values.items()
        if any(not one.sites & 1 or not placement.has_place(one) for one in some)
    }


def main_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """Return the names of the main modules at images, (N, C, H, W).

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> main_layers(network, torch.randn(1, 3, 10, 10))
        ['1', '2']
    """
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in main_modules(Subject(model, (inputs,)))]
