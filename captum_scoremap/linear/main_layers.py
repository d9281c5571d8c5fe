"""The main layers of a model: those whose outputs are maps of the image, as a run of the model tells."""

from functools import cache

from torch import Tensor, nn

from captum_scoremap import layout
from captum_scoremap.checks import as_tuple_of_arguments, unrecorded
from captum_scoremap.rules import Value, with_rules
from captum_scoremap.tape import Recording

from .placement import Placement
from .subject import Subject

__all__ = ["main_layers", "main_modules"]


def main_modules(subject: Subject) -> dict[nn.Module, tuple[int, int]]:
    """Return the last module of each resolution on the main path, to its rows and columns, in the order they run.

    As :func:`captum_scoremap.layout.main_modules`, without those that only look like it: object queries may be as many
    as the cells of a map. The model runs once.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> found = main_modules(Subject(network, (torch.randn(1, 3, 10, 10),)))
        >>> found == {network[1]: (8, 8), network[2]: (4, 4)}
        True
    """
    (image,), model = subject.inputs, subject.forward_func
    recording = Recording(model, with_rules(subject.rules))
    values: dict[nn.Module, Value | None] = {}

    def note(module: nn.Module, tensor: Tensor) -> None:
        with unrecorded():  # to read changed memory takes operations
            values[module] = recording.value_of(tensor)

    additional = as_tuple_of_arguments(subject.additional_forward_args)
    outputs = layout.Outputs.of(lambda: recording.record((image,), additional), model, image.shape, note)
    placement = Placement(recording.tape, image.shape)

    @cache
    def is_elsewhere(module: nn.Module) -> bool:
        value = values[module]
        return value is None or not value.sites & 1 or not placement.has_place(value)

    without: set[nn.Module] = set()
    while True:
        found = outputs.main_modules(without)
        kinds = {type(module) for module in found if is_elsewhere(module)}
        if not kinds:
            return found
        without |= {module for module in values if type(module) in kinds and is_elsewhere(module)}


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
