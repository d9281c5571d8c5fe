"""What the modules of a model return in a run: the shapes, and which modules enclose which."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from captum_scoremap.settings import module_by_module

__all__ = ["ModuleCall", "layer_shapes", "outputs_of"]

Shape = tuple[int, ...]


@dataclass(eq=False)
class ModuleCall:
    """A module that runs, and the shapes of what it is given first and of what it returns, empty if not a tensor."""

    module: nn.Module
    outer: tuple["ModuleCall", ...] = field(repr=False)  # of the modules that enclose it, the outermost first
    given: Shape = ()
    returned: Shape = ()

    @property
    def parent(self) -> nn.Module | None:
        """By which module it was called."""
        return self.outer[-1].module if self.outer else None

    @property
    def depth(self) -> int:
        """How many modules enclose it."""
        return len(self.outer)


def outputs_of(
    run: Callable[[], Any],
    forward_func: Callable[..., Any],
    image_shape: Sequence[int],
    note: Callable[[nn.Module, Tensor], None] = lambda *_: None,
) -> tuple[list[ModuleCall], Shape]:
    """Run a model, and return what its modules do.

    Args:
        run: Runs the model.
        forward_func: The model, which does not count, or a function that calls it.
        image_shape: Shape of the images, (N, C, H, W).
        note: Called for each module that returns one tensor, as it ends.

    Returns:
        The modules that ran once and returned one tensor, in the order in which they ended; and the shape of the images
        as the first convolution sees them, for detectors resize and pad before.
    """
    seen: list[Shape] = []
    calls: Counter[nn.Module] = Counter()
    enclosing: list[ModuleCall] = []
    outputs: list[ModuleCall] = []
    # a module that the forward makes is none that could be named, or that runs again
    members = cache(lambda root: frozenset(root.modules()))

    def enter(module: nn.Module, arguments: Any) -> None:
        calls[module] += 1
        enclosing.append(ModuleCall(module, tuple(enclosing)))
        if not seen and isinstance(module, nn.Conv2d) and arguments and isinstance(arguments[0], Tensor):
            own = arguments[0].shape
            seen.append(tuple(own if own[:2] == image_shape[:2] and len(own) == 4 else image_shape))

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        call, tensor = enclosing.pop(), _only_tensor(output)
        if arguments and isinstance(arguments[0], Tensor):
            call.given = tuple(arguments[0].shape)
        call.returned = () if tensor is None else tuple(tensor.shape)
        is_member = not enclosing or module in members(enclosing[0].module)
        is_member = is_member and not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
        if module is not forward_func and tensor is not None and is_member:
            outputs.append(call)
            note(module, tensor)

    with ExitStack() as stack:
        # hooks on all modules: those inside a plain function cannot be named beforehand
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        run()
    return [one for one in outputs if calls[one.module] == 1], (seen or [tuple(image_shape)])[0]


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, Shape]:
    """Return the shapes of the outputs of all modules that run once and give one floating-point tensor.

    Args:
        model: The model; it runs once.
        inputs: Images, (N, C, H, W).

    Returns:
        Name to shape, in the order in which they end.

    Example:
        >>> layer_shapes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.randn(1, 3, 10, 10))
        {'0': (1, 4, 8, 8), '1': (1, 256)}
    """
    with torch.no_grad(), module_by_module():
        outputs, _ = outputs_of(lambda: model(inputs), model, inputs.shape)
    names = {module: name for name, module in model.named_modules()}
    return {names[one.module]: one.returned for one in outputs}


def _only_tensor(output: Any) -> Tensor | None:
    """Return the one floating-point tensor of a layer's output, alone or in a tuple; none inside of vmap."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    nested = any(isinstance(part, (tuple, list, dict)) for part in parts)
    is_one = len(tensors) == 1 and not nested and not torch._C._functorch.is_functorch_wrapped_tensor(tensors[0])
    return tensors[0] if is_one else None
