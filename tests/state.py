"""What a call could leave behind, in torch and in a model, as values that can be compared."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


@dataclass(frozen=True)
class GlobalState:
    """The modes and hooks of torch that belong to no model."""

    hooks: tuple[tuple[int, ...], ...]
    calls: tuple[Any, ...]
    function_modes: int
    dispatch_modes: int
    gradients: bool
    inference: bool
    dtype: torch.dtype

    @classmethod
    def now(cls) -> GlobalState:
        names = [
            name for name, one in vars(module_hooks).items() if name.startswith("_global_") and isinstance(one, dict)
        ]
        return cls(
            hooks=tuple(tuple(getattr(module_hooks, name)) for name in sorted(names)),
            calls=(nn.Module.__call__, vars(nn.Module)["_compiled_call_impl"]),
            function_modes=len(_get_current_function_mode_stack()),
            dispatch_modes=len(_get_current_dispatch_mode_stack()),
            gradients=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            dtype=torch.get_default_dtype(),
        )


def _bits(tensor: Tensor) -> int:
    """A checksum of every bit."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    gradient = None if not tensor.is_leaf or tensor.grad is None else _bits(tensor.grad)
    return id(tensor), tensor.dtype, tensor.shape, tensor.requires_grad, gradient, _bits(tensor)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything in a model that an attribution must not touch, by name."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name} training"] = module.training
        state[f"{name} hooks"] = [list(getattr(module, hooks)) for hooks in HOOKS if hasattr(module, hooks)]
        state[f"{name} attributes"] = sorted(vars(module))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[name] = _tensor_state(tensor)
    return state


@contextmanager
def untouched(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Assert that model, tensors and torch itself end bit for bit as before, also if the block raises."""
    before = GlobalState.now(), model_state(model), [_tensor_state(tensor) for tensor in tensors]
    try:
        yield
    finally:
        after = model_state(model)
        changed = sorted(name for name in {*before[1], *after} if before[1].get(name) != after.get(name))
        assert not changed, f"changed in the model: {changed}"
        assert [_tensor_state(tensor) for tensor in tensors] == before[2]
        assert GlobalState.now() == before[0]
