"""The table: name of a plain function to what does the same faster."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .byte_masks import differs, masked, piece, times, which_piece
from .chunks import summed_products
from .convolutions import convolved_back
from .packed import pack, pack_positions

__all__ = ["FAST", "faster", "plainly"]

Function = TypeVar("Function", bound=Callable[..., Any])

FAST: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (convolved_back, differs, masked, pack, pack_positions, piece, summed_products, times, which_piece)
}


def faster(plain: Function) -> Function:
    """Return a function that does what ``FAST`` has for a plain one, or the plain one where it has nothing.

    Args:
        plain: The plain function, which is the definition.

    Returns:
        The function.

    Example:
        >>> @faster
        ... def twice(x):
        ...     return x + x
        >>> twice(2)
        4
    """

    @functools.wraps(plain)
    def run(*args: Any) -> Any:
        return FAST.get(plain.__name__, plain)(*args)

    return run  # type: ignore[return-value]  # of the same signature


@contextmanager
def plainly() -> Iterator[None]:
    """Do everything the plain way meanwhile."""
    ways = dict(FAST)
    FAST.clear()
    try:
        yield
    finally:
        FAST.update(ways)
