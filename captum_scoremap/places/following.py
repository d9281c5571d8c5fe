"""Where the elements of a run's values stand, followed from the images on, step by step.

An element stands where what it is made of does. What is moved takes its position along; a sum stands at the mean of
what is summed, and nowhere if that is all along both sides of the image; of a product of matrices the rows stand where
those of the first factor do, or the columns where those of the second do; a map that convolutions, pooling or
interpolation make of another has its cells in the same order.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.layout import map_channel_dim
from captum_scoremap.rules import Value, display_name, tensors_in
from captum_scoremap.tape import Step, Tape

from .moves import moved
from .positions import SEAM, Positions, begins, cell_centers, image_of_all, shared, upright

__all__ = ["Choice", "Found", "positions_in"]

Found = tuple[Positions, ...]
"""Where elements stand; the weights of an attention, with positions in rows and in columns, have those of both."""

Choice = tuple[str, Tensor]
"""An operation that moves elements, and numbers that settle where from: indices, switches, a grid."""

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the first factor is
_ATTENTION = "scaled_dot_product_attention"
_SAMPLING = "grid_sample"
_FOLDING = "col2im"
_FOURIER = {"fft_c2c", "fft_r2c", "fft_c2r"}
_REDUCING = {"sum", "mean", "amax", "amin", "max", "min", "logsumexp", "var", "std", "norm", "linalg_vector_norm"}
_COPYING = {"clone", "contiguous", "alias", "to_copy", "detach"}
_JOINING = {"cat", "stack", "constant_pad_nd"}
# Each element is the mean of some.
_AVERAGING = {"roi_align", "ps_roi_align", _SAMPLING, _FOLDING}
# Each is one of those before, as for rules that say so: of those, these write over some.
_WRITING = {
    *("copy", "index_put", "index_copy", "scatter", "masked_scatter"),
    *("as_strided_scatter", "slice_scatter", "select_scatter"),
}
_CHOOSING = {
    *("im2col", "topk", "sort", *_WRITING),
    *(f"{kind}_pad{axes}d" for kind in ("reflection", "replication") for axes in (1, 2, 3)),
}


def positions_in(tape: Tape, seen: Sequence[int]) -> tuple[dict[Value, Found], list[Choice]]:
    """Return where the elements of a run's values stand, of those of which it is known.

    Args:
        tape: The run.
        seen: Shape of the images, or of what the network makes of them first, (N, C, H, W).

    Returns:
        Value to positions, and the numbers by which elements were chosen, or where they were sampled.
    """
    following = _Following(tuple(seen))
    for value in tape.inputs:
        if value is not None and value.ndim == 4:
            following.known[value] = (upright(value.shape, value.device),)
    for step in tape.steps:
        following.follow(step)
    return following.known, following.choices


class _Following:
    def __init__(self, seen: tuple[int, ...]) -> None:
        self.known: dict[Value, Found] = {}
        self.choices: list[Choice] = []
        self._seen = seen
        self._before: list[Found] = []  # where what frequencies are of stood
        self._made: dict[Hashable, list[Found]] = {}  # blocks of a network are alike

    def follow(self, step: Step) -> None:
        """Note where the elements of what a step makes stand."""
        if any(0 in output.shape for output in step.outputs):  # of nothing there is no position
            return
        for value in step.values:
            begun = None if value in self.known else begins(value, self._seen)
            self.known.update({} if begun is None else {value: (begun,)})
        made = self._found(step) if any(value in self.known for value in step.values) else []
        self.known.update((output, one) for output, one in zip(step.outputs, made, strict=False) if one)
        for output in step.outputs if _sees_neighbors(step) else ():
            shape, one = tuple(output.shape), self.known.get(output)
            is_unknown = one is None or max(one[0].grid) == 1
            # what sees several cells makes a map, if its proportions do not tell otherwise
            if is_unknown and len(shape) == 4 and map_channel_dim(shape, self._seen) == 1 and not _repeats(step):
                self.known[output] = (upright(shape, output.device),)

    def _found(self, step: Step) -> list[Found]:
        name, (source, *_) = display_name(step.operation), (one for one in step.values if one in self.known)
        at = _PRODUCTS.get(name)
        if at is not None and len(step.args) >= at + 2:
            return [self._product(step.args[at], step.args[at + 1], step.outputs[0])]
        if name == _ATTENTION:
            return [self._product(step.args[0], step.args[2], step.outputs[0])]
        if name in _FOURIER:
            return [self._transformed(step)]
        if _makes_maps(name):
            return self._remembered(step, (_groups(step), _sees_neighbors(step), _kernel(step)), self._mapped)
        if name == _SAMPLING and not _are_alike(step.values[0].shape, step.outputs[0].shape):
            return []  # some points
        if name in _COPYING or (name in _WRITING and _of_image(step) == [step.args[0]]):  # constants over a map
            return [self.known[source]]
        if step.rule.moves or name in _AVERAGING or name in _CHOOSING:
            key = (str(step.args[1:]), str(step.kwargs))
            given = tensors_in((step.args, dict(step.kwargs), step.frozen()))
            if len(step.values) == 1 and not given:
                return self._remembered(step, key, self._folded if name == _FOLDING else self._moved)
            made = self._moved(step)
            if any(one.are_known for found in made for one in found):
                self.choices += [(name, one) for one in given if name in _AVERAGING or not one.is_floating_point()]
            return made
        if name in _REDUCING and step.argument("dim") is not None:
            return [tuple(_reduced(one, step.argument("dim"), step.outputs[0].ndim) for one in self.known[source])]
        return [self._each(step, output) for output in step.outputs]

    def _remembered(self, step: Step, key: Hashable, make: Any) -> list[Found]:
        """Return what a step makes of positions, or what the same step made of them."""
        (source, *_) = step.values
        whole = step.operation, key, self.known.get(source), source.shape, step.outputs[0].shape
        if whole not in self._made:
            self._made[whole] = make(step)
        return self._made[whole]

    def _product(self, first: Any, second: Any, output: Value) -> Found:
        """Return where the rows of a first factor, or queries, stand, or the columns of a second one."""
        rows, columns = output.ndim - 2, output.ndim - 1
        of_first, of_second = (self.known.get(one, ()) if isinstance(one, Value) else () for one in (first, second))
        found: list[Positions] = []
        crossed: list[Positions] = []
        sides = (of_first, of_second, second, rows, columns), (of_second, of_first, first, columns, rows)
        for own, others, by, kept, summed in sides:
            is_square = isinstance(by, Tensor) and by.shape[-1] == by.shape[-2]
            # of the same rows for each window it is not known which
            batched = {axis for other in others for axis in other.axes if axis < rows}
            for one in own:
                left = one.summed([summed])
                left = one if is_square and left.lack(one) else left  # it mixes positions among themselves
                found.append(left)
                crossed += [left] if left.are_known and kept in left.axes and batched <= {*left.axes} else []
        if not found:
            return ()
        known = sorted((one for one in found if one.are_known), key=lambda one: -len(one.axes))
        image = max((one.image for one in found), key=Tensor.numel)
        chosen = crossed[:2] or known[:1] or found[:1]
        return tuple(one if one.image.numel() == image.numel() else one.of(image) for one in chosen)

    def _transformed(self, step: Step) -> Found:
        """Return where frequencies stand, which is nowhere, or a map made of them: where one of its size stood."""
        (source,), (output,) = step.values, step.outputs
        found, dims = self.known[source], {dim % source.ndim for dim in step.args[1]}
        image = image_of_all(found[0].image, dims)
        if not dims.isdisjoint(found[0].axes):
            self._before.append(found)
            return (found[0].nowhere().of(image),)
        is_inverse = display_name(step.operation) == "fft_c2r" or not step.args[-1]
        for before in reversed(self._before) if is_inverse and not found[0].axes else ():
            sizes = torch.broadcast_shapes(before[0].row.shape, before[0].column.shape)
            is_whole = len(sizes) == output.ndim and all(output.shape[axis] == sizes[axis] for axis in before[0].axes)
            if is_whole and dims.issuperset(before[0].axes):
                return tuple(one.of(image) for one in before)
        return tuple(one.of(image) for one in found)

    def _mapped(self, step: Step) -> list[Found]:
        """Return where the cells of maps, (N, C, h, w), stand that are made of others."""
        source = step.values[0]
        is_first = step.args[0] is source or not isinstance(step.args[0], Value)
        outputs = [one for one in step.outputs if one.ndim == source.ndim]
        if not is_first or source not in self.known:
            return []
        return [tuple(self._map(step, one, source, output) for one in self.known[source]) for output in outputs]

    def _map(self, step: Step, one: Positions, source: Value, output: Value) -> Positions:
        if display_name(step.operation) == "conv":
            groups, channels = _groups(step), output.shape[1]
            left = one.summed([1])
            if groups > 1 and left is not one:
                one = one.changed(lambda part: _grouped(part, groups, channels)).settled()
            elif not left.lack(one) or source.shape[1] != channels:
                one = left
        sees_frame = display_name(step.operation) == "conv" and tuple(source.shape) == self._seen
        if sees_frame or (_sees_neighbors(step) and output.ndim == 4):
            one = _straightened(_unpadded(one, source.shape, _kernel(step)), source.shape)
        for axis in range(2, output.ndim):
            one = _resampled(one, axis, output.shape[axis])
        return one

    def _moved(self, step: Step) -> list[Found]:
        given = [self.known.get(value) for value in step.values]
        count = max(len(one) for one in given if one is not None)
        each = [
            self._moved_once(step, [one[min(at, len(one) - 1)] if one else None for one in given])
            for at in range(count)
        ]
        return [tuple(one) for one in zip(*each, strict=True)]

    def _folded(self, step: Step) -> list[Found]:
        """Return where sums over windows stand: where a map's cells do, if windows stand about where they were cut."""
        return [tuple(_straightened(one, step.outputs[0].shape) for one in found) for found in self._moved(step)]

    def _moved_once(self, step: Step, given: Sequence[Positions | None]) -> list[Positions]:
        name = display_name(step.operation)
        known = [one for one in given if one is not None]
        grid = max(one.grid for one in known)
        # beside what stands somewhere, what is summed up along a side stands nowhere
        fitting = [
            None if one is None else one.nowhere() if one.grid.count(1) > grid.count(1) else one for one in given
        ]

        def numbers(of: Callable[[Positions], Tensor], *, fills: bool = False) -> list[Tensor]:
            zeros = [torch.zeros((1,) * value.ndim, device=value.device) for value in step.values]
            each = [zero if one is None else of(one) for one, zero in zip(fitting, zeros, strict=True)]
            return moved(step, each, fills=fills)

        parts = [
            numbers(lambda one: one.image, fills=True),
            numbers(lambda one: one.row),
            numbers(lambda one: one.column),
        ]
        if name in _AVERAGING:
            shares = [share.clamp_min(1e-6) for share in numbers(lambda one: (one.row > 0).to(one.row.dtype))]
            parts = [[part / share for part, share in zip(each, shares, strict=True)] for each in parts]
            parts[0] = [image.round() for image in parts[0]]
        found = []
        for image, row, column in zip(*parts, strict=True):
            one = Positions(shared(image, fills=name in _JOINING), shared(row), shared(column), grid)
            is_fewer = one.row.numel() + one.column.numel() < max(two.row.numel() + two.column.numel() for two in known)
            is_nowhere = one.row.numel() == 1 and not bool(one.row)
            one = one.refined([two.grid for two in known]) if len(known) > 1 else one
            found.append(one.nowhere() if is_nowhere else one.settled() if is_fewer and name not in _AVERAGING else one)
        return found

    def _each(self, step: Step, output: Value) -> Found:
        """Return where elements stand that are made one by one, or row by row."""
        followed = [one for one in _of_image(step) if one in self.known]  # others are where shapes let one guess
        known = followed or [one for one in step.values if one in self.known]
        values = sorted(known, key=lambda value: value.step)
        given = [[_aligned(one, value.shape, output.shape) for one in self.known[value]] for value in values]
        fitting = [one for (one, *_) in given if one is not None]
        if not fitting:
            return ()
        (first, *others), beside = fitting, [two for (_, *rest) in given for two in rest if two is not None]
        for other in others:
            first = _merged(first, other)
        return (first, *beside[:1])


