"""Heads that score all views at once.

A head scores one window ``(N, C, h, w)``. Here its layers run on ``(N, C, rows, cols)``, one position per
view, as convolutions with a kernel of one by one: the sliding layer and the first linear layer together are
the convolution whose kernel is the window. Every layer keeps its name, its parameters and its hooks.
"""

from collections import OrderedDict
from typing import Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from captum_scoremap.multiview.geometry import Pair

_Layer = TypeVar("_Layer", bound=nn.Module)

_NEUTRAL = (nn.Identity, nn.Dropout, nn.AlphaDropout)
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.Sigmoid, nn.Softplus,
)  # fmt: skip
_NORMS_OF_MAPS = ("LayerNorm2d", "LayerNormAct2d")  # over channels, in torchvision and timm


class ViewLinear(nn.Linear):
    """A linear layer at every view: the convolution with a kernel of one by one."""

    def forward(self, views: Tensor) -> Tensor:
        """Return the layer's output at every view.

        Args:
            views: ``(N, C, rows, cols)``.

        Returns:
            ``(N, C', rows, cols)``.

        Raises:
            ValueError: If a view does not hold as many values as the layer takes.
        """
        if views.shape[1] != self.in_features:
            raise ValueError(
                f"window must hold the {self.in_features} values that the head takes, got {views.shape[1]}. "
                f"Give the rows and columns of the feature map on which the head was trained."
            )
        return F.linear(views.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


class ViewLayerNorm(nn.LayerNorm):
    """A layer norm over the channels of every view."""

    def forward(self, views: Tensor) -> Tensor:
        """Return the layer's output at every view.

        Args:
            views: ``(N, C, rows, cols)``.

        Returns:
            ``(N, C, rows, cols)``.
        """
        return super().forward(views.movedim(1, -1)).movedim(-1, 1)


class ViewBatchNorm(nn.BatchNorm1d):
    """A batch norm of the channels of every view, ``(N, C, rows, cols)`` in and out."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Take maps too: the statistics belong to channels."""


class ViewByView(nn.Module):
    """Any other head, run on the windows of all views as one batch.

    Args:
        head: A module from ``(N, C, h, w)`` to ``(N, K)``.
        window: h and w.
    """

    def __init__(self, head: nn.Module, window: Pair) -> None:
        super().__init__()
        self.head, self.window = head, window

    def forward(self, views: Tensor) -> Tensor:
        """Return the head's scores of every view.

        Args:
            views: The values of each window, ``(N, C * h * w, rows, cols)``.

        Returns:
            Scores ``(N, K, rows, cols)``.

        Raises:
            ValueError: If the head does not return ``(N, K)``.
        """
        images, _, rows, cols = views.shape
        windows = views.movedim(1, -1).reshape(images * rows * cols, -1, *self.window)
        scores: Tensor = self.head(windows)
        if scores.ndim != 2:
            raise ValueError(f"head must return scores (N, K), got {tuple(scores.shape)}. End it with nn.Flatten().")
        return scores.reshape(images, rows, cols, -1).movedim(-1, 1)


def at_every_view(head: nn.Module, window: Pair) -> tuple[nn.Module, bool]:
    """Return a head that scores all views at once, made of one that scores a single window.

    Args:
        head: A module from windows ``(N, C, h, w)`` to scores ``(N, K)``.
        window: h and w.

    Returns:
        The head for ``(N, C, rows, cols)``, layer by layer if every layer is known, else as one batch of
        windows; and whether it takes the mean of each window instead of its values.
    """
    way = _WayOfAWindow(window)
    try:
        layers = way.through(head)
    except _UnknownLayerError:
        return ViewByView(head, window), False
    return (layers, way.average) if way.stage == "vector" else (ViewByView(head, window), False)


class _UnknownLayerError(Exception):
    """A layer of a head that cannot run on all views at once."""


class _WayOfAWindow:
    """Follows a window through the layers of a head, and turns each into its form for all views."""

    def __init__(self, window: Pair) -> None:
        self.window = window
        self.stage: Literal["window", "bent window", "cell", "vector"] = "window"
        self.average = False

    def through(self, layer: nn.Module) -> nn.Module:
        """Return the form of `layer` for all views."""
        if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
            children = OrderedDict(
                (name, self.through(child)) for name, child in layer._modules.items() if child is not None
            )
            return _trained_as(layer, nn.Sequential(children))
        if isinstance(layer, _NEUTRAL):
            return layer
        if isinstance(layer, _ELEMENTWISE):
            self.stage = "bent window" if self.stage == "window" else self.stage  # no longer commutes with a mean
            return layer
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            self.stage = "vector"
            return _trained_as(layer, nn.Identity())
        if self.stage == "vector":
            return self._of_vector(layer)
        return self._of_cell(layer) if self.stage == "cell" else self._pooling(layer)

    def _pooling(self, layer: nn.Module) -> nn.Module:
        """Let pooling in front of a head become the window."""
        if not isinstance(layer, nn.AdaptiveAvgPool2d):
            raise _UnknownLayerError
        size = layer.output_size
        size = size if isinstance(size, tuple) else (size, size)
        if size == (1, 1) and self.stage == "window":
            self.stage, self.average = "cell", True
        elif size != self.window:
            raise _UnknownLayerError
        return _trained_as(layer, nn.Identity())

    @staticmethod
    def _of_cell(layer: nn.Module) -> nn.Module:
        """Layers that treat each position of a map alike need no change."""
        pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == layer.stride == (1, 1)
        if pointwise and layer.padding in {(0, 0), "same", "valid"}:
            return layer
        if isinstance(layer, nn.BatchNorm2d | nn.PReLU) or type(layer).__name__ in _NORMS_OF_MAPS:
            return layer
        raise _UnknownLayerError

    @staticmethod
    def _of_vector(layer: nn.Module) -> nn.Module:
        """Layers of vectors act on the channels of every view."""
        if isinstance(layer, nn.PReLU):
            return layer
        form = _FORMS.get(f"{type(layer).__module__}.{type(layer).__name__}")
        if form is None or (isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1):
            raise _UnknownLayerError
        # Another face of the same layer: what is trained, moved or hooked there is here, and vice versa.
        twin = form.__new__(form)
        object.__setattr__(twin, "__dict__", layer.__dict__)
        return twin


_FORMS: dict[str, type[nn.Module]] = {  # by exact class: the forward pass of a subclass may be another
    "torch.nn.modules.linear.Linear": ViewLinear,
    "timm.layers.linear.Linear": ViewLinear,
    "torch.nn.modules.normalization.LayerNorm": ViewLayerNorm,
    "torch.nn.modules.batchnorm.BatchNorm1d": ViewBatchNorm,
}


def _trained_as(layer: nn.Module, other: _Layer) -> _Layer:
    """Return `other` in the mode of `layer`, training or not, without touching its children."""
    other.training = layer.training
    return other
