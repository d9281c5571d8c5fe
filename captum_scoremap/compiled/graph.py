"""A function of tensors as a graph: the operations that it runs, in their order, with the numbers of the call left out.

The graph takes the function's arguments and, after them, its *state*: every other tensor that it reads, such as
parameters. Masks, switches and gates are operations like any other, so that the graph freezes them anew at each image.
What a graph cannot hold (a branch on numbers of the image, shapes that depend on them, noise, a change of state) is
refused, with where in the user's code it stands.
"""

import operator
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_scoremap.speed import plainly
from captum_scoremap.tape import exits_refused

__all__ = ["Graph", "State", "trace"]

_PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


class State:
    """A tensor that a graph reads besides its arguments: a parameter or buffer of a module, or one of nobody's.

    It is looked up anew for each call, so that the graph goes by the weights as they are now.

    Args:
        tensor: The tensor.
        name: Its name.
        owner: The module's dictionary that holds it; None for one of nobody's.
        key: Its name there.

    Attributes:
        name: Its name.
    """

    __slots__ = ("_key", "_layout", "_owner", "_tensor", "name")

    def __init__(self, tensor: Tensor, name: str, owner: dict[str, Any] | None = None, key: str = "") -> None:
        self._tensor, self.name, self._owner, self._key = tensor, name, owner, key
        self._layout = _layout(tensor)

    def read(self) -> Tensor:
        """Return the tensor as it is now.

        Returns:
            The tensor.

        Raises:
            ValueError: If it is gone, or of another shape, type or device than when the graph was made.
        """
        tensor: Tensor | None = self._tensor if self._owner is None else self._owner.get(self._key)
        if tensor is None or _layout(tensor) != self._layout:
            expected = _described(self._layout)
            got = "none" if tensor is None else _described(_layout(tensor))
            raise ValueError(
                f"the model's tensors must be as they were when the map was compiled, {expected}; got {got} for "
                f"{self.name!r}. Compile it again."
            )
        return tensor


def _described(layout: tuple[Any, ...]) -> str:
    shape, strides, dtype, device = layout
    return f"{tuple(shape)}, {dtype}, on {device}, with strides {strides}"


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@dataclass(frozen=True)
class Graph:
    """A traced function.

    Attributes:
        module: From the arguments and then the state, one by one, to a tuple of tensors. It frees what nothing reads
            any more.
        state: What it reads besides its arguments.
    """

    module: fx.GraphModule
    state: tuple[State, ...]

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Run it operation by operation.

        Args:
            arguments: Tensors, shaped as those it was traced at.

        Returns:
            What the function returns.
        """
        found: tuple[Tensor, ...] = self.module(*arguments, *self.read())
        return found

    def read(self) -> list[Tensor]:
        """Return the state as it is now."""
        return [one.read() for one in self.state]


def trace(
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor],
    modules: Mapping[str, nn.Module] | None = None,
) -> Graph:
    """Return the graph of a function.

    Args:
        function: From tensors to a sequence of tensors. It runs once, and once more where it is refused.
        arguments: The tensors; the graph is for their shapes, types and devices.
        modules: Name to module: parameters and buffers of these are looked up anew at each call.

    Returns:
        The graph.

    Raises:
        ValueError: If the function is no graph: it branches on numbers of the arguments, makes tensors of a shape that
            depends on them, draws noise, or changes its state.
        RuntimeError: As the function.
    """
    noise = _noise_state(arguments)
    traced = _traced(function, arguments)
    draws_noise = noise != _noise_state(arguments)
    try:
        _check_nodes(traced.graph, draws_noise)
    except ValueError:
        # once more, to say where it is: to note that of each operation takes half of the time
        _check_nodes(_traced(function, arguments, notes_places=True).graph, draws_noise)
        raise
    traced.graph.eliminate_dead_code()
    state = _lift(traced, len(arguments), modules or {})
    traced.recompile()
    graph = Graph(traced, state)
    _check_state(graph, arguments)
    return graph


def _traced(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], *, notes_places: bool = False
) -> fx.GraphModule:
    """Return the operations that a function runs, with where each was called, if asked for.

    Raises:
        ValueError: If it branches on numbers of the arguments, or has tensors that are not dense.
        RuntimeError: As the function.
    """
    # takes a third of a second to import, which a program that compiles nothing need not wait for
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # older versions of PyTorch cannot
    notes: dict[str, Any] = (
        {"record_stack_traces": notes_places} if "record_stack_traces" in signature(make_fx).parameters else {}
    )
    # one mode for the shapes of all results: without a context each has one of its own, at a third of the time
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with torch.no_grad(), plainly(), exits_refused(_depends), tracing(context), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have been shown when the function ran
        try:
            return make_fx(lambda *tensors: tuple(function(*tensors)), **notes)(*arguments)
        except RuntimeError as error:
            if "do not have strides" in str(error):  # PyTorch traces those of rows or blocks as little as it says so
                kind = str(error).partition(" tensors")[0]
                raise ValueError(
                    f"the map must be made of dense tensors to be compiled, got one of layout {kind}. Use "
                    "method.attribute, or make the model's weights dense: weight.to_dense()."
                ) from error
            if "get value out of a tracing tensor" not in str(error):
                raise
            where = _place(frame.filename + f":{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__))
            raise ValueError(
                f"the map must not branch on numbers of the image to be compiled; it reads some{where}. Use "
                "method.attribute, or write the branch with torch.where."
            ) from error


def _depends(tensor: Tensor) -> bool:
    """Return whether a tensor of a function that is being traced depends on its arguments."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    above: list[fx.Node] = [] if slot is None else [slot.proxy.node]
    seen = set(above)
    while above:
        node = above.pop()
        if node.op == "placeholder":
            return True
        above += [one for one in node.all_input_nodes if one not in seen]
        seen.update(above)
    return False


