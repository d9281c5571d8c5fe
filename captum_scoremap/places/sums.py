"""Steps that sum over the positions of the image, so that what they make stands at none.

A matrix product sums over the columns of its first factor. Where these are positions, as in the weights by which
learned tokens gather what they read, its rows are those tokens, of which there may be as many as a map has cells.
A sum or a mean does the same, and a Fourier transform makes frequencies of positions.
"""

from collections.abc import Callable, Collection

from torch import Tensor

from captum_scoremap.rules import Value, display_name
from captum_scoremap.tape import Step

__all__ = ["Sums", "are_along", "axes_of", "factors", "has_columns_of_second", "is_inverse", "shared"]

Axes = Callable[[object], Collection[int] | None]
"""Returns the axes of a value along which its elements stand at different places; None where that is not known."""

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the first factor is
_REDUCING = {"sum", "mean", "amax", "amin", "logsumexp"}


class Sums:
    """Which values of a run stand at no position, for steps summed over positions; they are followed one by one.

    Attributes:
        gathered: Values that sum over all positions, and keep more than channels.
        transformed: What Fourier transforms make of positions, or positions of.
        nowhere: What is gathered, and what was made of that alone.
    """

    def __init__(self) -> None:
        self.gathered: set[Value] = set()
        self.transformed: set[Value] = set()
        self.nowhere: set[Value] = set()
        self._crossed: set[Value] = set()  # of positions in rows and in columns, as the weights of self-attention

    def follow(self, step: Step, output: Value, axes: Axes) -> bool:
        """Note what a step sums over.

        Args:
            step: The step.
            output: What it makes.
            axes: Where positions are in what it is made of.

        Returns:
            Whether its output stands at no position any more, or again.
        """
        is_transform = _transforms(step, axes)
        is_gathered = not is_transform and self._gathers(step, output, axes)
        if is_transform:
            self.transformed.add(output)
        if is_gathered:
            self.gathered.add(output)
        if is_gathered or self.nowhere.issuperset(step.values):
            self.nowhere.add(output)
        if self._crosses(step, output, axes):
            self._crossed.add(output)
        return is_transform or is_gathered

    def _gathers(self, step: Step, output: Value, axes: Axes) -> bool:
        pair = factors(step)
        if pair is None:
            source = step.values[0]
            if display_name(step.operation) not in _REDUCING or not 2 < output.ndim < source.ndim or len(step.args) < 2:
                return False
            positions, which = axes(source), step.args[1]
            dims = which if isinstance(which, (list, tuple)) else [which]
            return bool(positions) and {dim % source.ndim for dim in dims} >= {*(positions or ())}
        first, second = pair
        if not isinstance(first, Value) or not isinstance(second, Value) or second in self._crossed:
            return False
        of_first, of_second = axes(first) or (), axes(second) or ()
        return _reads(of_first, first.ndim, rows=False, columns=True) and _reads(
            of_second, second.ndim, rows=True, columns=False
        )

    def _crosses(self, step: Step, output: Value, axes: Axes) -> bool:
        pair = factors(step)
        if pair is None:
            return any(value in self._crossed and value.shape.numel() == output.shape.numel() for value in step.values)
        if not all(isinstance(one, Value) for one in pair):
            return False
        first, second = (axes(one) or () for one in pair)
        rows, columns = output.ndim - 2, output.ndim - 1
        return rows in first and columns not in first and columns in second


def _transforms(step: Step, axes: Axes) -> bool:
    name, source = display_name(step.operation), step.values[0]
    if name not in {"fft_c2c", "fft_r2c", "fft_c2r"}:
        return False
    dims = {dim % source.ndim for dim in step.args[1]}
    positions = axes(source)
    if positions is not None:
        return not dims.isdisjoint(positions)
    return 1 in dims if source.ndim == 3 else source.ndim == 4 and len(dims) > 1


def axes_of(row: Tensor, column: Tensor) -> frozenset[int]:
    """Return the axes along which elements stand at different places; the rows and columns are shaped like a value."""
    return frozenset(axis for axis in range(row.dim()) if are_along(axis, row, column))


def are_along(axis: int, row: Tensor, column: Tensor) -> bool:
    """Return whether elements stand at different places along an axis, for places as :func:`shared` has them."""
    return row.shape[axis] > 1 and bool(row.stride(axis) or column.stride(axis))


def shared(places: Tensor) -> Tensor:
    """Return places that are one memory along axes along which they are the same, so that these can be told."""
    one = places
    for axis in range(places.dim()):
        if one.shape[axis] > 1 and (one.stride(axis) == 0 or bool((one == one.narrow(axis, 0, 1)).all())):
            one = one.narrow(axis, 0, 1)
    return one.expand(places.shape)


def factors(step: Step) -> tuple[object, object] | None:
    """Return the two matrices, or batches of them, that a step multiplies; None where it does not."""
    at = _PRODUCTS.get(display_name(step.operation))
    return None if at is None or len(step.args) < at + 2 else (step.args[at], step.args[at + 1])


def has_columns_of_second(second: object, axes: Axes) -> bool:
    """Return whether the columns of a second factor are positions, and its rows, which are summed over, are none."""
    return isinstance(second, Value) and _reads(axes(second) or (), second.ndim, rows=False, columns=True)


def is_inverse(step: Step) -> bool:
    """Return whether a Fourier transform makes positions of frequencies."""
    return display_name(step.operation) == "fft_c2r" or not step.args[-1]


def _reads(axes: Collection[int], dims: int, *, rows: bool, columns: bool) -> bool:
    return (dims - 2 in axes) == rows and (dims - 1 in axes) == columns
