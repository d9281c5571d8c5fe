"""The main layers of a model: those whose outputs are maps of the image, as a run of the model tells."""

import math
from collections.abc import Sequence
from functools import cache

from torch import Tensor, nn

from captum_scoremap.checks import as_tuple_of_arguments, unrecorded
from captum_scoremap.layout import Grid, channel_dim_of, map_channel_dim, patch_grid
from captum_scoremap.places import Placement
from captum_scoremap.rules import Value, with_rules
from captum_scoremap.scores import Target, is_function
from captum_scoremap.tape import Recording

from .outputs import ModuleCall, outputs_of
from .subject import Subject, scores_of

__all__ = ["main_layers", "main_modules"]


def main_modules(subject: Subject, target: Target = None) -> dict[nn.Module, Grid]:
    """Return the last module of each resolution on the main path, in the order in which they run.

    Of all modules that run once and return maps of one size, those count that the fewest modules enclose, and of them
    the last: whole stages are preferred to what is inside them, the main path to a branch beside a shortcut. What is
    finer inside a module than before and after it, such as its attention, is no resolution. Of tokens it
    is the last of the longest row of blocks; where class or register tokens stand among them, on which alone the
    last blocks' score may depend, the block after three quarters of the row, and nothing after the blocks. A network
    that keeps one resolution is cut at its quarters. What only looks like a map does not count: object queries may be
    as many as the cells of one. Nor do heads beside the one that is explained.

    Args:
        subject: The model, which runs once, and the images, (N, C, H, W).
        target: A function from the model's output to what is explained of it; labels stand for all of it.

    Returns:
        Modules whose outputs are maps of more than one cell, to their rows and columns; empty if there are none.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> found = main_modules(Subject(network, (torch.randn(1, 3, 10, 10),)))
        >>> found == {network[1]: (8, 8), network[2]: (4, 4)}
        True
    """
    (image,), model = subject.inputs, subject.forward_func
    select = scores_of(target, len(image)) if is_function(target) else None
    recording = Recording(model, with_rules(subject.rules))
    values: dict[nn.Module, Value] = {}

    def note(module: nn.Module, tensor: Tensor) -> None:
        with unrecorded():  # to read changed memory takes operations
            value = recording.value_of(tensor)
        if value is not None:
            values[module] = value

    def record() -> None:
        recording.record((image,), as_tuple_of_arguments(subject.additional_forward_args), select)

    outputs, image_shape = outputs_of(record, model, image.shape, note)
    if not recording.tape.output_values:  # it depends on the image through what was frozen alone
        recording = Recording(model, with_rules(subject.rules), [(one.module, False) for one in outputs])
        record()
        passing = ((site, tapped.values) for site, tapped in recording.tapped.items() if site is not None)
        values = {site[0]: found[0] for site, found in passing if len(found) == 1}
    placement = Placement(recording.tape, image.shape)
    on_the_way = recording.tape.behind(recording.tape.output_values.values())

    @cache
    def is_elsewhere(module: nn.Module) -> bool:
        value = values.get(module)
        if value not in on_the_way or not value.is_of_image or not placement.has_place(value):
            return True
        return value.ndim == 3 and not placement.are_tokens(value)  # but a map without channels

    without: set[nn.Module] = set()
    while True:
        found = _chosen([one for one in outputs if one.module not in without], image_shape)
        kinds = {type(module) for module in found if is_elsewhere(module)}
        if not kinds:
            return found
        without |= {one.module for one in outputs if type(one.module) in kinds and is_elsewhere(one.module)}


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


