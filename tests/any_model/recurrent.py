"""Recurrent layers: every kind, in both directions, in layers, projected, packed, and step by step."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from . import Case

LENGTHS = (7, 4, 5)


def sequences() -> Tensor:
    """Three of seven steps, (N, steps, C)."""
    return torch.randn(3, 7, 5, dtype=torch.float64)


class Recurrent(nn.Module):
    """A recurrent layer and a linear head on all its steps, or on its last state."""

    def __init__(self, kind: str, head: str = "steps", packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(5, 6, **options)
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.head, self.kind, self.packed = nn.Linear(width, 3), head, packed

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        if self.packed:
            lengths = torch.tensor(LENGTHS)
            steps, state = self.rnn(pack_padded_sequence(x, lengths, self.rnn.batch_first, enforce_sorted=False))
            steps, _ = pad_packed_sequence(steps, batch_first=True)
        else:
            steps, state = self.rnn(x)
            steps = steps if self.rnn.batch_first else steps.transpose(0, 1)
        if self.kind == "steps":
            return self.head(steps.relu().sum(1))
        state = state[1 if self.kind == "cell" else 0] if isinstance(state, tuple) else state
        last = state[-2:] if self.rnn.bidirectional else state[-1:]
        return self.head(last.transpose(0, 1).flatten(1))


class ByCell(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head = getattr(nn, kind)(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class OfSeveralLengths(nn.Module):
    """Sequences packed from a list, each of its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_sequence([one[:length] for one, length in zip(x, LENGTHS, strict=True)], enforce_sorted=False)
        return self.head(self.rnn(packed)[1][-1])


def case(kind: str, *args: Any, **options: Any) -> Case:
    return Case(lambda: (Recurrent(kind, *args, **options), sequences()))


CASES = {
    f"{kind}{' in both directions' * both}, {layers} layer{'s' * (layers > 1)}{', packed' * packed}": case(
        kind, packed=packed, bidirectional=both, num_layers=layers, batch_first=layers == 1
    )
    for kind, both, layers, packed in itertools.product(("RNN", "LSTM", "GRU"), (False, True), (1, 2), (False, True))
} | {
    "LSTM, its last state": case("LSTM", "state", batch_first=True, num_layers=2),
    "LSTM, its last state, packed": case("LSTM", "state", True, batch_first=True, bidirectional=True),
    "LSTM, its cell": case("LSTM", "cell", batch_first=True),
    "LSTM, projected": case("LSTM", batch_first=True, proj_size=4, num_layers=2),
    "LSTM, projected, packed": case("LSTM", "steps", True, batch_first=True, proj_size=4, bidirectional=True),
    "LSTM without biases": case("LSTM", batch_first=True, bias=False),
    "LSTM with dropout": case("LSTM", batch_first=True, dropout=0.5, num_layers=2),
    "RNN of ReLUs": case("RNN", batch_first=True, nonlinearity="relu", num_layers=2),
    "GRU, sequences in a list": Case(lambda: (OfSeveralLengths(), sequences())),
    **{kind: Case(lambda kind=kind: (ByCell(kind), sequences())) for kind in ("RNNCell", "LSTMCell", "GRUCell")},
}
