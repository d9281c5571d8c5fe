"""A copy of a model, made for explaining: same layers, same scores, less work.

In eval mode a batch norm is affine, so it can be folded into the convolution before it. That is right where
each of the two runs once and nothing else reads what the convolution gives: torch.fx shows it for the models
that it can trace, a recorded run for the others. Whether the fused weights do what both modules did is then
tried, pair by pair.
"""

import copy
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from torchvision.ops import FrozenBatchNorm2d

from captum_scoremap.checks import check_visible
from captum_scoremap.copies import copied
from captum_scoremap.models.calls import AsPrepared, Example, Inputs

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (_BatchNorm, FrozenBatchNorm2d)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Pairs = list[tuple[str, str]]


def prepare(model: nn.Module, inputs: Inputs = None) -> nn.Module:
    """Copy a model for explaining: norms folded, ``channels_last``, parameters frozen, eval mode.

    Convolutions of a model that flattens by ``view``, which needs rows one after another, keep their layout.

    Every layer keeps its name. A folded norm becomes an ``nn.Identity`` (or what timm's norms carry besides,
    their activation), and the convolution before it gives what the norm gave; other outputs are as before.

    S = A·Y + B is exact for the copy, whose masks are held. Folded weights round otherwise, so that a unit at an edge
    of its activation (0 and 6 of ReLU6, where saturated units lie) may fall on the other side: the scores stay, A and
    B of the layers below do not. Of EfficientNet-Lite0 0 to 8 of 6 million units did so in each of 24 photographs;
    scores differed by up to 9e-6 logits, A·Y of a layer by 0.001 (median) to 0.064. An audit measures and says it.

    A model whose norms were folded takes optional arguments only as they were then: at their defaults, or as they are
    among ``inputs``. A norm may be read by something else under others, so that those are refused.

    Args:
        model: The model; it is not touched.
        inputs: An example batch (N, C, H, W), a tuple of arguments, or arguments by name. Only needed for optional
            arguments that are to have other values than their defaults, and for a model that torch.fx cannot trace:
            its norms are folded as one run on these inputs proves it.

    Returns:
        The prepared copy.

    Raises:
        TypeError: ``model`` is not a module, or compiled or scripted; or it does not take ``inputs``.

    Warns:
        UserWarning: If torch.fx cannot trace the model, and norms were left as they are; says which.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> x = torch.randn(1, 3, 8, 8)
        >>> prepare(model)[1]
        Identity()
        >>> torch.allclose(prepare(model)(x), model(x), atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    check_visible(model, "model")
    prepared = copied(model).eval().requires_grad_(False)
    example = Example.of(inputs)
    settings = example.settings(prepared.forward)
    graph, reason = _traced(prepared, settings)
    has_norms = any(isinstance(module, _NORMS) for module in prepared.modules())
    if has_norms and _fold_norms(prepared, example, graph, reason) and settings:
        prepared.register_forward_pre_hook(AsPrepared(settings), with_kwargs=True)
    flattens_by_view = graph is not None and _flattens_by_view(graph)
    for module in prepared.modules():
        if not flattens_by_view and isinstance(module, _CONVOLUTIONS) and module.weight.dim() in _CHANNELS_LAST:
            module.to(memory_format=_CHANNELS_LAST[module.weight.dim()])
    return prepared


def _fold_norms(model: nn.Module, example: Example, graph: fx.Graph | None, reason: str) -> bool:
    """Fold what can be folded, in place, and return whether something was; warn of norms that had no proof."""
    before = sum(isinstance(module, _NORMS) for module in model.modules())
    if graph is not None:
        pairs = _traced_pairs(model, graph)
    else:
        pairs = _recorded_pairs(model, example) if example.is_known else []
    for convolution, norm in pairs:
        _fold(model, convolution, norm)
    left = [name for name, module in model.named_modules() if isinstance(module, _NORMS)]
    if reason and left:
        advice = " Pass inputs=, an example batch, to have norms folded all the same." if not example.is_known else ""
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        warnings.warn(
            f"model must be traceable by torch.fx to fold every norm, got {type(model).__name__} ({reason}). "
            f"{len(left)} norms stay as they are, which costs time only: {shown}.{advice}",
            stacklevel=3,
        )
    return len(left) < before


class _Tracer(fx.Tracer):
    """Goes down to modules that have no modules of their own, which run as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return childless or isinstance(m, _NORMS) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, settings: Mapping[str, Any]) -> tuple[fx.Graph | None, str]:
    """Return the model as a graph, for these settings; None where torch.fx cannot trace it, and why.

    What runs is a copy with the same weights: what a model keeps for its next run would be of the trace, not tensors.
    """
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    try:
        model = copy.deepcopy(model, dict(shared))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that settings are taken as constants is the intention
            return _Tracer().trace(model, concrete_args=dict(settings)), ""
    except Exception as error:  # tracing runs the model's own code on proxies: anything can come out of it
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _flattens_by_view(graph: fx.Graph) -> bool:
    """Return whether a model asks for a view of fewer axes than images have."""
    sizes = [node.args[1:] for node in graph.find_nodes(op="call_method", target="view")]
    sizes = [one[0] if len(one) == 1 and isinstance(one[0], tuple | list) else one for one in sizes]
    # one that is no number may be a type, or the sizes of another tensor
    return any(len(one) in (2, 3) or (len(one) == 1 and isinstance(one[0], int)) for one in sizes)


