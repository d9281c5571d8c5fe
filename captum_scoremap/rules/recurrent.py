"""Recurrent layers, which kernels compute whole, in the operations of each step: gates are sigmoids, and are frozen."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RECURRENT"]


# The hidden state, (N, H), and of an LSTM its cell.
_State = tuple[Tensor, ...]
# From the products of the input and of the hidden state with their weights, and the state, to the next state.
_Step = Callable[[Tensor, Tensor, _State], _State]


def _lstm_step(entering: Tensor, recurring: Tensor, state: _State) -> _State:
    entry, keep, update, exit_ = (entering + recurring).chunk(4, -1)
    cell = keep.sigmoid() * state[1] + entry.sigmoid() * update.tanh()
    return exit_.sigmoid() * cell.tanh(), cell


def _gru_step(entering: Tensor, recurring: Tensor, state: _State) -> _State:
    (reset, update, new), (own_reset, own_update, own_new) = entering.chunk(3, -1), recurring.chunk(3, -1)
    new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
    return ((state[0] - new) * (update + own_update).sigmoid() + new,)


_STEPS: Sequence[_Step] = (  # by cuDNN's mode
    lambda entering, recurring, state: ((entering + recurring).relu(),),
    lambda entering, recurring, state: ((entering + recurring).tanh(),),
    _lstm_step,
    _gru_step,
)


class _Weights(NamedTuple):
    """The weights of a layer in one direction."""

    entering: Tensor
    recurring: Tensor
    entering_bias: Tensor | None = None
    recurring_bias: Tensor | None = None
    projection: Tensor | None = None


def _through(
    inputs: Tensor, sizes: Sequence[int], weights: _Weights, state: _State, step: _Step, *, is_reversed: bool
) -> tuple[Tensor, _State]:
    """Go through sequences, the last of which may end on the way, or begin, where they are of several lengths.

    The steps stand one after another, (rows, C), each of so many of the first sequences as ``sizes`` says.

    Returns:
        The hidden state of each step, (rows, H); and the state at each sequence's end, of the shape it begins with.
    """
    products = F.linear(inputs, weights.entering, weights.entering_bias).split(list(sizes))
    way = -1 if is_reversed else 1
    outputs: list[Tensor] = []
    whole = state
    for entering in products[::way]:
        count = len(entering)
        now = tuple(one[:count] for one in whole)
        after = step(entering, F.linear(now[0], weights.recurring, weights.recurring_bias), now)
        if weights.projection is not None:
            after = (after[0] @ weights.projection.t(), *after[1:])
        outputs.append(after[0])
        is_all = count == len(whole[0])
        whole = after if is_all else tuple(map(torch.cat, zip(after, (one[count:] for one in whole), strict=True)))
    return torch.cat(outputs[::way]), whole


def _cudnn_rnn(
    input: Tensor,
    weight: Sequence[Tensor],
    weight_stride0: int,
    weight_buf: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    mode: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Sequence[int],
    dropout_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return steps, states and cells of all layers, in both directions, and nothing in place of what training needs."""
    if train and dropout > 0:
        raise NotImplementedError(
            "cuDNN keeps to itself what dropout between recurrent layers drops. Call model.eval()."
        )
    is_transposed = batch_first and not batch_sizes  # what is packed has its steps first
    by_step = input.transpose(0, 1) if is_transposed else input
    sizes = batch_sizes or [by_step.shape[1]] * by_step.shape[0]
    steps = by_step if batch_sizes else by_step.flatten(0, 1)
    states: list[_State] = []
    for _ in range(num_layers):
        outputs = []
        for is_reversed in (False, True)[: 2 if bidirectional else 1]:
            at = len(states)
            own = weight[at * weight_stride0 : (at + 1) * weight_stride0]  # biases may be missing
            weights = _Weights(*own[:-1])._replace(projection=own[-1]) if proj_size else _Weights(*own)
            before = (hx[at],) if cx is None else (hx[at], cx[at])
            found, after = _through(steps, sizes, weights, before, _STEPS[mode], is_reversed=is_reversed)
            outputs.append(found)
            states.append(after)
        steps = torch.cat(outputs, -1)
    output = steps if batch_sizes else steps.unflatten(0, by_step.shape[:2])
    output = output.transpose(0, 1) if is_transposed else output
    nothing = input.new_empty(0)
    hidden, cell, *_ = (*map(torch.stack, zip(*states, strict=True)), nothing)
    return output, hidden, cell, nothing, nothing


def _mkldnn_rnn_layer(
    input: Tensor,
    weight0: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    hx_: Tensor,
    cx_: Tensor,
    reverse: bool,
    batch_sizes: Any,
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer of an LSTM in one direction, (steps, N, C)."""
    weights = _Weights(weight0, weight1, *((weight2, weight3) if has_biases else ()))
    before = tuple(one.reshape(one.shape[-2:]) for one in (hx_, cx_))
    count, images = input.shape[:2]
    found, (hidden, cell) = _through(
        input.flatten(0, 1), [images] * count, weights, before, _lstm_step, is_reversed=reverse
    )
    found = found.unflatten(0, (count, images))
    return found, hidden[None], cell[None], input.new_empty(0)


def _lstm_cell(entering: Tensor, recurring: Tensor, cell: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    return (*_lstm_step(*_biased(entering, recurring, *biases), (cell, cell)), cell.new_empty(0))


def _gru_cell(entering: Tensor, recurring: Tensor, hidden: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    return (*_gru_step(*_biased(entering, recurring, *biases), (hidden,)), hidden.new_empty(0))


def _biased(
    entering: Tensor, recurring: Tensor, bias: Tensor | None = None, own_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return entering if bias is None else entering + bias, recurring if own_bias is None else recurring + own_bias


RECURRENT: dict[str, Callable[..., Any]] = {
    "mkldnn_rnn_layer": _mkldnn_rnn_layer,
    "_cudnn_rnn": _cudnn_rnn,
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_gru_cell": _gru_cell,
}
"""The same computation as each kernel's, with its signature."""