def _noise_state(arguments: Sequence[Tensor]) -> list[bytes]:
    """Return where PyTorch's streams of random numbers are."""
    states = [torch.get_rng_state()]
    if arguments[0].is_cuda:
        states.append(torch.cuda.get_rng_state(arguments[0].device))
    return [state.numpy().tobytes() for state in states]


def _check_nodes(graph: fx.Graph, draws_noise: bool) -> None:
    """Raise for operations whose results the same arguments, or the same shapes, do not settle.

    Raises:
        ValueError: If there is one.
    """
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        own = any(isinstance(one, torch.Generator) for one in (*node.args, *node.kwargs.values()))
        # kernels of attention may draw some, for dropout, which is off
        if torch.Tag.nondeterministic_seeded in tags and (own or draws_noise) and "scaled_dot_product" not in name:
            raise ValueError(
                f"the map must draw no noise to be compiled, got {name}{_place_of(node)}. Use method.attribute."
            )
        has_shape_of_its_own = torch.Tag.dynamic_output_shape in tags
        if node.target is torch.ops.aten.index.Tensor:
            chosen = [one.meta["val"].dtype for one in node.args[1] if one is not None]
            has_shape_of_its_own = any(dtype in {torch.bool, torch.uint8} for dtype in chosen)
        if has_shape_of_its_own:
            raise ValueError(
                "the map must be made of tensors whose shapes do not depend on numbers to be compiled, got "
                f"{name}{_place_of(node)}. Use method.attribute, or write it with torch.where."
            )


def _place_of(node: fx.Node) -> str:
    trace = node.meta.get("stack_trace") or ""
    lines = [line.split('"') for line in trace.splitlines() if line.strip().startswith('File "')]
    return _place(f"{line[1]}:{line[2].split()[2].rstrip(',')}" for line in lines)


def _place(places: Iterable[str]) -> str:
    """Return where in code that is neither PyTorch's nor ours something was called, last."""
    own = [place for place in places if not place.startswith((*_PACKAGES, "<"))]
    return f" at {own[-1]}" if own else ""


def _lift(traced: fx.GraphModule, arguments: int, modules: Mapping[str, nn.Module]) -> tuple[State, ...]:
    """Turn the tensors that a graph holds into arguments, after the others."""
    owners: dict[int, tuple[str, dict[str, Any], str]] = {}
    for prefix, module in modules.items():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    owners.setdefault(id(tensor), (f"{prefix}.{key}" if prefix else key, tensors, key))
    graph = traced.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][arguments - 1]
    state: list[State] = []
    known: dict[int, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = operator.attrgetter(node.target)(traced)
        if id(tensor) not in known:
            name, owner, key = owners.get(id(tensor), (f"constant_{len(state)}", None, ""))
            state.append(State(tensor, name, owner, key))
            with graph.inserting_after(last):
                last = known[id(tensor)] = graph.placeholder(f"state_{len(state)}")
            last.meta["val"] = tensor
        node.replace_all_uses_with(known[id(tensor)])
        graph.erase_node(node)
    for name in [*traced._parameters, *traced._buffers, *vars(traced)]:
        if name.startswith(("_param_constant", "_tensor_constant")):
            delattr(traced, name)
    for node in graph.nodes:
        node.meta.clear()  # tensors of the run that was traced
    return tuple(state)


def _check_state(graph: Graph, arguments: Sequence[Tensor]) -> None:
    """Raise if a graph changes its state.

    Raises:
        ValueError: If so.
    """
    state = graph.read()
    versions = [_version(tensor) for tensor in state]
    with torch.no_grad():
        graph(*arguments)
    for one, tensor, version in zip(graph.state, state, versions, strict=True):
        now = _version(tensor)
        if now != version if isinstance(now, int) else not torch.equal(now, version):
            raise ValueError(
                f"the model must leave its tensors as they are to be compiled, got a change of {one.name!r} in place. "
                "Use method.attribute."
            )


def _version(tensor: Tensor) -> Any:
    """Return what tells that a tensor changed: how often it did, or, where nothing counts, its numbers."""
    return tensor.clone() if tensor.is_inference() else tensor._version
