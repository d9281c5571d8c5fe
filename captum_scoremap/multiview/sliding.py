"""The two layers that the multi-view architecture adds to a network: sliding and sum-pooling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_scoremap.multiview.geometry import Pair


def five_positions(size: Pair, window: Pair) -> list[Pair]:
    """Return row and column of the windows at corners and center of a map, in the order of ``five_crop``."""
    bottom, right = size[0] - window[0], size[1] - window[1]
    return [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]


class Sliding(nn.Module):
    """Move a window over feature maps; every position of it is a view.

    Args:
        window: Rows and columns of the window, in cells of the feature map.
        stride: Cells between neighboring windows, down and right.
        average: Return the mean of a window, as the head begins with average pooling, instead of its values.
        five: Only the windows at the corners and the center of the map, as one row of five.
    """

    def __init__(self, window: Pair, stride: Pair, *, average: bool, five: bool) -> None:
        super().__init__()
        self.window, self.stride, self.average, self.five = window, stride, average, five

    def forward(self, maps: Tensor) -> Tensor:
        """Return one position per view.

        Args:
            maps: Feature maps ``(N, C, h, w)``.

        Returns:
            ``(N, C, rows, cols)`` with `average`; else ``(N, C * window, rows, cols)``, the values of a
            window in the order of ``flatten``.
        """
        height, width = self.window
        if self.five:
            positions = five_positions((maps.shape[2], maps.shape[3]), self.window)
            windows = torch.stack([maps[:, :, y : y + height, x : x + width] for y, x in positions], 2)[:, :, None]
        elif self.average:
            return F.avg_pool2d(maps, self.window, self.stride)
        else:
            windows = maps.unfold(2, height, self.stride[0]).unfold(3, width, self.stride[1])
        if self.average:
            return windows.mean((-2, -1))
        # The values of a view lie side by side in memory: the matrix products of the head need no other copy.
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).movedim(-1, 1)

    def extra_repr(self) -> str:
        """Return the settings for ``print``."""
        return f"window={self.window}, stride={self.stride}, average={self.average}, five={self.five}"


class SumPooling(nn.Module):
    """Average the scores of all views."""

    def forward(self, scores: Tensor) -> Tensor:
        """Return the mean score of every label.

        Args:
            scores: Scores of the views, ``(N, K, rows, cols)``.

        Returns:
            Mean scores ``(N, K)``.
        """
        return scores.mean((-2, -1))
