"""Checks of a user's arguments, made once, at the public entry points.

Every message says what must be, what was, and what to do. Nothing here changes its arguments.
"""

import difflib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "InvalidTypeError",
    "InvalidValueError",
    "UnsupportedOperationError",
    "as_tuple",
    "as_tuple_of_arguments",
    "check_callable",
    "check_grad_kwargs",
    "check_images",
    "check_inputs",
    "check_layer",
    "check_layers",
    "has_memory",
    "is_traced",
    "is_tuple_of_one",
    "nearest",
    "unrecorded",
    "unwrap_parallel",
    "warn",
]


class InvalidValueError(ValueError, AssertionError):
    """A wrong value or shape, where Captum asserts: code that catches either error keeps working.

    Example:
        >>> issubclass(InvalidValueError, AssertionError)
        True
    """


class InvalidTypeError(TypeError, AssertionError):
    """A wrong kind of argument, where Captum asserts: code that catches either error keeps working.

    Example:
        >>> issubclass(InvalidTypeError, AssertionError)
        True
    """


class UnsupportedOperationError(NotImplementedError):
    """Operations of a model that have no rule, or that could not be seen, all of them at once.

    Attributes:
        operations: Pairs ``(operation, module)``; the module is the name of the one in which the call happens, ``""``
            for the outermost.
        hidden: Pairs of what could not be seen and the module in which it showed.

    Args:
        operations: What the attribute holds.
        hidden: What the attribute holds.
        underivable: Names of those operations of which PyTorch has no derivative.

    Example:
        >>> UnsupportedOperationError([("bessel_j0", "head")]).operations
        (('bessel_j0', 'head'),)
    """

    def __init__(
        self,
        operations: Sequence[tuple[str, str]],
        hidden: Sequence[tuple[str, str]] = (),
        underivable: Collection[str] = (),
    ) -> None:
        self.operations = tuple(operations)
        self.hidden = tuple(hidden)
        parts = []
        if self.operations:
            plain = [name for name, _ in self.operations if name != "int_repr" and not name.startswith("quantized")]
            advice = _rules_for(dict.fromkeys(plain), underivable) if plain else _UNQUANTIZED
            parts.append(
                "every operation on the way from the image to the score must have a rule; these have none:\n"
                + _listed(self.operations)
                + advice
            )
        if self.hidden:
            parts.append(
                "every operation on the way from the image to the score must be PyTorch's and run on the thread of the "
                "call; these could not be seen:\n"
                + _listed(self.hidden)
                + "\nCompute this with PyTorch operations, on one thread (TorchScript within "
                "`torch.jit.optimized_execution(False)`, from its first run on); or, if it is a constant, make it "
                "before the model runs."
            )
        super().__init__("\n".join(parts))


_UNQUANTIZED = (
    "\nExplain the model as it was before this part was quantized. Of quantized operations, linear layers, "
    "convolutions, norms, pooling and elementwise ones have rules; of torchao, weights alone."
)


def _rules_for(names: Iterable[str], underivable: Collection[str]) -> str:
    """Return the advice that names a rule for each operation: one that works."""
    kinds = {name: "Frozen" if name in underivable else "Tangent" for name in names}
    rules = ", ".join(f'"{name}": {kind}()' for name, kind in kinds.items())
    known = sorted(set(kinds.values()))
    frozen = ", ".join(name for name, kind in kinds.items() if kind == "Frozen")
    said = "the tangent at the image" if "Tangent" in known else "the value at the image"
    return (
        f"\nSupply one, for instance {said}: rules={{{rules}}}, with `from captum_scoremap.rules import "
        f"{', '.join(known)}`."
        + (
            f" Of {frozen} PyTorch has no derivative; where the image moves what it returns, derive a class from Rule."
            if frozen
            else ""
        )
    )


def _listed(items: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f"  {name} in {module!r}" if module else f"  {name} (outside any named module)" for name, module in items
    )


