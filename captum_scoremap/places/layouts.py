"""How the image is laid out in a run's values, as what moved it tells.

A network may look at the image and at its mirror image, on its side, or window by window, and no shape says so. What a
convolution or a linear layer makes of a map has rows and columns as the map has; only steps that move elements change
that, and where they move the places of the elements tells how.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_scoremap.layout import MOST_EXTRA_TOKENS, Grid, map_channel_dim
from captum_scoremap.rules import Value, display_name, floating
from captum_scoremap.tape import Step, Tape

from .positions import makes_maps, row_sources, sees_neighbors
from .sums import Sums, are_along, axes_of, factors, has_columns_of_second, shared
from .turns import UPRIGHT, Turn, turn_of

__all__ = ["Layout", "Layouts"]


_BROADCASTING = {"add", "sub", "mul", "div"}
_COPYING = {"clone", "contiguous", "alias", "to_copy", "detach"}
_NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # that places can be told in


class Layout(NamedTuple):
    """How the image is laid out in a value, (N, C, h, w), (N, h, w, C), (N, tokens, C) or the like."""

    turn: Turn
    axes: tuple[int, ...]  # of rows and of columns, or of tokens
    grid: Grid  # rows and columns of the image, in cells

    @property
    def image_axis(self) -> int:
        """The axis of the images: the first, or after tokens."""
        return 1 if self.axes == (0,) else 0

    def placed(self, product: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum over channels what stands at the value's elements.

        Args:
            product: Shaped like the value.

        Returns:
            The map as the image lies, (N, 1, rows, columns), and what class and register tokens add, (N,), None without
            any.
        """
        channels = [axis for axis in range(product.dim()) if axis not in (*self.axes, self.image_axis)]
        summed = product.sum(channels)
        summed = (summed.mT if self.image_axis else summed).flatten(1)
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


Shape = tuple[int, ...]
Places = tuple[Tensor, Tensor]
"""The row and the column of the image where each element of a value stands, as fractions of its sides."""


