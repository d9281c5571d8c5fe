"""Masks of a graph as bytes that are held, for Inductor.

Left alone, Inductor works a mask out anew where it is used, from the activations, which it holds on to for that. And
booleans in memory are slow on a CPU, which it reads and writes one by one. So what is to be held is made a byte each,
by way of a floating-point number, whose conversions are vectorized.
"""

from collections.abc import Container

import torch
from torch import Tensor, fx

__all__ = ["hold_masks"]

aten = torch.ops.aten

_NARROW = {torch.bool, torch.uint8}
# Elements from which it pays.
_LARGE = 2**12


def hold_masks(module: fx.GraphModule) -> None:
    """Have a graph hold each mask that is used when nothing else needs what it was made of.

    Args:
        module: The graph, without changes in place; it is changed, for Inductor.
    """
    import torch._inductor.inductor_prims as prims

    graph = module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in graph.nodes}
    outlive: dict[fx.Node, None] = {}  # in their order
    for node in graph.nodes:
        sources = _made_of(node, outlive) if _is_narrow(node) else set()
        if sources and sources.isdisjoint(outlive) and last[node] > max(last[one] for one in sources):
            outlive[node] = None
    for node in outlive:
        value = node.meta["val"]
        with graph.inserting_after(node):
            number = graph.call_function(aten.to.dtype, (node, torch.float32))
        with graph.inserting_after(number):
            narrow = graph.call_function(aten.to.dtype, (number, torch.uint8))
        with graph.inserting_after(narrow):
            held = graph.call_function(prims.force_stride_order, (narrow, value.stride()))
        for user in [user for user in node.users if user is not number]:
            user.replace_input_with(node, held)
        if value.dtype == torch.bool:
            for user in list(held.users):
                with graph.inserting_before(user):
                    read = graph.call_function(aten.to.dtype, (held, torch.float32))
                    user.replace_input_with(held, graph.call_function(aten.ne.Scalar, (read, 0)))
    module.recompile()


def _is_narrow(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return False
    return value.dtype in _NARROW and value.numel() >= _LARGE


def _made_of(node: fx.Node, held: Container[fx.Node]) -> set[fx.Node]:
    """Return what a mask is made of, through masks that are not held and conversions, but for the graph's arguments."""
    found: set[fx.Node] = set()
    above = [node]
    while above:
        for one in above.pop().all_input_nodes:
            is_step = one.op == "call_function" and (_is_narrow(one) or one.target in _CONVERSIONS)
            if is_step and one not in held:
                above.append(one)
            elif one.op != "placeholder":
                found.add(one)
    return found


_CONVERSIONS = {aten._to_copy.default, aten.add.Tensor}