def as_tuple(value: object) -> tuple[object, ...]:
    """Return the value as a tuple: tuples and lists item by item, anything else alone, None as nothing."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def as_tuple_of_arguments(additional_forward_args: object) -> tuple[object, ...]:
    """Return additional arguments as Captum takes them: a tuple as it is, anything else alone, None as none."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message that suggests the names most like ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has strides in memory: one that is sparse, or stands for others in vmap, has none."""
    return tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_traced() -> bool:
    """Return whether what runs is being written down as a graph, which must hold at other images, too."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def warn(message: str) -> None:
    """Warn of a user's call, at the line that stands in neither this package, Captum, PyTorch nor a decorator."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("captum", "torch", "contextlib")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def unrecorded() -> AbstractContextManager[None]:
    """Hide what runs inside from all modes: for checks that look at numbers, which are no part of what is computed."""
    return _disable_current_modes()


def unwrap_parallel(forward_func: Callable[..., object]) -> Callable[..., object]:
    """Return the module inside a ``DataParallel`` wrapper, whose replicas run in threads that no mode reaches."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return forward_func.module if isinstance(forward_func, wrappers) else forward_func


def check_callable(forward_func: object) -> None:
    """Raise unless ``forward_func`` is a model that is neither compiled nor scripted.

    Raises:
        TypeError: If it is not callable, or is compiled or scripted.
    """
    if not callable(forward_func):
        raise TypeError(f"forward_func must be a model or a function, got {type(forward_func).__name__}.")
    check_visible(forward_func)


def check_visible(module: object, name: str = "forward_func") -> None:
    """Raise if ``module`` is compiled or scripted, so that its operations do not pass through Python.

    Args:
        module: A module or function.
        name: What the argument is called.

    Raises:
        TypeError: If so.
    """
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError(
            f"{name} must be a model whose operations can be seen, got a scripted one "
            f"({type(module).__name__}). Use the model it was scripted from"
            + (
                "; of a file, which has none, call it in a function: lambda x: model(x)."
                if name == "forward_func"
                else "."
            )
        )
    if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
        raise TypeError(
            f"{name} must be a model whose operations can be seen, got a compiled one. "
            "Use the model as it was before torch.compile (model._orig_mod)."
        )
    if "_torchdynamo_orig_callable" in getattr(module, "__dict__", ()):
        raise TypeError(
            f"{name} must be a function whose operations can be seen, got a compiled one. "
            "Use the function as it was before torch.compile."
        )


def check_inputs(inputs: object, *, indices: bool = False) -> tuple[Tensor, ...]:
    """Return the inputs as a tuple of finite floating-point tensors of one batch size.

    Args:
        inputs: Tensor or tuple of tensors, each ``(N, ...)``, or (N,) with one number for each example.
        indices: Whether int32 and int64 will do as well: indices of tokens, where it is not the input itself that is
            explained.

    Returns:
        The tensors.

    Raises:
        TypeError: If a tensor is not floating point, or not dense.
        InvalidTypeError: If something is no tensor.
        ValueError: If a batch is missing or empty, or a value is not finite.
        InvalidValueError: If batches are not aligned.
        RuntimeError: If ``torch.inference_mode`` is on, or an input was made under it.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "score maps need autograd, which torch.inference_mode switches off for good. "
            "Call under torch.no_grad() instead, or outside."
        )
    tensors = as_tuple(inputs)
    if not tensors:
        raise ValueError("inputs must hold at least one tensor, got none.")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InvalidTypeError(f"inputs must be a tensor or a tuple of tensors, got {type(tensor).__name__}.")
        if tensor.is_meta:
            raise TypeError(
                "inputs must be dense tensors of numbers, got one on the device meta, without any. Pass the image "
                "itself, on the device of the model, which must have its weights."
            )
        if tensor.layout is not torch.strided or tensor.is_nested:
            dense = "inputs.to_padded_tensor(0.0)" if tensor.is_nested else "inputs.to_dense()"
            kind = f"one of layout {tensor.layout}{', nested' if tensor.is_nested else ''}"
            raise TypeError(f"inputs must be dense tensors of numbers, got {kind}. Make them dense: {dense}.")
        shape = tuple(tensor.shape)
        are_indices = tensor.dtype in {torch.int32, torch.int64}
        if not (tensor.is_floating_point() or (indices and are_indices)):
            advice = (
                "Of token ids explain a layer, such as the embedding: LayerScoreMap(model, model.embedding)."
                if are_indices and not indices
                else "Explain real and imaginary parts: torch.view_as_real(inputs), of lambda x: "
                "model(torch.view_as_complex(x))."
                if tensor.is_complex()
                else "Convert and normalize images: inputs.float() / 255."
            )
            raise TypeError(f"inputs must be floating point, got {tensor.dtype}. {advice}")
        if tensor.is_inference():
            raise RuntimeError(
                "inputs must not be made under torch.inference_mode. Copy them outside of it: inputs.clone()."
            )
        if tensor.dim() == 0:
            raise ValueError("inputs must have a batch dimension, (N, ...); got a single number. Use inputs[None].")
        if tensor.numel() == 0:
            raise ValueError(f"inputs must hold at least one image, got an empty batch of shape {shape}.")
        with unrecorded():
            # a finite sum is the fast proof; a sum may also overflow
            finite = torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()
            count = 0 if finite else int((~torch.isfinite(tensor)).sum())
        if not finite:
            raise ValueError(f"inputs must be finite, got {count} values that are NaN or infinite. Replace them first.")
    sizes = {tensor.shape[0] for tensor in tensors if isinstance(tensor, Tensor)}
    if len(sizes) > 1:
        raise InvalidValueError(f"all inputs must have the same batch size, got {sorted(sizes)}.")
    return tuple(tensor for tensor in tensors if isinstance(tensor, Tensor))


