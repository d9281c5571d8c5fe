"""Remove and debias: does the score follow the pixels, if nothing shows which ones were taken away?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import solveh_banded
from torch import Tensor

from captum_scoremap.metrics.maps import (
    Attribution,
    Score,
    attribution_maps,
    check_batch_size,
    checked_target,
    in_batches,
    label_probabilities,
    ranks,
)

_WEIGHTS = {(0, 1): 1 / 6, (1, 0): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12}
"""Weight of a neighbor, rows and columns away, and of the one on the other side."""
_BAND = 2**21
"""Numbers in a band, 16 MiB; above that, a sparse solver takes less time or memory."""


@dataclass(frozen=True)
class Road:
    """The label's probability where a share of the pixels is imputed from its surroundings.

    Attributes:
        fractions: ``(T,)``, share of the pixels that is removed.
        most: ``(N, T)``, probabilities after the highest pixels of the map are removed.
        least: ``(N, T)``, after the lowest are.

    Example:
        >>> Road(torch.tensor([0.5]), torch.tensor([[0.2]]), torch.tensor([[0.8]])).combined
        tensor([0.3000])
    """

    fractions: Tensor
    most: Tensor
    least: Tensor

    @property
    def combined(self) -> Tensor:
        """Mean of (least - most) / 2 over the fractions, ``(N,)``, between -0.5 and 0.5; large is good."""
        return (self.least - self.most).mean(dim=1) / 2


def road(
    forward_func: Callable[..., Any],
    attribute: Attribution,
    inputs: Tensor,
    target: Score,
    fractions: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
) -> Road:
    """Remove the highest, and the lowest, pixels of the map, and fill the holes by noisy linear imputation.

    Rong et al. 2022, *A Consistent and Efficient Evaluation Strategy for Attribution Methods*: each removed pixel is
    the weighted mean of its eight neighbors (1/6 beside, 1/12 diagonal), which is one sparse linear system, plus a
    little noise. So the shape of the hole, which a constant color would show, tells the network nothing.

    Args:
        forward_func: The model; returns scores ``(N, K)``.
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        fractions: Shares of the pixels to remove.
        noise: Standard deviation of the noise, in units of the inputs.
        generator: Source of the noise; torch's default if None.
        batch_size: Images that the model sees at once.

    Returns:
        The probabilities of each image.

    Raises:
        ValueError: If inputs or target have the wrong shape, a fraction is not between 0 and 1 or leaves no pixel, or
            ``batch_size`` is not positive.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image, label = torch.rand(1, 2, 8, 8), torch.tensor([1])
        >>> good = road(model, lambda inputs, target: inputs[:, 1:], image, label).combined
        >>> bad = road(model, lambda inputs, target: -inputs[:, 1:], image, label).combined
        >>> bool(good > 0 > bad)
        True
    """
    target = checked_target(inputs, target)
    check_batch_size(batch_size)
    pixels = inputs.shape[-2] * inputs.shape[-1]
    removed = [round(fraction * pixels) for fraction in fractions]
    if not removed or not all(0 < count < pixels for count in removed):
        raise ValueError(
            f"fractions must be between 0 and 1, and leave at least one of {pixels} pixels; got {tuple(fractions)}."
        )
    rank = ranks(attribution_maps(attribute, inputs, target))
    holes = torch.stack([hole for count in removed for hole in (rank < count, rank >= pixels - count)], dim=1)

    def imputed(index: Tensor) -> Tensor:
        pairs = ((inputs[i // holes.shape[1]], holes[i // holes.shape[1], i % holes.shape[1]]) for i in index.tolist())
        filled = torch.stack([impute(image, hole) for image, hole in pairs])
        random = torch.randn(filled.shape, generator=generator, dtype=filled.dtype)
        return filled + noise * random.to(filled) * holes.flatten(0, 1)[index][:, None]

    probabilities = in_batches(label_probabilities, forward_func, imputed, inputs, target, holes.shape[1], batch_size)
    most, least = probabilities.view(len(inputs), len(removed), 2).unbind(dim=2)
    return Road(torch.tensor([count / pixels for count in removed]).to(inputs), most, least)


def impute(image: Tensor, hole: Tensor) -> Tensor:
    """Return an image in which each pixel of a hole is the weighted mean of its eight neighbors.

    With the weights W of neighbors in the image and d their sums, x solves (diag(d) - W) x = 0 in the hole.

    Args:
        image: ``(C, H, W)``.
        hole: Boolean ``(H, W)``, not all of it.

    Returns:
        ``(C, H, W)``.
    """
    laplacian = _laplacian(*hole.shape)
    missing = hole.flatten().numpy(force=True)
    pixels = image.flatten(1).T.numpy(force=True).astype(np.float64)
    pixels[missing] = 0
    right = -(laplacian @ pixels)[missing]
    small = len(right) * hole.shape[1] <= _BAND
    pixels[missing] = _solved_in_band(hole, missing, right) if small else _solved(laplacian, missing, right)
    return torch.from_numpy(pixels.T.copy()).to(image).view_as(image)


def _solved(laplacian: sparse.csr_array, missing: NDArray[np.bool_], right: NDArray[np.float64]) -> Any:
    """Return x with L x = right, (M, C), for the rows and columns of the Laplacian that belong to M missing pixels."""
    inside = laplacian[missing][:, missing].tocsc()
    factors = sparse.linalg.splu(
        inside, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    return factors.solve(right)


def _solved_in_band(hole: Tensor, missing: NDArray[np.bool_], right: NDArray[np.float64]) -> Any:
    """Return the same, in a fraction of the time where the band is small.

    Pixels are neighbors of those at most a row and a pixel later, so nothing else is beside the diagonal.
    """
    rows, columns, values = _lower(*hole.shape)
    inside = missing[rows] & missing[columns]
    number = np.cumsum(missing) - 1
    columns, below = number[columns[inside]], number[rows[inside]] - number[columns[inside]]
    band = np.zeros((below.max(initial=0) + 1, len(right)))
    band[below, columns] = values[inside]
    return solveh_banded(band, right, overwrite_ab=True, overwrite_b=True, lower=True, check_finite=False)


@lru_cache(maxsize=8)
def _lower(height: int, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
    """Rows, columns and values of the Laplacian's diagonal and what is below it."""
    found = sparse.tril(_laplacian(height, width)).tocoo()
    return found.row, found.col, found.data


@lru_cache(maxsize=8)
def _laplacian(height: int, width: int) -> sparse.csr_array:
    """Sums of the neighbors' weights on the diagonal, minus these weights beside it, (H * W, H * W)."""
    number = np.arange(height * width).reshape(height, width)
    rows, columns, weights = [], [], []
    for (down, right), weight in _WEIGHTS.items():
        here = number[: height - down, max(-right, 0) : width - max(right, 0)].ravel()
        there = number[down:, max(right, 0) : width + min(right, 0)].ravel()
        rows += [here, there]
        columns += [there, here]
        weights += [np.full(2 * len(here), weight)]
    between = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    neighbors = sparse.csr_array(between, shape=(height * width, height * width))
    return sparse.csr_array(sparse.diags_array(neighbors.sum(axis=1)) - neighbors)
