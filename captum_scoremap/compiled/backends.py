"""What runs a graph: PyTorch's operations one by one, or code that Inductor makes of it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .decomposed import INDUCTOR, functional
from .graph import Graph
from .held import hold_frozen

__all__ = ["Backend", "Mode", "Program", "compiled"]

Backend = Literal["inductor", "graph"]
Mode = Literal["default", "reduce-overhead"]
Program = Callable[..., Sequence[Tensor]]


def compiled(graph: Graph, arguments: Sequence[Tensor], backend: Backend) -> Program:
    """Return what runs a graph.

    Args:
        graph: The graph.
        arguments: Tensors that it is compiled for.
        backend: "inductor", or "graph" for the graph itself.

    Returns:
        From the arguments to what the graph returns; the graph itself where Inductor cannot compile here, with a
        warning.
    """
    if backend == "graph":
        return graph
    import torch._inductor as inductor  # a second

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that TF32 would be faster
            example: list[Any] = [*arguments, *graph.read()]
            module = functional(graph.module, example, INDUCTOR)
            hold_frozen(module)
            program: Any = inductor.compile(module, example, options=_options(arguments[0].device))
            program(*example)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"the map runs as a plain graph, for Inductor cannot compile it here ({type(error).__name__}: {reason}).",
            stacklevel=7,
        )
        return graph

    def run(*arguments: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = program(*arguments, *graph.read())
        return found

    return run


def _options(device: torch.device) -> dict[str, Any]:
    """Return Inductor's settings."""
    import torch._inductor.config as config

    # left alone, it moves each operation to where its result is used: a mask is packed, and the map of a layer summed
    # up, at the end, and all that they are made of is held until then
    options = {"reorder_for_locality": False}
    # a call of a kernel takes Python as long as a small kernel takes; in one piece with them, a large network's calls
    # take many minutes to compile
    if device.type == "cpu" and hasattr(config, "cpp_wrapper_build_separate"):
        options |= {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    return options
