"""How the image is laid out in a run's values, as what moved it tells.

A network may look at the image and at its mirror image, on its side, or window by window, and no shape says so. What a
convolution or a linear layer makes of a map has rows and columns as the map has; only steps that move elements change
that, and where they move the places of the elements tells how.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_scoremap.layout import MOST_EXTRA_TOKENS, Grid, map_channel_dim
from captum_scoremap.rules import Value, display_name, floating
from captum_scoremap.tape import Step, Tape

from .positions import makes_maps, row_sources, sees_neighbors

__all__ = ["Layout", "Turn", "layouts_of"]


@dataclass(frozen=True)
class Turn:
    """How the image lies in a map: with its sides swapped, then mirrored, then shifted round."""

    swapped: bool = False
    mirrored: tuple[bool, bool] = (False, False)  # the map's rows, its columns
    shifted: tuple[float, float] = (0.0, 0.0)  # fractions of the map's rows, of its columns

    def done(self, one: Tensor) -> Tensor:
        """Return a map that lies as the image does, (..., h, w), turned."""
        return self._shifted(self._mirrored(one.mT if self.swapped else one), 1)

    def undone(self, one: Tensor) -> Tensor:
        """Return a turned map, (..., h, w), as the image lies."""
        one = self._mirrored(self._shifted(one, -1))
        return one.mT if self.swapped else one

    def unshifted(self) -> "Turn":
        """Return the turn without what is shifted."""
        return Turn(self.swapped, self.mirrored)

    def _mirrored(self, one: Tensor) -> Tensor:
        axes = [axis for axis, is_mirrored in zip((-2, -1), self.mirrored, strict=True) if is_mirrored]
        return one.flip(axes) if axes else one

    def _shifted(self, one: Tensor, sign: int) -> Tensor:
        cells = [sign * round(part * size) for part, size in zip(self.shifted, one.shape[-2:], strict=True)]
        return one.roll(cells, (-2, -1)) if any(cells) else one


UPRIGHT = Turn()

_COPYING = {"clone", "contiguous", "alias", "to_copy", "detach"}


class Layout(NamedTuple):
    """How the image is laid out in a value, (N, C, h, w), (N, h, w, C), (N, tokens, C) or the like."""

    turn: Turn
    axes: tuple[int, ...]  # of rows and of columns, or of tokens
    grid: Grid  # rows and columns of the image, in cells

    def placed(self, product: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum over channels what stands at the value's elements.

        Args:
            product: Shaped like the value.

        Returns:
            The map as the image lies, (N, 1, rows, columns), and what class and register tokens add, (N,), None without
            any.
        """
        first, *channels = self._others(product.dim())
        summed = product.movedim(first, 0) if first else product
        summed = summed.sum(tuple(channels)).flatten(1)
        rows, columns = reversed(self.grid) if self.turn.swapped else self.grid
        extra = summed.shape[1] - rows * columns
        one = self.turn.undone(summed[:, extra:].unflatten(1, (1, rows, columns)))
        return one, summed[:, :extra].sum(1) if extra else None

    def places(self, value: Value) -> "Places":
        """Return where the elements of a value stand that the image is laid out in so."""
        sides = [(torch.arange(size, dtype=value.dtype, device=value.device) + 0.5) / size for size in self.grid]
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        shape = [size if axis in self.axes else 1 for axis, size in enumerate(value.shape)]
        found = []
        for one in (rows, columns):
            turned = self.turn.done(one)
            if len(self.axes) == 1:
                turned = turned.flatten()
                turned = torch.cat([turned.new_zeros(value.shape[self.axes[0]] - len(turned)), turned])
            found.append(turned.reshape(shape).expand(value.shape))
        return found[0], found[1]

    def fits(self, source: Value, output: Value) -> bool:
        """Return whether a value made of one that is laid out so can be laid out so, too."""
        return source.ndim == output.ndim and all(source.shape[axis] == output.shape[axis] for axis in self.axes)

    def _others(self, dims: int) -> list[int]:
        return [axis for axis in range(dims) if axis not in self.axes]