def _chosen(outputs: Sequence[ModuleCall], image: tuple[int, ...]) -> dict[nn.Module, Grid]:
    """Return the main modules among those that returned something."""

    @cache  # each call encloses many
    def is_coarser(call: ModuleCall, grid: Grid) -> bool:
        sides = [
            _map_grid(shape, image) or patch_grid(_tokens(shape, image), image) for shape in (call.given, call.returned)
        ]
        return all(side is not None and math.prod(side) < math.prod(grid) for side in sides)

    maps: dict[Grid, list[ModuleCall]] = {}
    for output in outputs:
        grid = _map_grid(output.returned, image)
        # what is finer inside a module than what that is given and returns is beside the path
        if grid is not None and not any(is_coarser(call, grid) for call in output.outer):
            maps.setdefault(grid, []).append(output)
    tokens: dict[Grid, list[ModuleCall]] = {}
    for output in outputs:
        count = _tokens(output.returned, image)
        found = patch_grid(count, image, maps) if count else None
        if found is not None and (not maps or found in maps or _is_merged(found, output, tokens)):
            tokens.setdefault(found, []).append(output)
    rows = {grid: _longest_row(some) for grid, some in tokens.items()}
    # what has four axes in a block of tokens is heads of attention, or beside the main path
    inside = {module for blocks in rows.values() for block in blocks for module in block.module.modules()}
    maps = {grid: kept for grid, some in maps.items() if (kept := [one for one in some if one.module not in inside])}
    grids = [*maps, *(grid for grid in tokens if grid not in maps)]
    chosen: dict[ModuleCall, Grid] = {}
    for grid in grids:
        blocks = rows.get(grid, [])
        has_extra = bool(blocks) and _tokens(blocks[-1].returned, image) > math.prod(grid)
        some = maps.get(grid) or tokens[grid]
        if has_extra and grid not in maps:  # after the blocks, a class token may hold all of the score
            some = some[: some.index(blocks[0]) + 1] if blocks[0] in some else some
        whole = min(reversed(some), key=lambda call: call.depth)  # the last of those that the fewest modules enclose
        around = {call.module for call in blocks[-1].outer} if blocks else set()
        if any(one.module in around for one in maps.get(grid, ())):
            blocks = []  # of a stage, or a block, that lays its tokens out as a map
        if not blocks or len(grids) == 1:
            chosen[whole] = grid
        if blocks:
            quarters = (1, 2, 3) if len(grids) == 1 else (3,) if has_extra else (4,)
            last = len(blocks) - (2 if has_extra else 1)
            chosen |= {blocks[min(len(blocks) * quarter // 4, last)]: grid for quarter in quarters}
    return {output.module: chosen[output] for output in outputs if output in chosen}


def _map_grid(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> Grid | None:
    """Return the rows and columns of an output where it is a map, (N, C, h, w) or (N, h, w, C)."""
    channel_dim = map_channel_dim(shape, image_shape) if len(shape) == 4 else None
    if channel_dim is None:
        return None
    return shape[2:] if channel_dim == 1 else shape[1:3]  # type: ignore[return-value]  # of four


def _tokens(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> int:
    """Return how many tokens are in (N, tokens, C) or (tokens, N, C); 0 in anything else."""
    if len(shape) != 3 or shape[2] == 1 or channel_dim_of(shape, image_shape) == 1:
        return 0
    return shape[1] if shape[0] == image_shape[0] else shape[0] if shape[1] == image_shape[0] else 0


def _is_merged(grid: Grid, output: ModuleCall, tokens: dict[Grid, list[ModuleCall]]) -> bool:
    """Return whether tokens are those of a finer grid, merged: half as many rows and columns, of other channels.

    As many tokens as fill a square by chance are no positions: object queries, latents, the tokens of several maps.
    """
    return any(
        output.returned[2] != some[-1].returned[2]
        and all(one in {fine // 2, (fine + 1) // 2} for one, fine in zip(grid, finer, strict=True))
        for finer, some in tokens.items()
    )


def _longest_row(outputs: Sequence[ModuleCall]) -> list[ModuleCall]:
    """Return the blocks of the longest row: modules of one type that one module calls one after another.

    Where there is but one block, it is the row of all that is not inside another: embeddings, and the block.
    """
    parts = [output for output in outputs if next(output.module.children(), None) is not None]
    rows: dict[tuple[nn.Module | None, type], list[ModuleCall]] = {}
    for part in parts:
        rows.setdefault((part.parent, type(part.module)), []).append(part)
    row = max(rows.values(), key=lambda row: (len(row), -row[0].depth), default=[])
    if len(row) > 1:
        return row
    inner = {module for part in parts for module in part.module.modules() if module is not part.module}
    return [part for part in parts if part.module not in inner]
