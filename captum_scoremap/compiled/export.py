"""A graph as a file: ``.pt2`` for PyTorch without this package, ``.onnx`` for runtimes without PyTorch."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_scoremap.data.extras import import_extra

from .any_number import for_any_number
from .decomposed import ANY_NUMBER, ONNX, functional
from .graph import Graph

__all__ = ["FORMATS", "read_back", "write"]

FORMATS = (".pt2", ".onnx")


class _WithState(nn.Module):
    """A graph with its state, as a module; with names it returns its parts by name."""

    def __init__(self, module: fx.GraphModule, state: Sequence[Tensor], names: Sequence[str] = ()) -> None:
        super().__init__()
        self.module, self._names = module, tuple(names)
        for number, tensor in enumerate(state):
            self.register_buffer(f"state_{number}", tensor.detach())

    def forward(self, *arguments: Tensor) -> Any:
        found = self.module(*arguments, *self._buffers.values())
        return dict(zip(self._names, found, strict=True)) if self._names else found


def write(
    cases: Sequence[tuple[Graph, Sequence[Tensor]]], given: Sequence[str], names: Sequence[str], path: Path
) -> None:
    """Write a graph, or the graphs of a function for two numbers of images as one for any number.

    Args:
        cases: One or two graphs, with the tensors that each is for.
        given: Names of the arguments.
        names: Names of what it returns.
        path: Where to; its suffix says the format.

    Raises:
        ValueError: If the graph has operations that the format lacks, or two are not of one function.
    """
    is_onnx = path.suffix.lower() == ".onnx"
    if is_onnx:
        for package in ("onnxscript", "onnx", "onnxruntime"):
            import_extra(package, "onnx")
    graph, arguments = cases[0]
    state, dynamic = graph.read(), None
    decompositions = ONNX if is_onnx else ANY_NUMBER if len(cases) == 2 else None
    with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False), _quiet():
        modules = [functional(one.module, (*theirs, *one.read()), decompositions) for one, theirs in cases]
        module = modules[0]
        if len(cases) == 2:
            if not all(map(torch.equal, state, cases[1][0].read())):
                raise ValueError("the model must read the same tensors for any number of images, got others.")
            module = for_any_number(modules[0], modules[1], (len(arguments[0]), len(cases[1][1][0])))
            dynamic = (({0: torch.export.Dim("N", min=1)},) * len(arguments),)
        # ONNX has names of its own, in the order of the outputs
        named = _WithState(module, state, () if is_onnx else names)
        program = torch.export.export(named, tuple(arguments), dynamic_shapes=dynamic)
        for node in program.graph.nodes:  # of versions of PyTorch that always record them
            node.meta.pop("stack_trace", None)
        if not is_onnx:
            torch.export.save(program, path)
            return
        try:
            torch.onnx.export(
                program,
                f=path,
                dynamo=True,
                input_names=list(given),
                output_names=list(names),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            missing = _missing(error)
            raise ValueError(
                f"the map must be made of operations that ONNX has, got {missing}. Export to .pt2, which has them all."
            ) from error
    if dynamic is not None:
        _name_axis(path)


def _name_axis(path: Path) -> None:
    """Give an axis of any length the name N, in place of PyTorch's symbol."""
    import onnx

    model = onnx.load(path)
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    sizes = [size for value in values for size in value.type.tensor_type.shape.dim if size.dim_param]
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for size in sizes:
        size.dim_param = re.sub(rf"\b{symbol}\b", "N", size.dim_param)
    onnx.save(model, path)


def read_back(path: Path, given: Sequence[str], names: Sequence[str]) -> Callable[..., list[Tensor]]:
    """Return what a file computes.

    Args:
        path: The file.
        given: Names of its arguments.
        names: Names of what it returns.

    Returns:
        From arguments to a list of tensors.

    Raises:
        ValueError: If onnxruntime cannot run it.
    """
    if path.suffix.lower() == ".onnx":
        options = import_extra("onnxruntime", "onnx").SessionOptions()
        options.log_severity_level = 4  # what it refuses, we say
        with _refusals():
            session = import_extra("onnxruntime", "onnx").InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )

        def compute(*arguments: Tensor) -> list[Tensor]:
            feed = {name: argument.cpu().numpy() for name, argument in zip(given, arguments, strict=True)}
            with _refusals():
                return [torch.from_numpy(one) for one in session.run(list(names), feed)]

        return compute
    module = torch.export.load(path).module()

    def run(*arguments: Tensor) -> list[Tensor]:
        found = module(*arguments)
        return [found[name] for name in names]

    return run


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Say what onnxruntime refuses, whose errors have no type in common.

    Raises:
        ValueError: If it refuses something.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        said = str(error).strip().splitlines()[0].rpartition(" : ")[2]
        said = re.sub(r"^Load model from .* failed:", "", said).rstrip(".")  # a draft's name by then
        raise ValueError(
            f"the file must run in onnxruntime, which says: {said}. Compute in float32, of which it has more "
            "operations, or export to .pt2."
        ) from error


def _missing(error: BaseException) -> str:
    """Return the operations that the exporter names, or what it says."""
    reasons = []
    cause: BaseException | None = error
    while cause is not None:
        reasons.append(str(cause))
        cause = cause.__cause__
    found = re.findall(r"\b(?:aten|prims|torchvision)(?:\.|::)\w+", " ".join(reasons))
    return ", ".join(dict.fromkeys(found)) or reasons[-1].strip().splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what the exporters tell of their own progress and deprecations."""
    names = ("torch.onnx", "onnxscript", "torch.export", "onnx_ir", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        lines = vars(torch.fx.config).get("do_not_emit_stack_traces", False)
        try:
            torch.fx.config.do_not_emit_stack_traces = True  # where in our code, at a fifth of the time
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            torch.fx.config.do_not_emit_stack_traces = lines
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
