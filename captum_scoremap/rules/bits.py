"""Masks of one bit an element, worked on piece by piece, so that what is unpacked stays in the processor's cache."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Bits"]

# Elements below which a mask of bytes is as good: unpacking is a handful of calls.
_SMALL = 2**17
# Elements a step on a CPU; other devices take all at once.
_STEP = 2**20

# Eight bytes of zeros and ones, read as one number, times this have their bits in the uppermost byte, in their order.
_GATHER = 0x0102040810204080


class Bits:
    """A mask, packed.

    Args:
        values: A tensor in the memory layout of the mask, as wide as it likes.
        mask: From a stretch of the values to a bool tensor.

    Example:
        >>> bits = Bits(torch.arange(16.0), lambda values: values.bool())
        >>> bits.unpacked().sum(), bits.times(torch.full((16,), 2.0)).sum()
        (tensor(15), tensor(30.))
    """

    def __init__(self, values: Tensor, mask: Callable[[Tensor], Tensor]) -> None:
        self._layout = values.shape, values.stride()
        self._packed = values.new_empty(values.numel() // 8, dtype=torch.uint8)
        for packed, stretch in zip(_steps(self._packed, 8), _steps(_flat(values)), strict=True):
            packed.copy_(mask(stretch).view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56))

    @staticmethod
    def fit(values: Tensor) -> bool:
        """Whether a mask of these values is worth packing, and lies in memory without gaps."""
        span = 1 + sum((size - 1) * step for size, step in zip(values.shape, values.stride(), strict=True))
        return values.numel() >= _SMALL and values.numel() % 8 == 0 and span == values.numel()

    def unpacked(self) -> Tensor:
        """The mask, as bool."""
        shape, stride = self._layout
        return self._select(self._packed, torch.bool).as_strided(shape, stride)

    def times(self, gradient: Tensor) -> Tensor:
        """The gradient where the mask is set, zero elsewhere.

        Args:
            gradient: Of the mask's shape.

        Returns:
            The product, in fresh memory.
        """
        shape, stride = self._layout
        if not _is_plain(gradient) or gradient.shape != shape or gradient.stride() != stride:
            return gradient * self._select(self._packed, gradient.dtype).as_strided(shape, stride)
        product = torch.empty_strided(shape, stride, dtype=gradient.dtype, device=gradient.device)
        stretches = zip(_steps(self._packed, 8), _steps(_flat(gradient)), _steps(_flat(product)), strict=True)
        for packed, factor, result in stretches:
            torch.mul(self._select(packed, gradient.dtype), factor, out=result)
        return product

    @staticmethod
    def _select(packed: Tensor, dtype: torch.dtype) -> Tensor:
        return _eight_of_each_byte(dtype, packed.device).index_select(0, packed.int()).view(-1)


@functools.cache
def _eight_of_each_byte(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the bits of every byte, the lowest first."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (bits & 1).to(dtype)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def _steps(flat: Tensor, elements: int = 1) -> Iterator[Tensor]:
    """Stretches of a flat tensor, each entry of which stands for so many elements."""
    yield from flat.split(_STEP // elements) if flat.device.type == "cpu" else (flat,)


def _is_plain(gradient: Tensor) -> bool:
    """Whether it is one tensor, of which nobody wants derivatives: not several labels' at once."""
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)
    return not batched and not torch.is_grad_enabled()
