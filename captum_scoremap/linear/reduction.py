"""What to make of coefficients A and activations Y: sub-scores, score maps, sums for each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_scoremap.rules import Value
from captum_scoremap.speed import faster

__all__ = ["Reduction", "relative_residual"]


@dataclass(frozen=True)
class Reduction:
    """What to make of coefficients A and activations Y."""

    multiply: bool = True  # whether to take the sub-scores A·Y, or A alone
    # to sum over, kept with size 1, or what finds it by the shape; None, or none there, to sum over none
    channel_dim: int | Callable[[Sequence[int]], int] | None = None
    images: int | None = None  # how many there are, so that their dimension is not taken for the channels'

    def channels(self, activations: Tensor | Value) -> int | None:
        """Return the dimension to sum over, counted from the end, where a batch of labels in front does no harm.

        Raises:
            ValueError: If the one that a caller names is none of the tensor's, or that of the images.
        """
        dims = activations.ndim
        channels = self.channel_dim(activations.shape) if callable(self.channel_dim) else self.channel_dim
        if channels is None or (dims == 1 and channels == 1):  # one number for each image
            return None
        is_there = -dims <= channels < dims
        if not callable(self.channel_dim) and (not is_there or self._holds_images(channels % dims, activations)):
            raise ValueError(
                f"channel_dim must be the dimension of the channels, from {-dims} to {dims - 1} and not that of the "
                f"images, got {channels} for a layer of {tuple(activations.shape)}. Leave it out to find it by the "
                "shapes."
            )
        return channels % dims - dims if is_there else None

    def _holds_images(self, axis: int, activations: Tensor | Value) -> bool:
        return axis == 0 and activations.shape[0] == self.images

    def shape(self, activations: Tensor | Value) -> torch.Size:
        """Return the shape of the result."""
        shape, channels = list(activations.shape), self.channels(activations)
        if channels is not None:
            shape[channels] = 1
        return torch.Size(shape)

    def __call__(self, coefficients: Tensor, activations: Tensor) -> Tensor:
        """Return the result, shaped as ``shape`` says."""
        channels = self.channels(activations)
        if channels is None:
            return coefficients * activations if self.multiply else coefficients
        if not self.multiply:
            return coefficients.sum(channels, keepdim=True)
        return summed_products(coefficients, activations, channels)

    def at(self, activations: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from coefficients A to the result, for given activations Y."""
        return lambda coefficients: self(coefficients, activations)


@faster
def summed_products(coefficients: Tensor, activations: Tensor, dim: int) -> Tensor:
    """Return A·Y summed over a dimension, counted from the end, which is kept with size 1."""
    return (coefficients * activations).sum(dim, keepdim=True)


def relative_residual(residual: Tensor, score: Tensor, sums: Tensor) -> Tensor:
    """Return |S - (A·Y + B)| / (|S| + |A·Y|), a fraction."""
    scale = score.abs() + sums.abs()
    return residual.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)
