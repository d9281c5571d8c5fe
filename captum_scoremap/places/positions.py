"""Which values stand at positions of the image, and which only look like it.

Object queries, latents and regions of interest may be as many as the cells of a map, and a tensor's shape does not
tell them from positions. Where they come from does: the rows of a matrix product are those of its first factor, those
of an attention those of its queries, and what is gathered, or pooled from a region, is somewhere else.
"""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from captum_scoremap.rules import Value, display_name
from captum_scoremap.tape import Step, Tape

from .sums import is_inverse

__all__ = ["makes_maps", "may_be_elsewhere", "row_sources", "sees_neighbors", "values_elsewhere", "values_folded"]

_SAMPLING = "grid_sample"
_ATTENTION = "scaled_dot_product_attention"
# Where the argument is that says which row of the output is which.
_ROWS = {
    **dict.fromkeys(("mm", "bmm", "matmul", _ATTENTION), 0),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", _SAMPLING), 1),
}
_REGIONS = {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}
_CHOOSING = {"index", "_unsafe_index", "unsafe_index", "index_select", "gather"}
_ORDERING = {"take", "masked_select", "topk", "sort", "kthvalue"}
_TURNING = {"flip", "roll", "rot90", "transpose", "permute"}
_STRAYING = {
    *(*_REGIONS, *_CHOOSING, *_ORDERING, *_TURNING),
    *(_SAMPLING, _ATTENTION, "matmul", "bmm", "baddbmm", "im2col"),
}


def row_sources(step: Step, output: Value) -> Sequence[Value]:
    """Return the live arguments of a step whose rows those of one of its outputs are.

    They are the first factor of a product, the queries of an attention; of other steps the arguments of the output's
    shape, or all where there are none. Where the rows are those of a constant there are none.
    """
    name = display_name(step.operation)
    alike = [value for value in step.values if value.shape == output.shape]
    if name not in _ROWS or len(step.args) <= _ROWS[name]:
        return alike or step.values
    rows = step.args[_ROWS[name]]
    if isinstance(rows, Value):
        return [rows]
    if name == _SAMPLING:  # the image turned or warped, or some points of it
        return step.values if _are_alike(step.values[0].shape[2:], output.shape[2:]) else []
    return [] if name == _ATTENTION else alike  # a constant matrix may mix positions


def makes_maps(name: str) -> bool:
    """Return whether an operation takes and returns maps, (N, C, h, w)."""
    return name == "conv" or "pool" in name or "upsample" in name


def values_elsewhere(
    tape: Tape,
    images: int,
    moved: Collection[Value] = (),
    nowhere: Collection[Value] = (),
    transformed: Collection[Value] = (),
) -> frozenset[Value]:
    """Return the values of a run on N images whose rows, or rows and columns, are no positions in the image's order.

    Args:
        tape: The run.
        images: How many images there are.
        moved: Values in which every cell of the image is known to stand at its place.
        nowhere: Values whose rows, or rows and columns, are known to be no whole map's in order.
        transformed: What Fourier transforms make of positions, or positions of.

    Returns:
        The values.
    """
    elsewhere: set[Value] = set()
    asked: set[Value] = set()  # products with a constant first factor: channels, or scores of constant queries
    for step in tape.steps:
        # constants, at a layer that is named
        elsewhere.update(value for value in step.values if not value.is_of_image)
        name = display_name(step.operation)
        is_chosen = name in _REGIONS or name in _ORDERING or (name in _CHOOSING and _chooses_positions(step, images))
        for output in step.outputs:
            if output in moved:
                continue
            sources = row_sources(step, output)
            if output in transformed:  # positions again, of frequencies
                is_back = is_inverse(step) and all(value in elsewhere for value in sources)
                elsewhere.update([] if is_back else [output])
            elif is_chosen or output in nowhere or (not sources and name in {_ATTENTION, _SAMPLING}):
                elsewhere.add(output)
            elif not sources:
                asked.add(output)
            elif all(value in elsewhere for value in sources):
                elsewhere.add(output)
            elif all(value in asked for value in sources):
                asked.add(output)
                if output.gate:  # the attention itself, and the scores that it is made of
                    elsewhere.update(_asked_by(tape, output, asked))
    return frozenset(elsewhere)


def may_be_elsewhere(tape: Tape) -> bool:
    """Return whether a run has operations after which rows and columns may be no positions in order; at a glance."""
    return any(
        display_name(step.operation) in _STRAYING or (step.rule.moves and any(one.ndim > 4 for one in step.outputs))
        for step in tape.steps
    )


def values_folded(tape: Tape) -> frozenset[Value]:
    """Return the values whose positions may stand in another order, or in the place of channels.

    Rows and columns that were cut into windows or patches, (N, C, rows, side, columns, side), may come together as
    (N, C, pixels of a patch, patches), which looks like a map; a convolution or pooling over several cells sees maps.

    Args:
        tape: The run.

    Returns:
        The values.
    """
    folded: set[Value] = set()
    for step in tape.steps:
        if display_name(step.operation) == "im2col":
            folded.update(step.outputs)
        elif step.rule.moves:
            source = step.values[0]
            is_cut = any(one.ndim > max(source.ndim, 4) and one.shape[-2:] != source.shape[-2:] for one in step.outputs)
            if is_cut or not folded.isdisjoint(step.values):
                folded.update(step.outputs)
        elif folded and not folded.isdisjoint(step.values) and not sees_neighbors(step):
            folded.update(output for output in step.outputs if not folded.isdisjoint(row_sources(step, output)))
    return frozenset(folded)


def sees_neighbors(step: Step) -> bool:
    """Return whether a step takes several cells of a map for each of its output."""
    name = display_name(step.operation)
    if name == "conv" and len(step.args) > 1 and isinstance(step.args[1], (Tensor, Value)):
        return max(step.args[1].shape[2:], default=1) > 1
    return name != "conv" and makes_maps(name)


def _asked_by(tape: Tape, value: Value, asked: Collection[Value]) -> Iterator[Value]:
    """Yield a value, and what its rows came from since the product with constant queries."""
    sources: Sequence[Value] = [value]
    while sources and sources[0] in asked:
        yield sources[0]
        sources = row_sources(tape.steps[sources[0].step], sources[0])


def _chooses_positions(step: Step, images: int) -> bool:
    """Return whether a step takes some positions of its input, rather than some images or channels."""
    source, which = step.values[0], step.args[1]
    if isinstance(which, int):
        dims = {which % max(source.ndim, 1)}
    else:
        dims = {dim for dim, one in enumerate(which) if one is not None}
    if source.ndim == 4:
        return bool(dims & {2, 3})
    return bool(dims - {0}) or source.shape[:1] != (images,)


def _are_alike(before: Sequence[int], after: Sequence[int]) -> bool:
    """Return whether rows and columns are in about the same proportions."""
    return 1 / 1.5 < before[-2] * after[-1] / max(before[-1] * after[-2], 1) < 1.5