def _of_image(step: Step) -> list[Value]:
    """Return the values of a step that depend on the image, not on layers that are constants alone."""
    return [value for value in step.values if value.sites & Value.IMAGE]


def _reduced(one: Positions, dims: Any, left: int) -> Positions:
    """Return where sums over some axes stand, which may be gone."""
    count = one.row.dim()
    axes = [dim % count for dim in (dims if isinstance(dims, (list, tuple)) else [dims])] or list(range(count))
    one = one.summed(axes)
    kept = [axis for axis in range(count) if axis not in axes]
    return one if left == count else one.changed(lambda part: part.reshape([part.shape[axis] for axis in kept]))


def _aligned(one: Positions, before: Sequence[int], after: Sequence[int]) -> Positions | None:
    """Return positions as those of a tensor that is broadcast to another, or is of the same rows; None if it is not."""
    if tuple(before) == tuple(after):
        return one
    added = len(after) - len(before)
    if added >= 0 and all(size in {1, other} for size, other in zip(before, after[added:], strict=True)):
        return one.changed(lambda part: part.reshape((1,) * added + part.shape)) if added else one
    if not added:
        return one.summed([axis for axis, sizes in enumerate(zip(before, after, strict=True)) if sizes[0] != sizes[1]])
    if added == 1 and tuple(before) == tuple(after[:-1]):  # real numbers of complex ones
        return one.changed(lambda part: part.unsqueeze(-1))
    return _reduced(one, -1, len(after)) if added == -1 and tuple(before[:-1]) == tuple(after) else None


