"""Rules of the user's are held to what the operation returned."""

import torch
from torch import Tensor

from captum_scoremap.checks import NoDerivativeError
from captum_scoremap.rules import Call, Rule, Tangent, substituted, tensors_in

__all__ = ["to_verify", "verify"]


def to_verify(call: Call) -> Call:
    """Return a copy of a call, to be verified later: below autograd, where calls arrive, a rule cannot use autograd."""
    copy = call.filled([tensor.clone() for tensor in call.live])
    copy.output = substituted(call.output, torch.clone)
    return copy


def verify(where: str, rule: Rule, call: Call) -> None:
    """Raise unless a user's rule returns at the image what the operation returns; ``where`` is what errors call it."""
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
            difference = (one - other).masked_fill(one == other, 0.0).abs().max()  # infinite ones may be equal
            size = one.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(torch.finfo(one.dtype).tiny)
            difference = difference / size
            if not difference <= tolerance:
                raise ValueError(
                    f"{where} must return the operation's value at the image, got a relative difference of "
                    f"{float(difference):.1e}. Check that apply(call, freeze(call)) equals call.run()."
                )
