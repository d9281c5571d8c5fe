"""A function of images that is compiled for one number of them, and computes any number with it."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .backends import Backend, Mode, Program, compiled
from .checked import check, run
from .cuda_graphs import replayed
from .graph import trace

__all__ = ["COMPILED", "Batches", "tolerance"]

Function = Callable[..., Sequence[Tensor]]

# How much a graph may differ from the eager map, as a fraction of its norm. A plain graph runs the same kernels; a
# compiled one rounds otherwise, so that a mask may flip where an activation is almost zero.
_PLAIN = {torch.float64: 1e-10, torch.float32: 1e-4}
COMPILED = {torch.float64: 1e-6, torch.float32: 1e-2}


class Batches:
    """A compiled function of images.

    Other numbers of images than it was compiled for go through it so many at a time, the last ones filled up with
    repetitions, whose results are dropped. That is right where each image has its part of every result, which is tried
    when it is compiled; where it has not, the function is compiled once for each number.

    Args:
        function: The function, to be traced; its arguments have one row for each image, and depend on nothing else.
        eager: What it must equal.
        arguments: An example.
        elsewhere: From an example to another one, at which it must be equal, too.
        modules: Those of the function, by name: their tensors are read anew at each call.
        backend: What runs the graph.
        mode: "reduce-overhead" to replay its kernels as a CUDA graph.
    """

    def __init__(
        self,
        function: Function,
        eager: Function,
        arguments: Sequence[Tensor],
        elsewhere: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        modules: Mapping[str, nn.Module],
        backend: Backend,
        mode: Mode = "default",
    ) -> None:
        self._function, self._eager, self._elsewhere = function, eager, elsewhere
        self._modules, self._backend, self._mode = modules, backend, mode
        self._programs: dict[int, _Compiled] = {}
        self._compile(arguments)

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Return what the function returns.

        Args:
            arguments: The arguments, with any number of images.

        Returns:
            The results.
        """
        count = len(arguments[0])
        if count not in self._programs:
            program = next(iter(self._programs.values()))
            if program.axes is not None:
                return self._in_parts(program, arguments)
            self._compile(arguments)
        return self._programs[count](arguments)

    def _in_parts(self, program: "_Compiled", arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of any number of images, as many at a time as a program takes."""
        starts = range(0, len(arguments[0]), program.size)
        parts = [self._filled(program, [one[at : at + program.size] for one in arguments]) for at in starts]
        return [torch.cat(each, axis) for each, axis in zip(zip(*parts, strict=True), program.axes or (), strict=True)]

    def _filled(self, program: "_Compiled", arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of fewer images than a program takes."""
        count = len(arguments[0])
        missing = program.size - count
        if not missing:
            return program(arguments)
        results = program([torch.cat([one, one[-1:].expand(missing, *one.shape[1:])]) for one in arguments])
        return [
            one.narrow(axis, 0, one.shape[axis] // program.size * count)
            for one, axis in zip(results, program.axes or (), strict=True)
        ]

    def _compile(self, arguments: Sequence[Tensor]) -> None:
        """Trace the function, compile it and check it against the eager one, here and elsewhere."""
        expected = list(self._eager(*arguments))
        graph = trace(self._function, arguments, self._modules)
        other = self._elsewhere(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they have been shown
            cases = [(arguments, expected), (other, list(self._eager(*other)))]
        for case, wanted in cases:
            check("the graph", run(graph, case), wanted, tolerance(_PLAIN, case))
        program = compiled(graph, arguments, self._backend)
        if self._mode == "reduce-overhead":
            program = replayed(program, graph, arguments)
        for case, wanted in cases if program is not graph else ():
            check("the compiled graph", run(program, case), wanted, tolerance(COMPILED, case))
        found = _Compiled(program, len(arguments[0]), [one.stride() for one in arguments])
        self._find_axes(found, [torch.cat(pair) for pair in zip(arguments, other, strict=True)], expected)
        self._programs[found.size] = found

    def _find_axes(self, program: "_Compiled", arguments: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Find along which dimension of each result the images lie, and try fewer of them, and more.

        One image alone, repeated to fill up, may hide that images mix: their mean is the image.
        """
        try:
            for count in {program.size - 1 or 2, program.size + 1}:
                images = [one[:count] for one in arguments]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    wanted = list(self._eager(*images))
                program.axes = [_axis_that_differs(one, whole) for one, whole in zip(wanted, results, strict=True)]
                check("the graph", self._in_parts(program, images), wanted, tolerance(COMPILED, images))
        except (RuntimeError, TypeError, ValueError, IndexError):
            # a model that takes one number of images, or mixes them
            program.axes = None


def _axis_that_differs(one: Tensor, other: Tensor) -> int:
    """Return the one dimension in which the shapes of two tensors differ.

    Raises:
        ValueError: If there is none, or several.
    """
    (axis,) = (at for at, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if len(set(sizes)) > 1)
    return axis


class _Compiled:
    """The program for one number of images.

    Attributes:
        size: The number.
        axes: Along which dimension of each result the images lie; None where the number cannot be another.
    """

    def __init__(self, program: Program, size: int, strides: Sequence[tuple[int, ...]]) -> None:
        self._program, self._strides = program, strides
        self.size = size
        self.axes: list[int] | None = None

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        laid_out = [
            tensor if tensor.stride() == stride else tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)
            for tensor, stride in zip(arguments, self._strides, strict=True)
        ]
        return list(run(self._program, laid_out))


def tolerance(tolerances: Mapping[torch.dtype, float], arguments: Sequence[Tensor]) -> float:
    """Return how much may differ: by the type of the inputs; tokens go through a network of single precision."""
    return tolerances.get(next((one.dtype for one in arguments if one.is_floating_point()), torch.float32), 0.2)
