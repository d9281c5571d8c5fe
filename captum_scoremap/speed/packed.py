"""What is frozen, in fewer bytes: a mask in one bit an element, a switch as the place within its window."""

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

__all__ = ["Packed", "pack", "pack_positions"]

# Elements below which bytes serve better: they are worked on faster, and take little.
_LARGE = 3 * 2**20
# Elements that are packed at a time on a CPU, so that what is in between stays in its cache.
_CHUNK = 2**20

# Eight bytes of zeros and ones, read as one number, times this have their bits in the uppermost byte, in their order.
_GATHER = 0x0102040810204080


class Packed:
    """A tensor that is held in fewer bytes."""

    @property
    def tensor(self) -> Tensor:
        """The tensor, in fresh memory."""
        raise NotImplementedError


class Bits(Packed):
    """A mask in one bit an element.

    Args:
        mask: A bool tensor whose elements, a multiple of eight, fill their memory in whatever order.

    Example:
        >>> Bits(torch.arange(8) > 5).tensor
        tensor([False, False, False, False, False, False,  True,  True])
    """

    __slots__ = ("_bits", "_layout")

    def __init__(self, mask: Tensor) -> None:
        self._layout = mask.shape, mask.stride()
        self._bits = mask.new_empty(mask.numel() // 8, dtype=torch.uint8)
        words = mask.as_strided((mask.numel(),), (1,)).view(torch.int64)
        for bits, chunk in zip(_chunks(self._bits), _chunks(words), strict=True):
            bits.copy_((chunk * _GATHER).bitwise_right_shift_(56))

    @property
    def tensor(self) -> Tensor:
        """The mask, in fresh memory."""
        table = _eight_of_each_byte(self._bits.device)
        words = torch.empty(len(self._bits), dtype=torch.int64, device=self._bits.device)
        for bits, chunk in zip(_chunks(self._bits), _chunks(words), strict=True):
            torch.index_select(table, 0, bits.int(), out=chunk)
        return words.view(torch.bool).as_strided(*self._layout)


class Positions(Packed):
    """Flat positions of maxima, each by how far it is from where its window begins.

    Args:
        positions: Flat positions, (..., windows), int64.
        origins: Flat position at which each window begins, (windows).
        dtype: A type that holds the differences.

    Example:
        >>> Positions(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.uint8).tensor
        tensor([1, 2])
    """

    __slots__ = ("_narrow", "_origins")

    def __init__(self, positions: Tensor, origins: Tensor, dtype: torch.dtype) -> None:
        self._origins = origins
        self._narrow = torch.sub(positions, origins, out=torch.empty_like(positions, dtype=dtype))

    @property
    def tensor(self) -> Tensor:
        """The positions, in fresh memory."""
        return self._narrow + self._origins


def pack(state: Tensor) -> Tensor | Packed:
    """Return a large mask in one bit an element, and anything else as it is."""
    count = state.numel()
    is_fit = state.dtype == torch.bool and count >= _LARGE and count % 8 == 0
    return Bits(state) if is_fit and _fills(state) and type(state) is Tensor else state


def pack_positions(positions: Tensor, windows: Callable[[], tuple[Tensor, int]]) -> Packed:
    """Return positions of maxima in as few bytes as their windows need.

    Args:
        positions: Flat positions, (..., windows).
        windows: Gives the flat position at which each window begins, and the largest that one holds beyond that.

    Returns:
        The positions, packed.
    """
    origins, reach = windows()
    dtype = torch.uint8 if reach < 2**8 else torch.int16 if reach < 2**15 else torch.int32
    return Positions(positions, origins, dtype)


@cache
def _eight_of_each_byte(device: torch.device) -> Tensor:
    """Return for each byte its eight bits, the lowest first, as eight bytes read as one number, (256,)."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (bits & 1).to(torch.uint8).view(torch.int64)[:, 0]


def _fills(tensor: Tensor) -> bool:
    """Return whether its elements fill their memory from its beginning, in whatever order, each once."""
    pairs = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    sizes = [size for _, size in pairs]
    dense = all(step == math.prod(sizes[:at]) for at, (step, _) in enumerate(pairs))
    return dense and int(tensor.storage_offset()) % 8 == 0


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    """Return parts of a flat tensor, each entry of which stands for eight elements."""
    yield from flat.split(_CHUNK // 8) if flat.device.type == "cpu" else (flat,)
