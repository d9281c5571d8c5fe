"""Rules of the user's are held to what the operation returned."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.rules import Tangent, tensors_in
from captum_scoremap.rules.derivative import NoDerivativeError

from .steps import Step

__all__ = ["verify"]


def verify(where: str, step: Step, live: Iterable[Tensor], output: Any) -> None:
    """Raise unless a user's rule returns at the image what the operation returns; ``where`` is what errors call it."""
    rule, call = step.rule, step.filled(live)  # constants as they were, which the step knows
    call.output = output
    try:
        with torch.no_grad():
            expected, frozen = call.output, rule.apply(call, rule.freeze(call))
    except (RuntimeError, ValueError) as error:
        if not isinstance(rule, Tangent):
            raise
        raise NoDerivativeError(where, error.__cause__ or error) from error
    pairs = list(zip(tensors_in(expected), tensors_in(frozen), strict=False))
    if not pairs and isinstance(expected, Tensor):
        raise TypeError(f"{where} must return a tensor, got {type(frozen).__name__}.")
    for one, other in pairs:
        if one.shape != other.shape:
            raise ValueError(
                f"{where} must return shape {tuple(one.shape)}, as the operation does, got {tuple(other.shape)}."
            )
        if one.dtype != other.dtype:
            raise ValueError(f"{where} must return {one.dtype}, as the operation does, got {other.dtype}.")
        if one.is_floating_point() and one.numel():
            tolerance = 1e3 * torch.finfo(one.dtype).eps
            is_equal = (one == other) | (one.isnan() & other.isnan())  # infinite ones, too, and what a mask hides
            difference = (one - other).masked_fill(is_equal, 0.0).abs().max()
            size = one.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(torch.finfo(one.dtype).tiny)
            difference = difference / size
            if not difference <= tolerance:
                raise ValueError(
                    f"{where} must return the operation's value at the image, got a relative difference of "
                    f"{float(difference):.1e}. Check that apply(call, freeze(call)) equals call.run()."
                )
