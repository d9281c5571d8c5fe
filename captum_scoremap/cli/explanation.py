"""One image, one label, several layers: the numbers behind a picture, as a table and as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table
from torch import Tensor, nn

from captum_scoremap.checks import nearest
from captum_scoremap.layout import map_channel_dim, patch_grid, token_grid
from captum_scoremap.linear import LinearForm
from captum_scoremap.rules import tensors_in

INPUT = "input"
# Beyond this, the identity does not hold to rounding, even in 16 bits.
_LARGE_RESIDUAL = 1e-2


@dataclass(frozen=True)
class LayerNumbers:
    """The score as an exact sum at one layer, S = Σ A·Y + B.

    Attributes:
        layer: Name of the layer.
        size: Shape of its output without the batch.
        score_map: Sub-scores summed over channels, in logits, (h, w).
        total: Σ A·Y, in logits.
        bias: B, in logits.
        residual: |S - (Σ A·Y + B)| / (|S| + |Σ A·Y|), a fraction.
        complete_map: The score map plus every constant above it at its place, in logits, (h, w).
        placeless: S less the sum of the complete map, in logits: head biases, class tokens.
    """

    layer: str
    size: tuple[int, ...]
    score_map: Tensor
    total: float
    bias: float
    residual: float
    complete_map: Tensor
    placeless: float


@dataclass(frozen=True)
class Explanation:
    """Why an image has the score it has for a label, for one label rather than another, or by a function.

    Attributes:
        image: The image, as the user named it.
        label: Name of the label, "A − B" for a contrast, or name of the function.
        target: Index of the label; None for a function.
        contrast: Index of the label whose score is taken off; None for none.
        score: S, in logits.
        inputs: What the network saw, (C, H, W), normalized.
        layers: The numbers of each layer.
        complete_map: The complete map of the image's size, in logits, (H, W).
        placeless: S less its sum, in logits.
    """

    image: str
    label: str
    target: int | None
    contrast: int | None
    score: float
    inputs: Tensor
    layers: tuple[LayerNumbers, ...]
    complete_map: Tensor
    placeless: float

    def where_it_is(self) -> str:
        """Return how much of the score has a place, in a sentence."""
        held = self.score - self.placeless
        return (
            f"The complete map holds {held:.4f} of S = {self.score:.4f} logits; {self.placeless:.4f} have no place in "
            "the image."
        )

    def table(self) -> Table:
        """Return the numbers of all layers, to be printed."""
        table = Table(title=f"{self.image}: {self.label}, S = {self.score:.4f} logits", title_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("size", "Σ A·Y", "B", "S", "residual"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.layers:
            table.add_row(
                row.layer,
                " × ".join(map(str, row.size)),
                f"{row.total:.4f}",
                f"{row.bias:.4f}",
                f"{self.score:.4f}",
                f"{row.residual:.1e}",
                style="bold red" if not row.residual <= _LARGE_RESIDUAL else None,
            )
        return table

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return the numbers as arrays: one map by name of its layer, the rest in the order of ``layers``."""
        maps = {f"maps/{row.layer}": row.score_map.float().cpu().numpy() for row in self.layers}
        maps |= {f"complete_maps/{row.layer}": row.complete_map.float().cpu().numpy() for row in self.layers}
        return {
            "image": np.array(self.image),
            "label": np.array(self.label),
            "target": np.array(-1 if self.target is None else self.target),
            "contrast": np.array(-1 if self.contrast is None else self.contrast),
            "score": np.array(self.score),
            "layers": np.array([row.layer for row in self.layers]),
            "totals": np.array([row.total for row in self.layers]),
            "biases": np.array([row.bias for row in self.layers]),
            "residuals": np.array([row.residual for row in self.layers]),
            "placeless": np.array([row.placeless for row in self.layers]),
            "complete_map": self.complete_map.float().cpu().numpy(),
            **maps,
        }


def find_layers(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module | None]:
    """Return modules by the names that a user typed.

    Args:
        network: The model.
        names: Names of modules, or ``"input"`` for the image.

    Returns:
        The module of each name, None for the image.

    Raises:
        ValueError: There is no such module; suggests the nearest names.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    unknown = [name for name in names if name != INPUT and name not in modules]
    if unknown:
        advice = nearest(unknown[0], [INPUT, *modules])
        raise ValueError(f"layers must be input or names of modules of the model, got {unknown[0]!r}.{advice}")
    return {name: modules.get(name) for name in names}


def layer_numbers(
    form: LinearForm,
    name: str,
    inputs: Tensor,
) -> LayerNumbers:
    """Return the numbers of one layer.

    Args:
        form: The linear form there.
        name: Name of the layer, for tables.
        inputs: The image, (1, C, H, W).

    Returns:
        The numbers.

    Raises:
        ValueError: The output of the layer has no rows and columns.
    """
    if not isinstance(form.activations, Tensor):
        raise ValueError(f"layers must give one tensor, got {name}, which gives {len(form.activations)}.")
    size = tuple(form.activations.shape)
    channel_dim = map_channel_dim(size, form.input_shape)
    if channel_dim is None:
        raise ValueError(
            f"layers must give maps (N, C, h, w) or tokens (N, T, C), got {name}, which gives {size}. "
            "Choose one before the pooling or flattening."
        )
    (score_map,) = tensors_in(form.score_map(channel_dim))
    if channel_dim != 1:
        score_map = token_grid(score_map, patch_grid(size[1], form.input_shape) if len(size) == 3 else None)
    residual = float(form.relative_residual)
    complete = form.complete_map()
    shown = form.on_image(complete)
    return LayerNumbers(
        name,
        size[1:],
        form.on_image(score_map)[0, 0],
        float(form.sums),
        float(form.bias),
        residual,
        shown[0, 0],
        float(form.placeless + (complete.sum() - shown.sum())),  # and what stands on padding
    )
