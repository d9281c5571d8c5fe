"""Masks as bytes: kernels of a CPU convert and multiply bytes many times faster than they choose by booleans."""

import torch
from torch import Tensor

__all__ = ["differs", "masked", "piece", "times", "which_piece"]


def differs(x: Tensor, value: float | Tensor) -> Tensor:
    """Return ``x != value``, which takes a vectorized conversion where a comparison is none."""
    return (x if not isinstance(value, Tensor) and value == 0 else x - value).bool()


def masked(coefficients: Tensor, state: Tensor) -> Tensor:
    """Return the coefficients where a mask is set: a product of two types would take ten times as long."""
    mask = state.view(torch.uint8) if state.dtype == torch.bool else state & 1
    return times(coefficients, mask.to(coefficients.dtype))


def times(coefficients: Tensor, slope: Tensor) -> Tensor:
    """Return the product in the slope's memory, if nobody wants derivatives or maps over a dimension of them."""
    is_watched = torch._C._functorch.peek_interpreter_stack() is not None or torch.is_grad_enabled()
    if is_watched or slope.shape != coefficients.shape or slope.dtype != coefficients.dtype:
        return coefficients * slope
    return slope.mul_(coefficients)


def which_piece(masks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return how many of the masks are set, as bytes."""
    total = masks[0].view(torch.uint8)
    for mask in masks[1:]:
        total = total + mask.view(torch.uint8)
    return total


def piece(state: Tensor, number: int, pieces: int, dtype: torch.dtype) -> Tensor:
    """Return 1 where an element is on a piece, else 0."""
    if state.dtype == torch.bool:
        return (state if number else ~state).view(torch.uint8).to(dtype)
    if pieces == 3 and number:
        return (state & 1 if number == 1 else state >> 1).to(dtype)
    return (state == number).view(torch.uint8).to(dtype)