def _merged(one: Positions, other: Positions) -> Positions:
    """Return the positions of two, side by side of the one that tells them better, the first if both do."""
    is_known = one.are_known or not other.are_known
    row = one if one.grid[0] >= other.grid[0] and is_known else other
    column = one if one.grid[1] >= other.grid[1] and is_known else other
    image = max(one.image, other.image, key=Tensor.numel)
    if row is column and image.numel() == row.image.numel():
        return row
    return Positions(image, row.row, column.column, (row.grid[0], column.grid[1]))


def _grouped(part: Tensor, groups: int, channels: int) -> Tensor:
    """Return means over each group's channels, for each of those that are made of them."""
    if part.shape[1] == 1:
        return part
    return shared(part.unflatten(1, (groups, -1)).mean(2).repeat_interleave(channels // groups, 1))


def _resampled(one: Positions, axis: int, after: int) -> Positions:
    """Return positions with more or fewer of them along an axis, at the same distances all along it."""
    if all(part.shape[axis] in {1, after} for part in (one.image, one.row, one.column)):
        return one
    if after == 1:
        return one.summed([axis])

    def side(part: Tensor, cells: int) -> tuple[Tensor, int]:
        before = part.shape[axis]
        if before in {1, after}:
            return part, cells
        whole = part.movedim(axis, -1)
        places = (torch.arange(after, device=part.device) + 0.5) * (before / after) - 0.5
        low = places.floor().clamp(0, before - 2).long()
        first, second = whole[..., low], whole[..., low + 1]
        known = (first > 0) & (second > 0)
        beyond = places - low
        found = first + beyond * torch.where(known, second - first, 0)
        # a seam is a border to either side of it: no mean of both, but as far from the nearer one as elsewhere
        step = _direction(whole) / cells
        beside = torch.where(beyond > 0.5, second + (beyond - 1) * step, first + beyond * step)
        found = torch.where(known & ((second - first).abs() * cells > SEAM), beside, found)
        found = torch.where(first > 0, found, second)
        highest = whole.flatten(0, -2).amax(0)
        is_along = len(highest[highest > 0].unique()) > 1  # rather than nowhere at some cells
        return found.movedim(-1, axis), max(1, round(cells * after / before)) if is_along else cells

    (row, rows), (column, columns) = side(one.row, one.grid[0]), side(one.column, one.grid[1])
    return Positions(image_of_all(one.image, [axis]), row, column, (rows, columns))


def _direction(whole: Tensor) -> Tensor:
    """Return whether positions rise along the last axis, 1, or fall, -1, by those closest to one another; (..., 1)."""
    steps = whole.diff()
    counts = (whole[..., 1:] > 0) & (whole[..., :-1] > 0) & (steps != 0)
    nearness = torch.where(counts, 1 / steps, 0).sum(-1, keepdim=True)
    return torch.where(nearness < 0, -1, 1)


def _unpadded(one: Positions, shape: Sequence[int], kernel: int | None) -> Positions:
    """Return the positions of a map with padding around it, where all of it is taken for the image.

    Before pooling that is less than a kernel, which is the pooling's own padding; there may be more in windows. Of a
    map in another order, as one that is shifted round, they are those without the padding, and as many fewer.
    """
    if not {2, 3}.issuperset(one.axes) or one.are_in_order or not bool((one.row > 0).any()):
        return one
    has_gaps = not bool((one.row > 0).all())
    parts, grid = [one.row, one.column], list(one.grid)
    for at, part in enumerate(parts):
        for axis in (2, 3):
            sizes = [-1 if other == axis else 1 for other in range(4)]
            along = part.amax([other for other in range(4) if other != axis])
            start, inside = _without_padding(along)
            padding = len(along) - len(inside)
            is_padded = has_gaps or padding > 0
            if not is_padded or bool(inside[0] == inside[-1]) or (kernel is not None and padding >= kernel):
                continue
            if not _is_in_order(inside) and bool(((part == along.view(sizes)) | (part == 0)).all()):
                is_around = torch.equal(along[start : start + len(inside)], inside)
                parts[at] = inside.view(sizes) if is_around else part
                continue
            centers = cell_centers(shape[axis], part.device)
            centers = centers if bool(inside[0] < inside[-1]) else centers.flip(0)
            parts[at] = centers.view(sizes)
            grid[at] = shape[axis]
    return Positions(one.image, parts[0], parts[1], (grid[0], grid[1]))


def _straightened(one: Positions, shape: Sequence[int]) -> Positions:
    """Return positions of a map, less than a cell from where the image's cells stand, turned or not, as those cells."""
    is_straight = one.grid == tuple(shape[2:]) == (one.row.numel(), one.column.numel())
    if is_straight or not {1, 2, 3}.issuperset(one.axes):
        return one
    for axes in (2, 3), (3, 2):
        row, column = (
            _straight(part, axis, shape[axis]) for part, axis in zip((one.row, one.column), axes, strict=True)
        )
        if row is not None and column is not None:
            return Positions(one.image, row, column, (shape[axes[0]], shape[axes[1]]))
    return one


def _straight(part: Tensor, axis: int, count: int) -> Tensor | None:
    """Return the centers of cells along an axis, either way, from which rows, or columns, are less than one away."""
    if part.shape[axis] != count:
        return None
    centers = cell_centers(count, part.device).view([-1 if other == axis else 1 for other in range(4)])
    for one in centers, centers.flip(axis):
        if bool(((part > 0) & ((part - one).abs() * count < 1)).all()):
            return one
    return None


def _without_padding(along: Tensor) -> tuple[int, Tensor]:
    """Return the rows, or columns, of a side without what stands nowhere around it, or is of its own cells again.

    The first is where they start. Where any part would do, as of a side that goes round, it is the one in the middle.
    """
    known, places = along[along > 0], along.tolist()
    count = len(set(places))
    if len(known) < len(along) or count == len(along):
        return int((along > 0).nonzero()[0]) if len(known) else 0, known
    # of two in the middle, the one without a seam
    starts = sorted(range(len(along) - count + 1), key=lambda at: not _is_in_order(along[at : at + count]))
    for at in sorted(starts, key=lambda at: abs(2 * at + count - len(along))):
        cells = places[at : at + count]
        is_whole = len(set(cells)) == count
        if is_whole and _is_copied(places[:at][::-1], cells) and _is_copied(places[at + count :], cells[::-1]):
            return at, along[at : at + count]
    return 0, known


def _is_in_order(along: Tensor) -> bool:
    """Return whether all rows, or columns, of a side are each further on than the one before, or all further back."""
    turns = along.diff().sign()
    return bool(((turns == turns[:1]) & (turns != 0)).all())


def _is_copied(outward: Sequence[float], cells: Sequence[float]) -> bool:
    """Return whether what is before some cells is those mirrored, the first one again, or those of the other end."""
    count = len(outward)
    copies = [cells[1 : count + 1], [cells[0]] * count, cells[::-1][:count]]
    return count < len(cells) and outward in copies


def _makes_maps(name: str) -> bool:
    """Return whether an operation takes and returns maps, (N, C, h, w)."""
    return name == "conv" or ("pool" in name and "roi" not in name) or "upsample" in name


def _groups(step: Step) -> int:
    """Return in how many groups a convolution has its channels."""
    groups: int = step.argument("groups", default=1) if display_name(step.operation) == "conv" else 1
    return groups


def _kernel(step: Step) -> int | None:
    """Return the larger side of a pooling's kernel; None of what has none."""
    kernel: Any = step.argument("kernel_size") if "pool" in display_name(step.operation) else None
    return None if kernel is None else max(kernel) if isinstance(kernel, (list, tuple)) else int(kernel)


def _sees_neighbors(step: Step) -> bool:
    """Return whether a step takes several cells of a map for each of its output."""
    name = display_name(step.operation)
    if name == "conv" and len(step.args) > 1 and isinstance(step.args[1], (Tensor, Value)):
        return max(step.args[1].shape[2:], default=1) > 1
    return name == _FOLDING or (name != "conv" and _makes_maps(name))


def _repeats(step: Step) -> bool:
    """Return whether a step makes copies of one cell, as pooling to a fixed size or interpolation of a small map."""
    return display_name(step.operation) != "conv" and math.prod(step.values[0].shape[2:]) == 1


def _are_alike(before: Sequence[int], after: Sequence[int]) -> bool:
    """Return whether rows and columns are in about the same proportions."""
    return 1 / 1.5 < before[-2] * after[-1] / max(before[-1] * after[-2], 1) < 1.5
