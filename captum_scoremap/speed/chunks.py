"""Products in chunks: fresh memory costs more than the arithmetic."""

import torch
from torch import Tensor

__all__ = ["summed_products"]

# Bytes from which products are taken image by image.
_LARGE = 16 * 2**20


def summed_products(coefficients: Tensor, activations: Tensor, dim: int) -> Tensor:
    """Return the sum of the products over a dimension, counted from the end; of large ones image by image."""
    size = activations.numel() * activations.element_size()
    if size < _LARGE or len(activations) == 1 or dim == -activations.dim() or torch.is_grad_enabled():
        return (coefficients * activations).sum(dim, keepdim=True)
    pairs = zip(coefficients, activations, strict=True)
    return torch.stack([(a * y).sum(dim, keepdim=True) for a, y in pairs])
