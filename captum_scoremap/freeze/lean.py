"""A backward pass that keeps masks, switches and shapes, not activations.

The backward pass of a frozen operation is linear, so it needs what is frozen and, of the live arguments, no more than
their shape. Autograd keeps the arguments themselves, as it must where weights are trained; here they are let go.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Adjoint", "Placeholders", "Snapshot", "Snapshots"]


class Adjoint(torch.autograd.Function):
    """An operation run as it is, with the adjoint of its linear form as its backward pass.

    ``run`` gives the output and the adjoint.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, run: Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]], in_place: bool
    ) -> Tensor:
        """The operation's own value."""
        output, ctx.adjoint = run()
        if not in_place:
            return output
        ctx.mark_dirty(input)
        return input if output is input else input.copy_(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The adjoint."""
        return ctx.adjoint(gradient), None, None


class _Positions:
    """Indices in as few bytes as they need: those of a pooling window mostly fit into two of their eight."""

    def __init__(self, tensor: Tensor) -> None:
        low, high = (int(bound) for bound in tensor.aminmax())
        kinds = (torch.int16, torch.int32, torch.int64)
        self._tensor = tensor.to(next(kind for kind in kinds if _fits(low, kind) and _fits(high, kind)))

    def unpacked(self) -> Tensor:
        """The indices."""
        return self._tensor.long()


def _fits(value: int, kind: torch.dtype) -> bool:
    return torch.iinfo(kind).min <= value <= torch.iinfo(kind).max


class Placeholders:
    """Tensors of given shapes that hold nothing, in one stretch of memory that is never touched."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def instead_of(self, live: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Have autograd keep only the shapes of these tensors; what it reads of them in the backward pass is void.

        Indices that it keeps (the switches of a pooling) are packed.

        Args:
            live: The tensors.

        Returns:
            A context in which to run the operation.
        """
        places = {(tensor.data_ptr(), tensor.shape) for tensor in live}

        def pack(tensor: Tensor) -> Any:
            if (tensor.data_ptr(), tensor.shape) not in places:
                return _Positions(tensor) if tensor.dtype == torch.int64 and tensor.numel() else tensor
            return tensor.shape, tensor.stride(), tensor.dtype, tensor.device

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return kept.unpacked() if isinstance(kept, _Positions) else self._placeholder(*kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _placeholder(
        self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        memory = self._memory.get((dtype, device))
        if memory is None or memory.numel() < size:
            memory = self._memory[dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return memory.as_strided(shape, stride)


class Snapshot:
    """A tensor as it is now. It shares memory with the model's until that is about to be changed in place.

    Args:
        tensor: The tensor.
        for_products: Whether it is wanted for products with its coefficients only.
    """

    def __init__(self, tensor: Tensor, *, for_products: bool = False) -> None:
        self.tensor = tensor.detach()
        self.for_products = for_products
        self.is_read = False

    def release(self) -> None:
        """Let go of the values; the shape stays."""
        self.tensor = torch.empty_like(self.tensor, device="meta")

    def keep(self) -> None:
        """Copy, for the memory is about to change."""
        self.tensor = self.tensor.clone()


class Snapshots:
    """The snapshots in use, found by the memory they share."""

    def __init__(self) -> None:
        self._by_memory: dict[int, list[weakref.ref[Snapshot]]] = {}

    def take(self, tensor: Tensor, *, for_products: bool = False) -> Snapshot:
        """A snapshot of a tensor."""
        snapshot = Snapshot(tensor, for_products=for_products)
        self._by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(weakref.ref(snapshot))
        return snapshot

    def about_to_read(self, tensor: Tensor) -> None:
        """Note that an operation depends on the values that the snapshots of a tensor's memory hold now."""
        for reference in self._by_memory.get(tensor.untyped_storage().data_ptr(), ()):
            snapshot = reference()
            if snapshot is not None:
                snapshot.is_read = True

    def about_to_change(self, target: Tensor, *, but_where_closed: bool = False) -> None:
        """Copy the snapshots that share a tensor's memory.

        Args:
            target: The tensor that changes in place.
            but_where_closed: Whether only elements change that the operation gives no coefficient, as behind a ReLU.
                Where nothing else has read them, products with their coefficients are zero whatever they are.
        """
        memory = target.untyped_storage().data_ptr()
        spared = []
        for reference in self._by_memory.pop(memory, ()):
            snapshot = reference()
            if snapshot is None:
                continue
            if but_where_closed and snapshot.for_products and not snapshot.is_read:
                spared.append(reference)
            else:
                snapshot.keep()
        if spared:
            self._by_memory[memory] = spared

    def guard(self) -> AbstractContextManager[None]:
        """Have autograd keep snapshots, so that later changes in place do no harm."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        return self.take(tensor) if tensor.is_floating_point() else tensor

    @staticmethod
    def _unpack(kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, Snapshot) else kept
