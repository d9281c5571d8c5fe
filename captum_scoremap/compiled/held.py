"""What a graph freezes, held in the fewest bytes, for Inductor.

Left alone, Inductor works a mask out anew where it is used, from the activations, and a gate f(x)/x from f(x) and x,
which it holds on to for that. And booleans in memory are slow on a CPU, which it reads and writes one by one. So what
is to be held is made when it is frozen: a mask a byte each, by way of a floating-point number, whose conversions are
vectorized, or a bit where it is large, and a gate as it is.
"""

import operator
from bisect import bisect
from collections.abc import Container
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["hold_frozen"]

aten = torch.ops.aten

_NARROW = {torch.bool, torch.uint8}
# Elements from which it pays.
_LARGE = 2**12
# Elements of a mask from which bits pay, which take a kernel more than bytes do.
_MANY = 2**20


def hold_frozen(module: fx.GraphModule) -> None:
    """Have a graph hold each mask and gate that is used when nothing else needs what it was made of.

    Args:
        module: The graph, without changes in place; it is changed, for Inductor.
    """
    import torch._inductor.inductor_prims as prims

    graph = module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in graph.nodes}
    kernels = [order[node] for node in graph.nodes if node.op == "call_function" and not _is_pointwise(node)]
    outlive: dict[fx.Node, None] = {}  # in their order
    for node in graph.nodes:
        if not _is_narrow(node) and not (_is_number(node) and _is_put_off(node, order, kernels)):
            continue
        sources = _made_of(node, outlive)
        is_last = sources.isdisjoint(outlive) and last[node] > max((last[one] for one in sources), default=last[node])
        if is_last and _bytes(node) < sum(map(_bytes, sources)):
            outlive[node] = None
    for node in outlive:
        value, users = node.meta["val"], list(node.users)
        dim = _dim_of_bits(value)
        with graph.inserting_before(node.next):
            held: Any = fx.Proxy(node)
            if _is_narrow(node):
                held = held.to(torch.float32).to(torch.uint8)
            held = prims.force_stride_order(held, value.stride())
            if dim is not None:
                held = prims.force_stride_order(_packed(held, dim), _packed(value.byte(), dim).stride())
        for user in users:
            with graph.inserting_before(user):
                read = held if dim is None else _unpacked(held, dim, value)
                if value.dtype == torch.bool:
                    read = read.to(torch.float32) != 0
                user.replace_input_with(node, read.node)
    module.recompile()


def _dim_of_bits(value: Tensor) -> int | None:
    """Return the dimension along which eight elements make a byte; None for what is held otherwise.

    It is the outermost that can be, so that neighbors in memory stay neighbors, which is what vectors are made of.
    """
    if value.dtype != torch.bool or value.numel() < _MANY:
        return None
    fit = [dim for dim, step in enumerate(value.stride()) if value.shape[dim] % 8 == 0 and step > 1]
    return max(fit, key=value.stride, default=None)


def _packed(mask: Any, dim: int) -> Any:
    """Return a byte for each eight along a dimension of a mask of bytes."""
    eight = mask.unflatten(dim, (-1, 8))
    bits = [eight.select(dim + 1, number) << number for number in range(8)]
    return reduce(operator.or_, bits)


def _unpacked(packed: Any, dim: int, mask: Tensor) -> Any:
    """Return the bytes of a mask, whose shape and device are given by another."""
    numbers: Any = packed.node.graph.call_function(torch.arange, (8,), {"dtype": torch.uint8, "device": mask.device})
    numbers = fx.Proxy(numbers).view(-1, *[1] * (mask.dim() - dim - 1))
    return (packed.unsqueeze(dim + 1) >> numbers & 1).flatten(dim, dim + 1)


def _is_narrow(node: fx.Node) -> bool:
    return _is_large(node) and node.meta["val"].dtype in _NARROW


def _is_number(node: fx.Node) -> bool:
    return _is_large(node) and node.meta["val"].is_floating_point() and _is_pointwise(node)


def _is_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.numel() >= _LARGE


def _is_pointwise(node: fx.Node) -> bool:
    """Return whether Inductor works it out where it is used."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or bool(getattr(node.target, "is_view", False))


def _is_put_off(node: fx.Node, order: dict[fx.Node, int], kernels: list[int]) -> bool:
    """Return whether it would be worked out after other kernels ran: none is its user, and some stand before those."""
    if not node.users or not all(map(_is_pointwise, node.users)):
        return False
    return bisect(kernels, order[node]) < bisect(kernels, min(order[user] for user in node.users))


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _made_of(node: fx.Node, held: Container[fx.Node]) -> set[fx.Node]:
    """Return what a node is made of, but for the graph's arguments.

    What is a mask and not held, a conversion, or nobody else's is a part of it.
    """
    found: set[fx.Node] = set()
    above = [node]
    while above:
        for one in above.pop().all_input_nodes:
            is_own = _is_narrow(one) or one.target in _CONVERSIONS or (_is_pointwise(one) and len(one.users) == 1)
            if one.op == "call_function" and is_own and one not in held:
                above.append(one)
            elif one.op != "placeholder":
                found.add(one)
    return found


_CONVERSIONS = {aten._to_copy.default, aten.add.Tensor}
