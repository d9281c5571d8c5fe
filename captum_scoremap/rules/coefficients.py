"""What coefficients go through on their way back through any operation: sums, casts and conjugates."""

from typing import Any

from torch import Tensor

from .call import Value

__all__ = ["cast", "conjugate", "summed_to"]


def summed_to(gradient: Tensor, value: Value) -> Tensor:
    """Return the transpose of broadcasting and casting: the sum over what was repeated, in the type of the value."""
    return cast(gradient if gradient.shape == value.shape else gradient.sum_to_size(value.shape), value)


def cast(gradient: Tensor, value: Value) -> Tensor:
    """Return the transpose of casting: coefficients in the type of the value; of a real one, their real part."""
    if gradient.dtype == value.dtype:
        return gradient
    return (gradient.real if gradient.is_complex() and not value.dtype.is_complex else gradient).to(value.dtype)


def conjugate(factor: Any) -> Any:
    """Return what a coefficient is multiplied by, going back through a factor: itself, unless it is complex."""
    if isinstance(factor, Tensor):
        return factor.conj() if factor.is_complex() else factor
    return factor.conjugate() if isinstance(factor, complex) else factor
