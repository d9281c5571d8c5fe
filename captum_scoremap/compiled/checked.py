"""Is a program the map? It is run beside it, at the example and at a random image, where all that is frozen differs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Program

__all__ = ["check", "elsewhere", "run"]

_SMALL = 1e-3
# Of the random image: with 0, an example that was drawn with torch.manual_seed(0) would be compared with itself.
_SEED = 0x5C03E3A9


def run(program: Program, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run a program as it was traced: without gradients, and without casts of its own."""
    with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
        return program(*(argument.detach() for argument in arguments))


def elsewhere(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return random inputs with the mean and the spread of these; of tokens those there are, in another order."""
    generator = torch.Generator().manual_seed(_SEED)
    found = []
    for tensor in inputs:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            found.append(torch.empty_like(tensor).copy_(tensor.mean() + noise * tensor.std(correction=0)))
        else:
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            found.append(tensor.reshape(-1)[order].reshape(tensor.shape))
    return tuple(found)


def check(what: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raise unless tensors are as expected.

    Args:
        what: What gave them.
        got: The tensors.
        expected: What they must be.
        tolerance: The largest norm of a difference that counts as rounding, a fraction of the norm.

    Raises:
        ValueError: If they are not.
    """
    norms = [float(wanted.detach().cpu().double().norm()) for wanted in expected]
    # what is small beside all else may be rounding itself, such as a convergence delta
    least = max(torch.finfo(torch.float32).tiny, _SMALL * max((norm for norm in norms if norm < math.inf), default=0))
    for one, wanted, norm in zip(got, expected, norms, strict=True):
        if one.shape == wanted.shape:
            change = one.detach().cpu().double() - wanted.detach().cpu().double()
            difference = float(change.norm()) / max(norm, least)
            if difference <= tolerance or bool((one.cpu() == wanted.cpu()).all()):
                continue
            how = f"a relative difference of {difference:.1e}"
        else:
            how = f"the shape {tuple(one.shape)} for {tuple(wanted.shape)}"
        advice = "Use method.attribute; against rounding, compute in float64."
        if wanted.is_cuda and torch.backends.cudnn.allow_tf32:
            advice = "Switch off TF32, which keeps 10 bits: torch.backends.cudnn.allow_tf32 = False."
        raise ValueError(
            f"{what} must give what method.attribute gives, got {how}: the model does something else from call to "
            f"call, or magnifies rounding until masks differ. {advice}"
        )