Shape = tuple[int, ...]
Places = tuple[Tensor, Tensor]
"""The row and the column of the image where each element of a value stands, as fractions of its sides."""


def layouts_of(tape: Tape, seen: Shape) -> tuple[dict[Value, Layout], set[Value]]:
    """Return the layouts of the values of a run whose layout is known.

    Args:
        tape: The run.
        seen: Shape of the images, or of what the network makes of them first, (N, C, H, W).

    Returns:
        Value to layout, and those values that were moved there cell by cell.
    """
    known = {
        value: Layout(UPRIGHT, (2, 3), (value.shape[2], value.shape[3]))
        for value in tape.inputs
        if value is not None and value.ndim == 4
    }
    rows: dict[Value, _Rows] = {}
    places: dict[Value, Places] = {}  # of what was made of a value with a layout by moving its elements
    last: dict[Value, Turn] = {}  # how the image lay when that was known last
    moved: set[Value] = set()
    moves: dict[Any, tuple[list[Places], list[Layout | None]]] = {}  # by the step and the layout, for blocks are alike
    for step in tape.steps:
        sources = [row_sources(step, output) for output in step.outputs]
        if len(sources) == 1 and len(sources[0]) == 1 and _is_by_rows(step, sources[0][0], known, rows):
            continue
        found = _moved(step, known, places, seen[0], moves)
        for number, output in enumerate(step.outputs):
            source = min(sources[number], key=lambda value: value.step, default=None)
            if source is None:  # its rows are a constant's
                continue
            before = known[source].turn.unshifted() if source in known else last.get(source, UPRIGHT)
            if found is not None:
                places[output], layout = found[0][number], found[1][number]
                moved.update([] if layout is None else [output])
            else:
                layout = _kept(step, source, output, known.get(source), before, seen)
                if layout is None and source in places and source.shape == output.shape:
                    places[output] = places[source]
            if layout is None:
                last[output] = before
            else:
                known[output] = layout
    return known, moved


class _Rows(NamedTuple):
    """How a matrix holds a value whose channels come last: position by position."""

    layout: Layout
    shape: torch.Size  # of the value, without channels


def _is_by_rows(step: Step, source: Value, known: dict[Value, Layout], rows: dict[Value, _Rows]) -> bool:
    """Return whether a step makes rows of positions, or of such rows others, or positions again; and note which."""
    (output,) = step.outputs
    if source in rows:
        if output.ndim == 2 and output.shape[0] == source.shape[0]:
            rows[output] = rows[source]
        elif output.ndim > 2 and output.shape[:-1] == rows[source].shape:
            known[output] = rows[source].layout
        else:
            return False
        return True
    if source not in known or not step.rule.moves or output.ndim != 2 or source.ndim - 1 in known[source].axes:
        return False
    rows[output] = _Rows(known[source], source.shape[:-1])
    return output.shape[1] == source.shape[-1] and output.shape[0] == source.shape[:-1].numel()


def _moved(
    step: Step,
    known: dict[Value, Layout],
    places: dict[Value, Places],
    images: int,
    moves: dict[Any, tuple[list[Places], list[Layout | None]]],
) -> tuple[list[Places], list[Layout | None]] | None:
    """Return the places of the elements that a step moves, and the layouts that they make; None where it is not known.

    Those of steps that are alike are found once.
    """
    if not step.rule.moves or any(value.dtype.is_complex for value in (*step.values, *step.outputs)):
        return None
    if not all(value in known or value in places for value in step.values):
        return None
    source = step.values[0]
    if any(output.ndim > source.ndim for output in step.outputs) and source in known and len(known[source].axes) == 1:
        return None  # heads of attention, which are no map again
    if source in places and display_name(step.operation) in _COPYING:
        return [places[source]], [None]
    is_plain = len(step.values) == 1 and source not in places and not floating((step.args, dict(step.kwargs)))
    key = (step.operation, str(step.args[1:]), source.shape, known[source]) if is_plain else None
    if key is None or key not in moves:
        sources = [places[value] if value in places else known[value].places(value) for value in step.values]
        rows, columns = (step.forward(each) for each in zip(*sources, strict=True))
        found = list(zip(rows, columns, strict=True))
        made = found, [_layout_by(*one, images) for one in found]
        if key is None:
            return made
        moves[key] = made
    return moves[key]


