"""Token networks: tokens laid out as the grid of patches they stand for."""

import math

from torch import Tensor

__all__ = ["token_grid"]


def token_grid(score_map: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Lay the tokens of a score map out as an image, so that it plots like any other.

    Class and register tokens, which stand before the patches and have no place in the image, are left out; what they
    add to the score is the difference of the sums.

    Args:
        score_map: Map of a token layer, taken with ``channel_dim=-1``: (N, tokens, K) as in ViT, or (N, h, w, K) as in
            Swin.
        grid: Rows and columns of patches; None for the largest square that the tokens fill.

    Returns:
        (N, K, h, w), in the units of the map.

    Raises:
        ValueError: If the map has another number of dimensions, or fewer tokens than the grid.

    Example:
        >>> import torch
        >>> token_grid(torch.rand(1, 197, 1)).shape  # a class token and 14 x 14 patches
        torch.Size([1, 1, 14, 14])
    """
    if score_map.dim() == 4:
        return score_map.movedim(-1, 1)
    if score_map.dim() != 3:
        raise ValueError(f"score_map must be (N, tokens, K) or (N, h, w, K), got {tuple(score_map.shape)}.")
    tokens = score_map.shape[1]
    rows, columns = grid if grid is not None else (math.isqrt(tokens), math.isqrt(tokens))
    if tokens < rows * columns:
        raise ValueError(f"grid must have at most {tokens} patches, one for each token, got {rows} x {columns}.")
    patches: Tensor = score_map[:, tokens - rows * columns :].unflatten(1, (rows, columns))
    return patches.movedim(-1, 1)