def check_grad_kwargs(grad_kwargs: Mapping[str, object] | None) -> bool:
    """Return whether a result is to be differentiable: ``create_graph`` among options of ``torch.autograd.grad``.

    Raises:
        TypeError: If that function has no such option, as it would; coefficients are not taken by it.
    """
    known = inspect.signature(torch.autograd.grad).parameters
    for name in grad_kwargs or ():
        if name not in known:
            raise TypeError(
                f"grad_kwargs must name arguments of torch.autograd.grad, got {name!r}.{nearest(name, known)}"
            )
    return bool((grad_kwargs or {}).get("create_graph"))


def check_images(inputs: object) -> Tensor:
    """Return the inputs as one tensor of images, for what has a place in them.

    Args:
        inputs: Tensor (N, C, H, W), or a tuple of one.

    Returns:
        The tensor.

    Raises:
        TypeError: As :func:`check_inputs`.
        ValueError: As :func:`check_inputs`, or if it is not one tensor of images.
        RuntimeError: As :func:`check_inputs`.
    """
    tensors = check_inputs(inputs)
    if len(tensors) != 1 or tensors[0].dim() != 4:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"inputs must be one tensor of images, (N, C, H, W), got {shapes}.")
    return tensors[0]


def is_tuple_of_one(inputs: object) -> bool:
    """Return whether a single input came as a tuple: then its result is one too.

    ``sensitivity_max`` passes inputs as a tuple, and splits a tensor that is returned into images.

    Args:
        inputs: Tensor or tuple of tensors.

    Returns:
        Whether it is a tuple of one.
    """
    return isinstance(inputs, tuple) and len(inputs) == 1


def check_layer(forward_func: Callable[..., object], layer: object) -> None:
    """Raise unless ``layer`` is a module, and one of ``forward_func`` where that is a module.

    Raises:
        TypeError: If it is not a module, or one that is compiled or scripted.
        ValueError: If the model does not contain it.
    """
    if isinstance(layer, str):
        names = dict(forward_func.named_modules()) if isinstance(forward_func, nn.Module) else {}
        hint = f"model.get_submodule({layer!r})" if layer in names else f"a module of the model.{nearest(layer, names)}"
        raise TypeError(f"layer must be a module, got the name {layer!r}. Use {hint}")
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a module, got {type(layer).__name__}. Use a module of the model.")
    check_visible(layer, "layer")
    if isinstance(forward_func, nn.Module) and all(module is not layer for module in forward_func.modules()):
        raise ValueError(
            f"layer must be part of the model, got a {type(layer).__name__} that {type(forward_func).__name__} does "
            "not contain. Take it from the very model that is explained."
        )


def check_layers(forward_func: Callable[..., object], layers: object, *, or_image: bool = False) -> list[Any]:
    """Return one layer, or several, as a list, each one checked as :func:`check_layer` does.

    With ``or_image`` a layer may be None, which stands for the image itself.
    """
    several = isinstance(layers, Iterable) and not isinstance(layers, (str, nn.Module))
    named: list[Any] = list(layers) if several else [layers]  # type: ignore[call-overload]  # mypy loses what it is
    for layer in named:
        if layer is not None or not or_image:
            check_layer(forward_func, layer)
    return named
