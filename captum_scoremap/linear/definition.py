"""The definition: Eq. (2)-(4) of Yu et al. 2015 as plainly as they can be said, on a recorded tape.

Nothing here is fast, and nothing else is the reference: every other way to a score map must give what these functions
give.
"""

import torch
from torch import Tensor

from captum_scoremap.rules import Value
from captum_scoremap.tape import Tape

__all__ = ["bias", "coefficients", "score", "score_map"]


def score(tape: Tape, layer: Value, output: Value, activations: Tensor, bit: int) -> Tensor:
    """S(Y): the layers above, Y_l = R_l (F_l Y_{l-1} + b_l) with R_l as at the image, Eq. (2), from Y on."""
    return tape.forward({layer: activations}, [output], sites=bit)[output]


def coefficients(tape: Tape, layer: Value, output: Value, activations: Tensor, bit: int) -> Tensor:
    """A of Eq. (3): the derivative of the affine function S(Y)."""
    leaf = activations.detach().requires_grad_()
    with torch.enable_grad():
        total = score(tape, layer, output, leaf, bit).sum()
    return torch.autograd.grad(total, leaf)[0]


def bias(tape: Tape, layer: Value, output: Value, activations: Tensor, bit: int) -> Tensor:
    """B of Eq. (3): S(0), so that S(Y) = A·Y + B."""
    return score(tape, layer, output, torch.zeros_like(activations), bit)


def score_map(tape: Tape, layer: Value, output: Value, activations: Tensor, bit: int, channel_dim: int = 1) -> Tensor:
    """M of Eq. (4): A·Y summed over channels."""
    return (coefficients(tape, layer, output, activations, bit) * activations).sum(channel_dim, keepdim=True)
