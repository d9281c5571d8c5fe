"""Taps: where a score map is read off the backward pass.

A tap passes a layer's output Y on unchanged. In the backward pass it receives the coefficients A, hands them on, and
gives its *anchor*, a tensor shaped like the wanted result, that result as its gradient: ``torch.autograd.grad(score,
anchor)`` *is* the score map. So all layers' maps come from one backward pass, summed over channels as it goes by, and
batched over labels where autograd is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lean import Snapshot

__all__ = ["Reduction", "Tap", "tap"]


# Bytes from which products are taken image by image: fresh memory of that size costs more than the arithmetic.
_LARGE = 16 * 2**20


@dataclass(frozen=True)
class Reduction:
    """What to make of coefficients A and activations Y.

    Attributes:
        multiply: Whether to take the sub-scores A·Y, or A alone.
        channel_dim: Dimension to sum over, kept with size 1; None to sum over none. A layer whose output has no such
            dimension is left as it is.
    """

    multiply: bool = True
    channel_dim: int | None = None

    def shape(self, activations: Tensor) -> torch.Size:
        """Shape of the result."""
        shape, channels = list(activations.shape), self._channels(activations)
        if channels is not None:
            shape[channels] = 1
        return torch.Size(shape)

    def __call__(self, coefficients: Tensor, activations: Tensor) -> Tensor:
        """The result, shaped as ``shape`` says."""
        channels = self._channels(activations)
        if channels is None:
            return coefficients * activations if self.multiply else coefficients
        if not self.multiply:
            return coefficients.sum(channels, keepdim=True)
        size = activations.numel() * activations.element_size()
        if size < _LARGE or len(activations) == 1 or channels == -activations.dim():
            return (coefficients * activations).sum(channels, keepdim=True)
        pairs = zip(coefficients, activations, strict=True)
        return torch.stack([(a * y).sum(channels, keepdim=True) for a, y in pairs])

    def _channels(self, activations: Tensor) -> int | None:
        """The dimension to sum over, counted from the end, so that a batch of labels in front does no harm."""
        dims = activations.dim()
        if self.channel_dim is None or not -dims <= self.channel_dim < dims:
            return None
        return self.channel_dim % dims - dims


class Tap(torch.autograd.Function):
    """Y -> Y, with the anchor's gradient the reduction of A and Y."""

    @staticmethod
    def forward(
        ctx: Any, activations: Tensor, anchor: Tensor, snapshot: Snapshot, reduction: Reduction, once: bool
    ) -> Tensor:
        """Pass Y on, as a tensor of its own that shares its memory and may be changed in place."""
        del anchor
        ctx.snapshot, ctx.reduction, ctx.once = snapshot, reduction, once
        return activations.data

    @staticmethod
    def backward(ctx: Any, coefficients: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        """Hand A on, and its reduction to the anchor."""
        passed = coefficients if ctx.needs_input_grad[0] else None
        result = ctx.reduction(coefficients, ctx.snapshot.tensor)
        if ctx.once:
            ctx.snapshot.release()
        return passed, result, None, None, None


def tap(activations: Tensor, snapshot: Snapshot, reduction: Reduction, *, once: bool = False) -> tuple[Tensor, Tensor]:
    """Tap a tensor.

    Args:
        activations: Y.
        snapshot: Its values as they are now.
        reduction: What to make of A and Y.
        once: Whether the backward pass runs once, so that Y can be let go as it goes by.

    Returns:
        The tensor to go on with, and the anchor.
    """
    anchor = activations.new_zeros(()).expand(reduction.shape(activations)).requires_grad_()
    with torch.enable_grad():
        passed: Tensor = Tap.apply(activations, anchor, snapshot, reduction, once)
    return passed, anchor
