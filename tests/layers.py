"""Which layers of a model can be looked at: those that run once and give a float tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def called_once(model: nn.Module, *inputs: Tensor) -> dict[str, nn.Module]:
    """Name to module of all submodules that the model calls exactly once, in the order in which they end."""
    outputs: dict[str, list[Any]] = {}

    def recorder(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.setdefault(name, []).append(output)

    named = {name: module for name, module in model.named_modules() if name}
    handles = [module.register_forward_hook(recorder(name)) for name, module in named.items()]
    try:
        with torch.no_grad():
            model(*(tensor.clone() for tensor in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: named[name]
        for name, found in outputs.items()
        if len(found) == 1 and isinstance(found[0], Tensor) and found[0].is_floating_point()
    }