class Layouts:
    """How the image is laid out in the values of a run, as far as it is known.

    Args:
        tape: The run.
        seen: Shape of the images, or of what the network makes of them first, (N, C, H, W).

    Attributes:
        known: Value to layout.
        moved: Those of them that were moved there cell by cell.
        sums: What stands at no position, for steps summed over them.
        disordered: Values whose rows, or rows and columns, are known to be no whole map's in order.
        channels_first: Values (N, C, length) of convolutions along one axis; what their shape says may be wrong.
    """

    def __init__(self, tape: Tape, seen: Shape) -> None:
        self._seen = seen
        self.known = {
            value: Layout(UPRIGHT, (2, 3), (value.shape[2], value.shape[3]))
            for value in tape.inputs
            if value is not None and value.ndim == 4
        }
        self.moved: set[Value] = set()
        self.sums = Sums()
        self.disordered: set[Value] = set()
        self.channels_first: set[Value] = set()
        self._asked: set[Value] = set()  # whose rows are those of constants, and columns positions
        self._singled: set[Value] = set()  # of one of several images
        self._rows: dict[Value, _Rows] = {}
        self._places: dict[Value, Places] = {}  # of what was made of a known value by moving elements
        self._last: dict[Value, Turn] = {}  # how the image lay when that was known last, of other values
        self._moves: dict[Any, tuple[list[Places], list[Layout | None]]] = {}  # blocks of a network are alike
        for step in tape.steps:
            self._follow(step)

    def _follow(self, step: Step) -> None:
        """Note the layouts of what a step makes."""
        moved = self._move(step)
        for number, output in enumerate(step.outputs):
            if self.sums.follow(step, output, self._axes):
                continue
            source = min(row_sources(step, output), key=lambda value: value.step, default=None)
            columns = self._by_columns(step, output)
            if columns is not None:
                self._places[output], layout = columns, _layout_by(*columns, self._seen[0])
                if layout is not None:
                    self.known[output] = layout
                (self._asked if source is None else self.moved).add(output)
                continue
            if source is None:  # its rows are a constant's
                continue
            if source in self._asked:
                self._asked.add(output)
            if moved is not None:
                self._places[output], layout = moved[0][number], moved[1][number]
                self.moved.update([] if layout is None or source in self._asked else [output])
                has_constants = bool(floating((step.args, dict(step.kwargs))))
                if layout is None and not has_constants and _are_disordered(*moved[0][number]):
                    self.disordered.add(output)
            else:
                layout = self._by_rows(step, source, output) or self._kept(step, source, output)
                places = self._broadcast(step, source, output)
                if places is not None:
                    self._places[output] = places
            if layout is None:
                self._last[output] = self._turn(source)
            else:
                self.known[output] = layout

    def _axes(self, value: object) -> Collection[int] | None:
        """Return the axes of a value along which its elements stand at different places; None where not known."""
        if not isinstance(value, Value):
            return None
        known = self.known.get(value)
        if known is not None:
            return known.axes
        return axes_of(*self._places[value]) if value in self._places else None

    def _by_columns(self, step: Step, output: Value) -> Places | None:
        """Return the places of a product whose columns are positions, those of its second factor; None of others."""
        first, second = factors(step) or (None, None)
        if isinstance(first, Value) and first not in self.sums.nowhere:
            return None
        if not isinstance(second, Value) or not has_columns_of_second(second, self._axes):
            return None
        known = self.known.get(second)
        row, column = self._places[second] if known is None else known.places(second)
        return row[..., :1, :].expand(output.shape), column[..., :1, :].expand(output.shape)

    def _broadcast(self, step: Step, source: Value, output: Value) -> Places | None:
        """Return the places of what an elementwise step makes of values with places; None where they are not known."""
        if source.shape == output.shape:
            return self._places.get(source)
        if display_name(step.operation) not in _BROADCASTING:
            return None
        fitting = [value for value in step.values if value in self._places and value.ndim == output.ndim]
        if not fitting:
            return None
        row, column = max((self._places[value] for value in fitting), key=lambda places: len(axes_of(*places)))
        return row.expand(output.shape), column.expand(output.shape)

    def _turn(self, value: Value) -> Turn:
        """Return how the image lies in what a value was made of, but for shifts, which windows take back."""
        known = self.known.get(value)
        return self._last.get(value, UPRIGHT) if known is None else known.turn.unshifted()

    def _move(self, step: Step) -> tuple[list[Places], list[Layout | None]] | None:
        """Return the places of the elements that a step moves, and the layouts that they make; None if not known."""
        if not step.rule.moves or not all(value.dtype in _NUMBERS for value in (*step.values, *step.outputs)):
            return None
        if not all(value in self.known or value in self._places for value in step.values):
            return None
        source, known = step.values[0], self.known.get(step.values[0])
        if source in self._places and display_name(step.operation) in _COPYING:
            return [self._places[source]], [known]
        if known is not None and any(
            _are_rows(source, output, known) or _are_heads(source, output, known) for output in step.outputs
        ):
            return None
        is_of_its_own = len(step.values) > 1 or source in self._places or self._takes_an_image(step)
        if is_of_its_own or floating((step.args, dict(step.kwargs))):
            return self._moved_by(step)
        key = step.operation, str(step.args[1:]), str(step.kwargs), source.shape, known
        if key not in self._moves:
            self._moves[key] = self._moved_by(step)
        return self._moves[key]

    def _moved_by(self, step: Step) -> tuple[list[Places], list[Layout | None]]:
        places = [
            self._places[value] if value in self._places else self.known[value].places(value) for value in step.values
        ]
        rows, columns = (_moved(step, each) for each in zip(*places, strict=True))
        found = list(zip(rows, columns, strict=True))
        if len(step.values) == 1 and (step.values[0] in self._singled or self._takes_an_image(step)):
            self._singled.update(step.outputs)
            return found, [None] * len(found)
        return found, [_layout_by(*one, self._seen[0]) for one in found]

    def _takes_an_image(self, step: Step) -> bool:
        """Return whether a step takes one of several images, so that no axis is theirs any more."""
        known = self.known.get(step.values[0])
        if known is None or self._seen[0] == 1 or display_name(step.operation) not in {"select", "unbind"}:
            return False
        return (step.args[1] if len(step.args) > 1 else 0) % step.values[0].ndim == known.image_axis

    def _by_rows(self, step: Step, source: Value, output: Value) -> Layout | None:
        """Return the layout of an output whose positions were the rows of a matrix, as a linear layer has them."""
        known, rows = self.known.get(source), self._rows.get(source)
        if known is not None and step.rule.moves and _are_rows(source, output, known):
            self._rows[output] = _Rows(known, source.shape[:-1])
        elif rows is not None and output.shape[:-1] == rows.shape:
            return rows.layout
        elif rows is not None and not step.rule.moves and output.ndim == 2 and output.shape[0] == source.shape[0]:
            self._rows[output] = rows
        return None

    def _kept(self, step: Step, source: Value, output: Value) -> Layout | None:
        """Return the layout of an output that is its source's; None where it is not known."""
        known = self.known.get(source)
        name = display_name(step.operation)
        if output.ndim != 4 or output.shape[0] != self._seen[0] or not makes_maps(name):
            if known is not None and known.fits(source, output):
                return known
            # tokens may be mixed as channels, where they are known to be such
            is_along = name == "conv" and 1 not in (self._axes(source) or ())
            if output.ndim == 3 and (is_along or (source in self.channels_first and source.shape == output.shape)):
                self.channels_first.add(output)
            return None
        if not {2, 3}.issuperset(self._axes(source) or ()):
            self.disordered.add(output)  # of planes of channels and rows, or columns
            return None
        turn = self._turn(source) if known is None else known.turn
        shape = (*output.shape[:2], *(output.shape[:1:-1] if turn.swapped else output.shape[2:]))
        # what sees several cells of a map makes a map, if its proportions do not tell otherwise
        is_map = known is not None or (sees_neighbors(step) and map_channel_dim(shape, self._seen) == 1)
        grid = shape[2], shape[3]
        return Layout(turn, (2, 3), grid) if is_map and max(grid) > 1 else None


