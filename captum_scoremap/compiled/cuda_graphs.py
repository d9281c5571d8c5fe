"""Programs whose kernels are recorded as one CUDA graph and replayed, which spares the time of each launch."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Program
from .graph import Graph

__all__ = ["replayed"]

# Runs before the recording, as PyTorch advises: libraries set themselves up, and kernels are chosen.
_WARM_UP = 3


def replayed(program: Program, graph: Graph, arguments: Sequence[Tensor]) -> Program:
    """Return a program that replays the kernels of another.

    Args:
        program: The program, from arguments on a CUDA device to tensors there.
        graph: The graph that it runs, whose state it reads.
        arguments: Tensors that it is recorded for.

    Returns:
        From such arguments to the same tensors; the program itself where it cannot be recorded, with a warning.
    """
    try:
        return _Replayed(program, graph, arguments)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"the map runs without CUDA graphs, for it cannot be recorded ({reason}).", stacklevel=8)
        return program


class _Replayed:
    """A recorded program.

    A recording reads and writes where it did, so that arguments are copied to where they were then, and results from
    where they are left. Weights are read where they were, too: what is changed there in place is seen, and where one
    has been put elsewhere, the program is recorded again.
    """

    def __init__(self, program: Program, graph: Graph, arguments: Sequence[Tensor]) -> None:
        self._program, self._graph = program, graph
        self._arguments = [argument.clone() for argument in arguments]
        self._record()

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given)
        if self._addresses != self._read():
            self._record()
        self._recording.replay()
        return [result.clone() for result in self._results]

    def _read(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._graph.read()]

    def _record(self) -> None:
        with torch.cuda.device(self._arguments[0].device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._program(*self._arguments)
            current.wait_stream(stream)
            self._recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._recording):
                self._results = self._program(*self._arguments)
        self._addresses = self._read()