def _kept(step: Step, source: Value, output: Value, layout: Layout | None, before: Turn, seen: Shape) -> Layout | None:
    """Return the layout of an output that is its source's; None where it is not known."""
    if output.ndim != 4 or output.shape[0] != seen[0] or not makes_maps(display_name(step.operation)):
        return layout if layout is not None and layout.fits(source, output) else None
    turn = before if layout is None else layout.turn
    shape = (*output.shape[:2], *(output.shape[:1:-1] if turn.swapped else output.shape[2:]))
    # what sees several cells of a map makes a map, if its proportions do not tell otherwise
    is_map = layout is not None or (sees_neighbors(step) and map_channel_dim(shape, seen) == 1)
    grid = shape[2], shape[3]
    return Layout(turn, (2, 3), grid) if is_map and max(grid) > 1 else None


def _layout_by(rows: Tensor, columns: Tensor, images: int) -> Layout | None:
    """Return the layout of a value whose elements have these places; None where they are not all of the image's."""
    dims = rows.dim()
    for axes in {4: ((2, 3), (1, 2)), 3: ((1,), (2,), (0,))}.get(dims, ()):
        others = [axis for axis in range(dims) if axis not in axes]
        if rows.shape[others[0]] != images:
            continue
        means = _mean(rows, others), _mean(columns, others)
        for row, column in [means] if len(axes) == 2 else _as_grids(*means):
            turn = _turn_of(row, column)
            if turn is not None:
                height, width = row.shape
                return Layout(turn, axes, (width, height) if turn.swapped else (height, width))
    return None


def _mean(places: Tensor, axes: Sequence[int]) -> Tensor:
    """Return the mean along axes, along which places are often the same memory again."""
    for axis in reversed(axes):
        places = places.select(axis, 0) if places.stride(axis) == 0 else places.mean(axis)
    return places


def _as_grids(row: Tensor, column: Tensor) -> Iterator[Places]:
    """Yield the places of tokens as those of rows and columns, where there are as many."""
    for extra in range(min(MOST_EXTRA_TOKENS + 1, len(row) - 1)):
        sides = [len(one[extra:].mul(1e4).round().unique()) for one in (row, column)]
        if sides[0] * sides[1] == len(row) - extra:
            for shape in (sides, sides[::-1]):
                yield row[extra:].reshape(shape), column[extra:].reshape(shape)
            return


def _turn_of(row: Tensor, column: Tensor) -> Turn | None:
    """Return how the image lies where cells have these places, (h, w) each; None where they are not of all of it."""
    for swapped, first, second in ((False, row, column), (True, column, row)) if row.numel() > 1 else ():
        if _differ(first, 1) or _differ(second, 0):
            continue
        lines = [_line(first[:, 0]), _line(second[0])]
        if None not in lines:
            mirrored, shifted = zip(*filter(None, lines), strict=True)
            return Turn(swapped, mirrored, shifted)
    return None


def _differ(places: Tensor, axis: int) -> bool:
    """Return whether places differ along an axis."""
    return not bool((places.amax(axis) - places.amin(axis) <= 1e-3).all())


def _line(places: Tensor) -> tuple[bool, float] | None:
    """Return whether a line of cells is mirrored, and by how much of it shifted; None if it is not the whole side."""
    size = len(places)
    whole = (torch.arange(size, dtype=places.dtype, device=places.device) + 0.5) / size
    if not bool(((places.sort().values - whole).abs() <= 1 / size).all()):
        return None
    for mirrored, start in ((False, int(places.argmin())), (True, int(places.argmax()))):
        steps = places.roll(-start).diff()
        if bool((steps < 0 if mirrored else steps > 0).all()):
            return mirrored, start / size
    return None