def _moved(step: Step, places: Sequence[Tensor]) -> list[Tensor]:
    """Return rows or columns of places, moved; what pads maps need not be done for each image and channel."""
    if display_name(step.operation) == "constant_pad_nd":
        (one,), shape = places, step.outputs[0].shape
        axes = [axis for axis in range(one.dim()) if one.stride(axis) == 0 and one.shape[axis] == shape[axis]]
        for axis in axes:
            one = one.narrow(axis, 0, 1)
        (padded,) = step.forward([one])
        return [padded.expand(shape)]
    return [shared(one) for one in step.forward(places)]


class _Rows(NamedTuple):
    """How the rows of a matrix are laid out as positions."""

    layout: Layout
    shape: torch.Size  # of what they were, without channels


def _are_rows(source: Value, output: Value, layout: Layout) -> bool:
    """Return whether positions of a value whose channels come last are the rows of a matrix."""
    has_channels_last = source.ndim - 1 not in layout.axes
    return has_channels_last and output.shape == (source.shape[:-1].numel(), source.shape[-1])


def _are_heads(source: Value, output: Value, layout: Layout) -> bool:
    """Return whether the channels of tokens are split, as for heads of attention; they make no map again."""
    last = layout.axes[-1] + 1
    before, after = ([size for size in value.shape if size > 1] for value in (source, output))
    return len(layout.axes) == 1 and len(after) > len(before) and output.shape[:last] == source.shape[:last]


def _layout_by(rows: Tensor, columns: Tensor, images: int) -> Layout | None:
    """Return the layout of a value whose elements have these places; None where they are not all of the image's."""
    dims = rows.dim()
    for axes in {4: ((2, 3), (1, 2)), 3: ((1,), (2,), (0,))}.get(dims, ()):
        others = [axis for axis in range(dims) if axis not in axes]
        if rows.shape[others[0]] != images:
            continue
        means = _mean(rows, others), _mean(columns, others)
        for row, column in [means] if len(axes) == 2 else _as_grids(*means):
            turn = turn_of(row, column)
            if turn is not None:
                height, width = row.shape
                return Layout(turn, axes, (width, height) if turn.swapped else (height, width))
    return None


def _are_disordered(rows: Tensor, columns: Tensor) -> bool:
    """Return whether elements that look like tokens or a map by their shape stand at places that say otherwise.

    They are the tokens of several maps, or of a part of one, or planes of channels and rows.
    """
    dims = rows.dim()
    if dims == 4:
        return [axis for axis in range(4) if are_along(axis, rows, columns)] == [1, 3]
    if dims not in {2, 3} or not are_along(dims - 2, rows, columns) or (dims == 3 and are_along(0, rows, columns)):
        return False
    others = [axis for axis in range(dims) if axis != dims - 2]
    return all(turn_of(*one) is None for one in _as_grids(_mean(rows, others), _mean(columns, others)))


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
