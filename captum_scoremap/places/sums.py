"""Steps that sum over the positions of the image, so that what they make stands at none.

A matrix product sums over the columns of its first factor. Where these are positions, as in the weights by which
learned tokens gather what they read, its rows are those tokens, of which there may be as many as a map has cells.
A sum or a mean does the same, and a Fourier transform makes frequencies of positions.
"""

from collections.abc import Callable, Collection

from torch import Tensor

from captum_scoremap.rules import Value, display_name
from captum_scoremap.tape import Step

__all__ = [
    "Axes",
    "are_along",
    "axes_of",
    "factors",
    "has_columns_of_second",
    "is_inverse",
    "sums_positions",
    "transforms_positions",
]

Axes = Callable[[object], Collection[int] | None]
"""Returns the axes of a value along which its elements stand at different places; None where that is not known."""

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the first factor is
_REDUCING = {"sum", "mean", "amax", "amin", "logsumexp"}


def axes_of(row: Tensor, column: Tensor) -> frozenset[int]:
    """Return the axes along which elements stand at different places; the rows and columns are shaped like a value."""
    return frozenset(axis for axis in range(row.dim()) if are_along(axis, row, column))


def are_along(axis: int, row: Tensor, column: Tensor) -> bool:
    """Return whether elements stand at different places along an axis."""
    return _differs(row, axis) or _differs(column, axis)


def factors(step: Step) -> tuple[object, object] | None:
    """Return the two matrices, or batches of them, that a step multiplies; None where it does not."""
    at = _PRODUCTS.get(display_name(step.operation))
    return None if at is None or len(step.args) < at + 2 else (step.args[at], step.args[at + 1])


def sums_positions(step: Step, output: Value, axes: Axes, crossed: Collection[Value]) -> bool:
    """Return whether a step sums over all positions of what it is given, and keeps more than channels.

    Args:
        step: The step.
        output: What it makes.
        axes: Where positions are in its arguments.
        crossed: Values with positions both in rows and in columns, such as the weights of self-attention.
    """
    pair = factors(step)
    if pair is None:
        source = step.values[0]
        if display_name(step.operation) not in _REDUCING or not 2 < output.ndim < source.ndim or len(step.args) < 2:
            return False
        positions, which = axes(source), step.args[1]
        dims = which if isinstance(which, (list, tuple)) else [which]
        return bool(positions) and {dim % source.ndim for dim in dims} >= {*(positions or ())}
    first, second = pair
    if not isinstance(first, Value) or not isinstance(second, Value) or second in crossed:
        return False
    of_first, of_second = axes(first) or (), axes(second) or ()
    return _reads(of_first, first.ndim, rows=False, columns=True) and _reads(
        of_second, second.ndim, rows=True, columns=False
    )


def has_columns_of_second(second: object, axes: Axes) -> bool:
    """Return whether the columns of a second factor are positions, and its rows, which are summed over, are none."""
    return isinstance(second, Value) and _reads(axes(second) or (), second.ndim, rows=False, columns=True)


def transforms_positions(step: Step, axes: Axes) -> bool:
    """Return whether a step is a Fourier transform over positions, of whichever direction."""
    name, source = display_name(step.operation), step.values[0]
    if name not in {"fft_c2c", "fft_r2c", "fft_c2r"}:
        return False
    dims = {dim % source.ndim for dim in step.args[1]}
    positions = axes(source)
    if positions is not None:
        return not dims.isdisjoint(positions)
    return 1 in dims if source.ndim == 3 else source.ndim == 4 and len(dims) > 1


def is_inverse(step: Step) -> bool:
    """Return whether a Fourier transform makes positions of frequencies."""
    return display_name(step.operation) == "fft_c2r" or not step.args[-1]


def _reads(axes: Collection[int], dims: int, *, rows: bool, columns: bool) -> bool:
    return (dims - 2 in axes) == rows and (dims - 1 in axes) == columns


def _differs(places: Tensor, axis: int) -> bool:
    if places.shape[axis] == 1 or places.stride(axis) == 0 or not places.numel():
        return False
    # what is moved is the same number still
    return bool((places != places.narrow(axis, 0, 1)).any())
