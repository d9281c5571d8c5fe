"""Masks of one bit an element, worked on in stretches, so that what is unpacked stays in the processor's cache."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Bits", "in_stretches", "is_batched"]

# Elements below which a mask of bytes serves better: it is multiplied faster, and takes little.
_SMALL = 3 * 2**20
# Elements of a stretch on a CPU; other devices take all at once.
_STRETCH = 2**20

# Eight bytes of zeros and ones, read as one number, times this have their bits in the uppermost byte, in their order.
_GATHER = 0x0102040810204080


class Bits:
    """A mask, packed.

    Args:
        values: A tensor in the memory layout of the mask, as wide as it likes.
        mask: From a stretch of the values to a bool tensor.

    Example:
        >>> bits = Bits(torch.arange(16.0), lambda values: values.bool())
        >>> bits.times(torch.full((16,), 2.0)).sum()
        tensor(30.)
    """

    def __init__(self, values: Tensor, mask: Callable[[Tensor], Tensor]) -> None:
        self._layout = values.shape, values.stride()
        self._packed = values.new_empty(values.numel() // 8, dtype=torch.uint8)
        for packed, stretch in zip(_stretches(self._packed, 8), _stretches(_flat(values)), strict=True):
            packed.copy_(mask(stretch).view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56))

    @staticmethod
    def fit(values: Tensor) -> bool:
        """Whether a mask of these values is worth packing."""
        return values.numel() >= _SMALL and values.numel() % 8 == 0 and _is_dense(values)

    def times(self, gradient: Tensor) -> Tensor:
        """The gradient where the mask is set, zero elsewhere.

        Args:
            gradient: Of the mask's shape.

        Returns:
            The product, in fresh memory.
        """
        shape, stride = self._layout
        table = _eight_of_each_byte(gradient.dtype, gradient.device)
        is_plain = not is_batched(gradient) and not torch.is_grad_enabled()
        if not is_plain or gradient.shape != shape or gradient.stride() != stride:
            return gradient * table.index_select(0, self._packed.int()).as_strided(shape, stride)
        product = torch.empty_strided(shape, stride, dtype=gradient.dtype, device=gradient.device)
        factors, results = _stretches(_flat(gradient)), _stretches(_flat(product))
        for packed, factor, result in zip(_stretches(self._packed, 8), factors, results, strict=True):
            torch.index_select(table, 0, packed.int(), out=result.view(-1, 8))
            result.mul_(factor)
        return product


def in_stretches(values: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor:
    """A mask that takes some memory to work out, stretch by stretch.

    Args:
        values: Any tensor.
        mask: From values to a bool tensor, element by element.

    Returns:
        ``mask(values)``.

    Example:
        >>> in_stretches(torch.tensor([0.0, 3.0]), Tensor.bool)
        tensor([False,  True])
    """
    if values.numel() <= _STRETCH or not _is_dense(values):
        return mask(values)
    whole = torch.empty_like(values, dtype=torch.bool)
    for result, stretch in zip(_stretches(_flat(whole)), _stretches(_flat(values)), strict=True):
        result.copy_(mask(stretch))
    return whole


def is_batched(gradient: Tensor) -> bool:
    """Whether it is the gradients of several labels at once, which cannot go to memory made for one."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


@functools.cache
def _eight_of_each_byte(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the bits of every byte, the lowest first."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (bits & 1).to(dtype)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory, in whatever order."""
    return tensor.numel() == 1 + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _stretches(flat: Tensor, elements: int = 1) -> Iterator[Tensor]:
    """Stretches of a flat tensor, each entry of which stands for so many elements."""
    yield from flat.split(_STRETCH // elements) if flat.device.type == "cpu" else (flat,)
