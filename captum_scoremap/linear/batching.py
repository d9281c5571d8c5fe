"""Many passes over a tape at once: one for each label, image or position."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.tape import check_finite

__all__ = ["over_rows", "quiet_batching"]


@contextmanager
def quiet_batching() -> Iterator[None]:
    """Silence PyTorch's warning about operations without a batching rule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


def over_rows(function: Callable[[Tensor], Mapping[Any, Tensor]], rows: Tensor) -> dict[Any, Tensor]:
    """Call a function for each row, (rows, ...), all at once, and stack what it returns by key, (rows, ...)."""
    if len(rows) == 1:
        return {key: result[None] for key, result in function(rows[0]).items()}
    keys: list[Any] = []

    def results(row: Tensor) -> tuple[Tensor, ...]:
        found = function(row)
        keys[:] = found
        return tuple(found.values())

    try:
        with quiet_batching():
            found = dict(zip(keys, torch.func.vmap(results)(rows), strict=True))
    except RuntimeError:  # an operation that functorch cannot batch
        each = [function(row) for row in rows]
        return {key: torch.stack([one[key] for one in each]) for key in each[0]}
    check_finite(found.values())
    return found
