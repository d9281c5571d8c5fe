"""What runs a graph: PyTorch's operations one by one, or code that Inductor makes of it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .decomposed import CONVOLUTIONS, functional
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
            module = functional(graph.module, example, CONVOLUTIONS)
            hold_frozen(module)
            returned: Any = list(module.graph.nodes)[-1].args[0]
            # Inductor moves each operation to where its result is used, which spares memory; but what is returned is
            # used at the end, and with the maps of all layers every A and Y would be held until then
            options = {"reorder_for_locality": len(returned) == 1}
            program: Any = inductor.compile(module, example, options=options)
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