def _traced_pairs(model: nn.Module, graph: fx.Graph) -> Pairs:
    """Return the convolutions whose only reader is a norm, as the traced graph shows it."""
    modules = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(str(node.target) for node in modules)
    read_directly = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = []
    for node in modules:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        pair = str(source.target), str(node.target)
        if all(calls[name] == 1 and name not in read_directly for name in pair):
            pairs.append(pair)
    return [pair for pair in pairs if _are_fusible(model, *pair)]


class _Readers(TorchFunctionMode):
    """Counts how often functions outside convolutions and norms take a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0  # how many convolutions and norms are running
        # by identity, forgotten with the tensor: another one may come to stand where it stood
        self.reads: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.depth == 0:
            self.count((args, kwargs))
        return func(*args, **(kwargs or {}))

    def count(self, values: object) -> None:
        """Count every tensor among nested values as read once."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.reads[value] = self.reads.get(value, 0) + 1


def _recorded_pairs(model: nn.Module, example: Example) -> Pairs:
    """Return the convolutions whose only reader is a norm, as one run shows it."""
    readers = _Readers()
    calls: Counter[str] = Counter()
    # Outputs of convolutions and inputs of norms; holding them keeps their identities from being used again.
    outputs: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        is_norm = isinstance(module, _NORMS)

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            readers.depth += 1
            calls[name] += 1
            if is_norm:
                taken[name] = args[0]
                readers.count(args)

        def leave(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            readers.depth -= 1
            if not is_norm:
                outputs[name] = output
                readers.count(args)

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    watched = {name: module for name, module in model.named_modules() if isinstance(module, (*_NORMS, *_CONVOLUTIONS))}
    handles = [handle for name, module in watched.items() for handle in watch(name, module)]
    try:
        with torch.no_grad(), readers:
            readers.count(model(*example.args, **example.kwargs))
    finally:
        for handle in handles:
            handle.remove()
    sources = {id(output): name for name, output in outputs.items()}
    pairs = [(sources[id(tensor)], norm) for norm, tensor in taken.items() if id(tensor) in sources]
    return [
        (convolution, norm)
        for convolution, norm in pairs
        if calls[convolution] == calls[norm] == 1
        and readers.reads.get(outputs[convolution]) == 1
        and not any(own in readers.reads for name in (convolution, norm) for own in watched[name].parameters())
        and _are_fusible(model, convolution, norm)
    ]


def _are_fusible(model: nn.Module, convolution: str, norm: str) -> bool:
    """Return whether fusion is defined for these two, and a hook of the user watches neither."""
    linear, affine = model.get_submodule(convolution), model.get_submodule(norm)
    return (
        isinstance(linear, _CONVOLUTIONS)
        and isinstance(affine, _NORMS)
        and affine.running_mean is not None
        and not (isinstance(linear, _TRANSPOSED) and linear.groups > 1)
        and not any(m._forward_hooks or m._forward_pre_hooks or is_parametrized(m) for m in (linear, affine))
    )


def _fold(model: nn.Module, convolution: str, norm: str) -> None:
    """Move a norm into the convolution before it, if a trial shows that this gives the same."""
    # Any, as the types of a module's own tensors are not known statically.
    conv: Any = model.get_submodule(convolution)
    affine: Any = model.get_submodule(norm)
    rest = _what_remains(affine)
    trial = _trial_input(conv)
    expected: Tensor = affine(conv(trial))
    statistics = (affine.running_mean, affine.running_var, affine.eps, affine.weight, affine.bias)
    fused = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, transpose=isinstance(conv, _TRANSPOSED))
    plain = conv.weight, conv.bias
    conv.weight, conv.bias = (parameter.requires_grad_(False) for parameter in fused)
    # A subclass may use its weights in another way: timm has convolutions that standardize them first, and one that
    # makes them binary need not know what to do with a bias.
    got: Tensor | None = None
    with suppress(Exception):
        got = rest(conv(trial))
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    if got is not None and (got - expected).abs().max() <= tolerance * expected.abs().max():
        _become(affine, rest)
    else:
        conv.weight, conv.bias = plain


def _become(module: nn.Module, other: nn.Module) -> None:
    """Make a module another one in its place, whoever refers to it: a name of the model's, or a list of its own."""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float))}
    module.__class__ = type(other)
    module.__dict__ = numbers | vars(other)  # the model may read them: eps, num_features


def _trial_input(conv: Any) -> Tensor:
    """Return random input a little larger than the kernel, (1, C, ...)."""
    sides = [(size - 1) * step + 2 for size, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    values = torch.randn(1, conv.in_channels, *sides, generator=torch.Generator().manual_seed(0))
    return values.to(conv.weight.device, conv.weight.dtype)


def _what_remains(norm: nn.Module) -> nn.Module:
    """Return what a norm does besides normalizing: nothing, or what timm's carry under ``drop`` and ``act``."""
    parts = dict(norm.named_children())
    return nn.Sequential(OrderedDict(parts)).eval() if parts else nn.Identity().eval()
