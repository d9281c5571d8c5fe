"""How the image lies in a map: mirrored, on its side, shifted round, or as it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["UPRIGHT", "Turn", "turn_of"]


@dataclass(frozen=True)
class Turn:
    """How the image lies in a map: with its sides swapped, then mirrored, then shifted round."""

    swapped: bool = False
    mirrored: tuple[bool, bool] = (False, False)  # the map's rows, its columns
    shifted: tuple[float, float] = (0.0, 0.0)  # fractions of the map's rows, of its columns

    def done(self, one: Tensor) -> Tensor:
        """Return a map that lies as the image does, (..., h, w), turned."""
        return self._shifted(self._mirrored(one.mT if self.swapped else one), 1)

    def undone(self, one: Tensor) -> Tensor:
        """Return a turned map, (..., h, w), as the image lies."""
        one = self._mirrored(self._shifted(one, -1))
        return one.mT if self.swapped else one

    def unshifted(self) -> "Turn":
        """Return the turn without what is shifted."""
        return Turn(self.swapped, self.mirrored)

    def _mirrored(self, one: Tensor) -> Tensor:
        axes = [axis for axis, is_mirrored in zip((-2, -1), self.mirrored, strict=True) if is_mirrored]
        return one.flip(axes) if axes else one

    def _shifted(self, one: Tensor, sign: int) -> Tensor:
        cells = [sign * round(part * size) for part, size in zip(self.shifted, one.shape[-2:], strict=True)]
        return one.roll(cells, (-2, -1)) if any(cells) else one


UPRIGHT = Turn()


def turn_of(row: Tensor, column: Tensor) -> Turn | None:
    """Return how the image lies in a map.

    Args:
        row: Of each cell, (h, w), where in the image it stands, as a fraction of its height.
        column: The same of its width.

    Returns:
        The turn; None where the cells are not, in some such order, those of the whole image.
    """
    for swapped, first, second in ((False, row, column), (True, column, row)) if row.numel() > 1 else ():
        if _differ(first, 1) or _differ(second, 0):
            continue
        lines = [_line(first[:, 0]), _line(second[0])]
        if None not in lines:
            mirrored, shifted = zip(*filter(None, lines), strict=True)
            return Turn(swapped, mirrored, shifted)
    return None


def _differ(places: Tensor, axis: int) -> bool:
    """Return whether places differ along an axis."""
    return not bool((places.amax(axis) - places.amin(axis) <= 1e-3).all())


def _line(places: Tensor) -> tuple[bool, float] | None:
    """Return whether a line of cells is mirrored, and by how much of it shifted; None if it is not the whole side."""
    size = len(places)
    whole = (torch.arange(size, dtype=places.dtype, device=places.device) + 0.5) / size
    if not bool(((places.sort().values - whole).abs() <= 1 / size).all()):
        return None
    for mirrored, start in ((False, int(places.argmin())), (True, int(places.argmax()))):
        steps = places.roll(-start).diff()
        if bool((steps < 0 if mirrored else steps > 0).all()):
            return mirrored, start / size
    return None
