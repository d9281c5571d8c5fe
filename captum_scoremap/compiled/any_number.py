"""One graph for any number of images, of the graphs for two numbers of them.

Both run the same operations; what differs are whole numbers that go with the number of images, such as the sizes of
views. One that is a for n images and b for m lies on the line k·n + c through both.
"""

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["for_any_number"]


def for_any_number(first: fx.GraphModule, second: fx.GraphModule, numbers: tuple[int, int]) -> fx.GraphModule:
    """Return the first graph with the sizes that differ in the second computed from the number of images.

    It is right at both numbers; whether it is at others must be tried.

    Args:
        first: A graph whose first argument has one row for each image.
        second: The graph of the same function for another number of images.
        numbers: The number of images of each.

    Returns:
        The first graph, changed.

    Raises:
        ValueError: If the graphs run other operations, or something else than whole numbers differs.
    """
    graph = first.graph
    nodes, others = list(graph.nodes), list(second.graph.nodes)
    if [_operation(node) for node in nodes] != [_operation(node) for node in others]:
        raise ValueError("the graph must run the same operations for any number of images, got others.")
    twin = dict(zip(others, nodes, strict=True))
    arguments = graph.find_nodes(op="placeholder")
    with graph.inserting_after(arguments[-1]):
        images = graph.call_function(torch.ops.aten.sym_size.int, (arguments[0], 0))
    for node, other in zip(nodes, others, strict=True):
        mine, shape = pytree.tree_flatten((node.args, node.kwargs))
        theirs, their_shape = pytree.tree_flatten((other.args, other.kwargs))
        same = shape == their_shape and (node.op != "get_attr" or _read_same(first, node, second, other))
        for at, (one, another) in enumerate(zip(mine, theirs, strict=False)):
            if isinstance(another, fx.Node):
                same &= twin[another] is one
            elif type(one) is type(another) is int and one != another:
                with graph.inserting_before(node):
                    mine[at] = _on_line(graph, images, numbers, (one, another))
            else:
                same &= one is another or one == another
        if not same:
            raise ValueError(
                f"the graph must run the same operations for any number of images, got {node.target} with other values."
            )
        node.args, node.kwargs = pytree.tree_unflatten(mine, shape)
    if not images.users:
        graph.erase_node(images)
    first.recompile()
    return first


def _operation(node: fx.Node) -> tuple[str, Any]:
    return node.op, node.target if node.op == "call_function" else None


def _read_same(first: fx.GraphModule, node: fx.Node, second: fx.GraphModule, other: fx.Node) -> bool:
    """Return whether two nodes read equal tensors of their modules."""
    one, another = (operator.attrgetter(str(of.target))(module) for module, of in ((first, node), (second, other)))
    return bool(one.dtype == another.dtype and torch.equal(one, another))


def _on_line(graph: fx.Graph, images: fx.Node, numbers: tuple[int, int], sizes: tuple[int, int]) -> fx.Node:
    """Return the node of k·n + c, n the number of images.

    Raises:
        ValueError: If no whole k and c fit.
    """
    slope, rest = divmod(sizes[1] - sizes[0], numbers[1] - numbers[0])
    if rest:
        raise ValueError(f"sizes must go with the number of images, got {sizes} for {numbers} of them.")
    offset = sizes[0] - slope * numbers[0]
    found = images if slope == 1 else graph.call_function(operator.mul, (images, slope))
    return found if offset == 0 else graph.call_function(operator.add, (found, offset))
