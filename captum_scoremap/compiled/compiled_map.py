"""A map as a graph that is compiled once, runs without Python's time for each operation, and can leave Python."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from captum_scoremap.attribution import CompleteScoreMap, FusedScoreMap, LayerScoreMap, ScoreMap
from captum_scoremap.checks import as_tuple_of_arguments, check_grad_kwargs, check_inputs, unwrap_parallel
from captum_scoremap.scores import Positions, Target, is_function, logits_in, select_scores
from captum_scoremap.tape import ModuleTracker

from .backends import Backend, Mode
from .batches import COMPILED, Batches, tolerance
from .checked import check, elsewhere, run
from .graph import trace
from .parts import Method, parts
from .settings import Settings

__all__ = ["CompiledMap", "compile_map"]

_METHODS = (ScoreMap, LayerScoreMap, CompleteScoreMap, FusedScoreMap)
Inputs = Tensor | tuple[Tensor, ...]


def compile_map(
    method: Method,
    inputs: Inputs,
    target: Target = None,
    backend: Backend = "inductor",
    mode: Mode = "default",
    **options: Any,
) -> "CompiledMap":
    """Return a map as a compiled graph: the same numbers as ``method.attribute``, in less time.

    The map is computed at the inputs, traced, compiled, and compared with ``method.attribute`` there and at a random
    image with random labels. Everything that is frozen at an image is part of the graph, so that it holds at any image
    of the same size; the label is an argument of it. ``prepare`` the model first for the fastest map.

    Args:
        method: A ``ScoreMap``, ``LayerScoreMap`` (of one layer or several), ``CompleteScoreMap`` or ``FusedScoreMap``.
        inputs: An example, (N, C, H, W), or a tuple of inputs.
        target: The example's label, in any of Captum's forms; or a function from the model's output to (N,) scores,
            which becomes part of the graph.
        backend: "inductor" compiles to code of the device, which takes minutes for a large network, once for a
            machine (PyTorch keeps it on disk); "graph" runs PyTorch's operations one by one, and is ready at once.
            Inductor needs a C++ compiler on a CPU; without one the graph runs, and a warning says so.
        mode: As in ``torch.compile``: "reduce-overhead" records the kernels as a CUDA graph and replays them, which
            spares the time of each launch, most of all with few images or a small network; it keeps the memory of a
            pass for as long as the compiled map lives.
        **options: Other arguments of ``method.attribute``, such as ``channel_dim``; they are constants.

    Returns:
        The compiled map.

    Raises:
        TypeError: If the method is none of these, or as ``method.attribute``.
        ValueError: If the map is no graph, as where the model branches on numbers of the image, with where it does, or
            where these choose the elements, and so the places, of a complete or fused map; if the graph differs from
            the eager map; if the map is to have gradients; or as ``method.attribute``.
        RuntimeError: As ``method.attribute``.
        UnsupportedOperationError: As ``method.attribute``.

    Example:
        >>> from torch import nn
        >>> from captum_scoremap import ScoreMap
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> compiled = compile_map(ScoreMap(model), torch.rand(2, 3, 6, 6), target=7, backend="graph")
        >>> image = torch.rand(2, 3, 6, 6)
        >>> bool(torch.allclose(compiled(image, [3, 5]), ScoreMap(model).attribute(image, [3, 5])))
        True
    """
    if not isinstance(method, _METHODS):
        raise TypeError(
            "method must be a ScoreMap, LayerScoreMap, CompleteScoreMap or FusedScoreMap, got "
            f"{type(method).__name__}. Other methods run as they are."
        )
    if backend not in {"inductor", "graph"}:
        raise ValueError(f'backend must be "inductor" or "graph", got {backend!r}.')
    if mode not in {"default", "reduce-overhead"}:
        raise ValueError(f'mode must be "default" or "reduce-overhead", got {mode!r}.')
    if check_grad_kwargs(options.get("grad_kwargs")):
        raise ValueError(
            "grad_kwargs must be left out, got create_graph: compiled maps have no gradients. Train through "
            "method.attribute."
        )
    devices = {tensor.device.type for tensor in check_inputs(inputs, indices=True)}
    if mode == "reduce-overhead" and devices != {"cuda"}:
        raise ValueError(
            f'mode="reduce-overhead" records CUDA graphs, for which the inputs must be on a CUDA device, got '
            f'{", ".join(sorted(devices))}. Use mode="default" elsewhere.'
        )
    return CompiledMap(method, inputs, target, backend, options, mode)


@dataclass(frozen=True)
class Exported:
    """A file that computes scores and maps.

    Attributes:
        path: Where it is.
        takes: Name of each argument to its shape and type, in their order. Where the file takes any number of images,
            N, sizes that go with it are said by it, as in ONNX: "N", or "4*N".
        returns: Name of each result to its shape and type, in the same way.

    Example:
        >>> from torch import nn
        >>> from captum_scoremap import ScoreMap
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> compiled = compile_map(ScoreMap(model), torch.rand(1, 3, 6, 6), target=7, backend="graph")
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     exported = compiled.export(Path(folder) / "maps.pt2")
        >>> exported.takes["image"], list(exported.returns)
        ((('N', 3, 6, 6), torch.float32), ['scores', 'map', 'bias', 'residual'])
    """

    path: Path
    takes: Mapping[str, tuple[tuple[int | str, ...], torch.dtype]]
    returns: Mapping[str, tuple[tuple[int | str, ...], torch.dtype]]


class CompiledMap:
    """A map as a compiled graph; made by :func:`compile_map`.

    It goes by the model's weights as they are at each call. Other numbers of images than it was compiled for go through
    it so many at a time, the last ones filled up, so that nothing is compiled again. What else the model is, is part of
    the graph: the mode of each module, training or not, its attributes, hooks, parametrizations and children, and those
    of the method. Where one of them has changed since, the map is refused. What a function or an object reads elsewhere
    cannot be seen, and is as it was when the map was compiled.

    Args:
        method: The method.
        inputs: An example.
        target: Its label.
        backend: What runs the graph.
        options: Other arguments of ``method.attribute``.
        mode: Whether it replays CUDA graphs.

    Example:
        >>> from torch import nn
        >>> from captum_scoremap import ScoreMap
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> compiled = compile_map(ScoreMap(model), torch.rand(1, 3, 6, 6), target=7, backend="graph")
        >>> compiled(torch.rand(1, 3, 6, 6), 3).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(
        self,
        method: Method,
        inputs: Inputs,
        target: Target,
        backend: Backend,
        options: dict[str, Any],
        mode: Mode = "default",
    ) -> None:
        self._method, self._backend, self._mode, self._options = method, backend, mode, options
        self._function = target if is_function(target) else None
        tensors = check_inputs(inputs, indices=True)
        self._is_tensor = isinstance(inputs, Tensor)
        self._layout = [_layout(tensor) for tensor in tensors]
        self._example: tuple[Tensor, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._spec = pytree.tree_structure(None)
        with torch.no_grad():
            self._attribute(tensors, target)  # says what is wrong with them, before anything else does
        self._modules = self._run(tensors)
        self._settings = Settings({"method": method, **self._modules})
        self._batches = self._compiled(tensors, target)
        self._settings.leave_what_runs_set()

    def __call__(self, inputs: Inputs, target: Target = None) -> Any:
        """Return what ``method.attribute(inputs, target)`` returns.

        Args:
            inputs: Images of the size, type and device that the map was compiled for, any number of them.
            target: Label of each image, in any of Captum's forms; None where it was compiled with a function as target.

        Returns:
            The map, or maps.

        Raises:
            TypeError: If an input is no tensor, or a target has no known form.
            ValueError: If an input is not as the map was compiled for, the target is not as it must be, or the model
                has changed since, but for the numbers in its tensors.
            RuntimeError: If ``torch.inference_mode`` is on.
        """
        tensors = check_inputs(inputs, indices=True)
        got = [_layout(tensor) for tensor in tensors]
        if got != self._layout or isinstance(inputs, Tensor) != self._is_tensor:
            raise ValueError(
                f"inputs must be as the map was compiled for, {_described(self._layout, self._is_tensor)}, got "
                f"{_described(got, isinstance(inputs, Tensor))}. Compile a map for these, too."
            )
        self._check_settings()
        return pytree.tree_unflatten(self._batches(*tensors, *self._positions(target, tensors)), self._spec)

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        raise TypeError(
            "a compiled map must stay in its process, got a request to pickle it. Compile it again where it is needed, "
            "or write it as a file: compiled.export(path)."
        )

    def __copy__(self) -> "CompiledMap":
        return self  # nothing of it ever changes

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledMap":
        """Return the same map of a copy of the model: of the same copy where both are copied together."""
        twin = memo[id(self)] = object.__new__(CompiledMap)
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def export(self, path: str | Path, any_number: bool = True) -> "Exported":
        """Write the map as a file that runs without this package.

        Its arguments are the image (or images, one by one), (N, C, H, W), and, unless there is but one score or the
        target is a function, the labels, (N,) int64; where an image has scores of several dimensions, the place among
        all of them, row by row. It returns, by name: ``scores``, what the model returns; ``map``, or ``map.layer`` for
        each of several layers; of the same layers ``bias``, B of S = A·Y + B, and ``residual``, S - (A·Y + B), zero but
        for rounding. A complete map has ``placeless`` in place of B, and a fused map neither.

        Args:
            path: Where to; ``.pt2`` for ``torch.export.load``, ``.onnx`` for onnxruntime and others.
            any_number: Whether the file takes any number of images, N, for which the model must compute with two and
                with three of them in the same way; where it does not, a warning says so, and N is as in the example
                that the map was compiled with, as it is with False.

        Returns:
            What the file takes and returns.

        Raises:
            ValueError: If the suffix is neither, the path is a folder, the map has operations that ONNX lacks, the
                model has changed as it must not for a call, or the file, read again, gives other numbers.
            FileNotFoundError: If the path's folder does not exist.
            ImportError: If the extra ``onnx`` is not installed.
        """
        from .export import FORMATS  # a second

        path = Path(path).expanduser()
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"path must end in {' or '.join(FORMATS)}, got {str(path)!r}.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path must be in a folder that exists, got {str(path)!r}. Make {path.parent}/.")
        if path.is_dir():
            raise ValueError(f"path must be a file, got {str(path)!r}, a folder. Name a file in it.")
        self._check_settings()
        cases = [self._example, self._elsewhere(self._example)]
        if any_number:
            both = [torch.cat(pair) for pair in zip(*cases, strict=True)]

            def images(count: int) -> list[Tensor]:
                """Return so many of the same images: what rounding does to them does not depend on their number."""
                rows = torch.arange(count) % len(both[0])
                return [one[rows.to(one.device)] for one in both]

            try:
                others = [images(1), images(len(self._example[0]) + 3)]
                return self._written(path, [images(2), images(3)], [*cases, *others])
            except ImportError:
                raise
            except Exception as error:  # of the model, with another number of images than it may be made for
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
        exported = self._written(path, [self._example], cases)
        if any_number:
            warnings.warn(
                f"{path.name} takes {len(self._example[0])} images at a time, as the example has, for with another "
                f"number of them: {reason}",
                stacklevel=2,
            )
        return exported

    def _written(
        self, path: Path, examples: Sequence[Sequence[Tensor]], cases: Sequence[Sequence[Tensor]]
    ) -> "Exported":
        """Write a file for one number of images, or for any by two of them; compare what it gives with the eager map.

        Args:
            path: Where to.
            examples: What it is traced with: arguments of one number of images, or of two numbers.
            cases: Arguments to compare it at; the last of another number of images than the first, if it takes any.

        Returns:
            What the file takes and returns.
        """
        from .export import read_back, write

        count = len(self._layout)
        names: list[str] = []

        def function(*tensors: Tensor) -> Sequence[Tensor]:
            found = parts(self._method, self._given(tensors[:count]), self._target(tensors), self._options)
            names[:] = found
            return list(found.values())

        graphs = [(trace(function, arguments, self._modules), arguments) for arguments in examples]
        given = [*(["image"] if count == 1 else [f"image_{number}" for number in range(count)]), "target"]
        given = given[: len(examples[0])]
        results = []
        # PyTorch knows its files by a suffix in small letters; what a run that was killed has left is written over
        draft = path.with_name(f".{path.name}.draft{path.suffix.lower()}")
        try:
            write(graphs, given, names, draft)
            program = read_back(draft, given, names)
            for case in cases:
                wanted = run(function, case)
                # a residual is rounding, so that it is compared beside the scores that it is rounding of
                shifts = [float(wanted[0].norm()) if name.startswith("residual") else 0.0 for name in names]
                got, expected = (
                    [one + shift for one, shift in zip(each, shifts, strict=True)]
                    for each in (run(program, case), wanted)
                )
                check(f"the file {path.name}", got, expected, tolerance(COMPILED, case))
                results.append(wanted)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return Exported(path, _shapes(given, cases[0], cases[-1]), _shapes(names, results[0], results[-1]))

    # -- what is compiled

    def _given(self, tensors: Sequence[Tensor]) -> Inputs:
        return tensors[0] if self._is_tensor else tuple(tensors)

    def _attribute(self, tensors: Sequence[Tensor], target: Target) -> Any:
        return self._method.attribute(self._given(tensors), target, **self._options)

    def _run(self, tensors: Sequence[Tensor]) -> dict[str, nn.Module]:
        """Run the model, and return its modules, and all that ran, by name; note the shape of one image's scores."""
        function = unwrap_parallel(self._method.forward_func)
        additional = as_tuple_of_arguments(self._options.get("additional_forward_args"))
        tracker = ModuleTracker(function)
        with torch.no_grad(), tracker.watched():
            output = function(*(one.detach().clone() for one in tensors), *additional)
        if self._function is None:
            self._sizes = tuple(logits_in(output).shape[1:])
        return tracker.named_modules()

    def _check_settings(self) -> None:
        """Raise if the model or the method is another than the one that was compiled.

        Raises:
            ValueError: If so.
        """
        change = self._settings.change()
        if change:
            raise ValueError(
                "the model must be as it was when the map was compiled, but for the numbers in its tensors; got "
                f"another {change}. Set it back, or compile the map again."
            )

    def _target(self, arguments: Sequence[Tensor]) -> Target:
        """Return the target of the graph's function: the labels among its arguments."""
        labels = arguments[len(self._layout) :]
        return Positions(labels[0]) if labels else self._function

    def _positions(self, target: Target, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the target as the argument of the graph: where each image's score is among all of its own."""
        if self._function is not None:
            if target is not None and target is not self._function:
                raise ValueError(
                    "target must be left out, for the map was compiled with a function as target. Compile a map for "
                    "this target, too."
                )
            return ()
        count = math.prod(self._sizes)
        # the positions, put where the scores are, and selected as they are
        places = torch.arange(count, dtype=torch.float64).reshape(1, *self._sizes).expand(len(tensors[0]), *self._sizes)
        found = select_scores(places, target, len(tensors[0])).long().to(tensors[0].device)
        return () if count == 1 else (found,)

    def _labels(self, arguments: Sequence[Tensor]) -> Target:
        """Return the same target as Captum has it."""
        flat = arguments[len(self._layout) :]
        if not flat:
            return self._function
        each = [tuple(int(axis) for axis in one) for one in torch.stack(torch.unravel_index(flat[0], self._sizes), 1)]
        return each if len(self._sizes) > 1 else [label for (label,) in each]

    def _compiled(self, tensors: tuple[Tensor, ...], target: Target) -> Batches:
        """Compile the map at these inputs."""
        arguments = (*tensors, *self._positions(target, tensors))
        self._example = tuple(argument.detach().clone() for argument in arguments)
        return Batches(self._traced, self._eager, arguments, self._elsewhere, self._modules, self._backend, self._mode)

    # methods, not functions made here, so that a deep copy has those of its own model

    def _traced(self, *arguments: Tensor) -> list[Tensor]:
        return pytree.tree_leaves(self._attribute(arguments[: len(self._layout)], self._target(arguments)))

    def _eager(self, *arguments: Tensor) -> list[Tensor]:
        found = self._attribute(arguments[: len(self._layout)], self._labels(arguments))
        leaves, self._spec = pytree.tree_flatten(found)
        return leaves

    def _elsewhere(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return random inputs, and random labels."""
        count = len(self._layout)
        labels = arguments[count:]
        generator = torch.Generator().manual_seed(1)
        others = [torch.randint(math.prod(self._sizes), one.shape, generator=generator).to(one) for one in labels]
        return (*elsewhere(arguments[:count]), *others)


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(tensor.shape[1:]), tensor.dtype, tensor.device


def _shapes(
    names: Sequence[str], tensors: Sequence[Tensor], others: Sequence[Tensor]
) -> dict[str, tuple[tuple[int | str, ...], torch.dtype]]:
    """Return shapes and types by name; sizes that differ for another number of images are said by it."""
    images, more = len(tensors[0]), len(others[0])

    def said(size: int, other: int) -> int | str:
        slope = 0 if images == more else (other - size) // (more - images)
        return size if slope == 0 else "N" if slope == 1 else f"{slope}*N"

    return {
        name: (tuple(map(said, one.shape, other.shape)), one.dtype)
        for name, one, other in zip(names, tensors, others, strict=True)
    }


def _described(layouts: Sequence[tuple[tuple[int, ...], torch.dtype, torch.device]], is_tensor: bool) -> str:
    each = ", ".join(f"(N, {', '.join(map(str, shape))}) of {dtype} on {device}" for shape, dtype, device in layouts)
    return each if is_tensor else f"a tuple of {each}"
