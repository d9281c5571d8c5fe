"""CompleteScoreMap: a map that adds up to the score."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_scoremap.checks import check_images
from captum_scoremap.layout import Grid
from captum_scoremap.linear import Ledger, Subject, explain_completely
from captum_scoremap.rules import Rule
from captum_scoremap.scores import Target

from .contract import Contract
from .default_layers import DefaultLayers, named_layers

__all__ = ["CompleteScoreMap"]

Layers = nn.Module | Sequence[nn.Module] | Literal["image"] | None


class CompleteScoreMap(Contract):
    """The signed map that adds up to the score: the score map of a layer, and every constant above it at its place.

    S = A·Y + B is exact at every layer, but at all layers but the last most of S is B, one number without a place. B is
    made of the constant parts o_k of the operations above (biases, norms, saturated units), and each of them stands at
    a position::

        C_l(p) = M_l(p) + sum over k above l, over channels c, of A_k(c, p) o_k(c, p)
        sum of C_l + placeless = S

    ``placeless`` is what has no place in the image: head biases and class tokens.

    The map is signed. Read it as sums over regions, in logits, not as its positive parts: neighboring cells cancel.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        layers: A module: its complete map on its own grid. Several: the mean of theirs, on the image's size. "image":
            that of the image itself. None for the last main layer of each of the two coarsest resolutions (main layers:
            those that the fewest modules enclose), weighted by the size of their cells, for late layers know what, the
            ones before know better where; and by how much of a layer's sub-scores stands at its places rather than on
            class tokens. A network of one resolution has one.
        rules: Operation to rule, to replace or add some.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(200, 10)
        ... ).eval()
        >>> image = torch.rand(2, 3, 16, 16)
        >>> complete, placeless = CompleteScoreMap(model).attribute(image, target=7, return_placeless=True)
        >>> complete.shape, bool(torch.allclose(complete.sum((1, 2, 3)) + placeless, model(image)[:, 7], atol=1e-5))
        (torch.Size([2, 1, 16, 16]), True)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Layers = None,
        *,
        rules: Mapping[Any, Rule] | None = None,
    ) -> None:
        super().__init__(forward_func, rules)
        self._modules = [] if layers == "image" else named_layers(forward_func, layers)
        self._has_own_grid = isinstance(layers, nn.Module)
        self._default_layers = DefaultLayers()

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object = None,
        return_placeless: bool = False,
    ) -> Any:
        """Return the complete map.

        Args:
            inputs: The image, (N, C, H, W).
            target: Label of each image in any of Captum's forms, or a function from the model's output to (N,).
            additional_forward_args: Additional arguments of ``forward_func``; they are constants.
            return_placeless: Whether to return what has no place in the image, too.

        Returns:
            Tensor in logits, (N, 1, h, w) for one layer, else (N, 1, H, W); in a tuple if ``inputs`` is one. With
            ``return_placeless`` a pair of it and a tensor (N,) in logits.

        Raises:
            TypeError: If the input is not floating point, or a target has no known form.
            ValueError: If the input, the target or a layer is not as it must be, or the model is in training mode.
            RuntimeError: If ``torch.inference_mode`` is on.
            UnsupportedOperationError: If operations have no rule; all are listed.
        """
        image = check_images(inputs)
        subject = self._subject((image,), additional_forward_args)
        if self._modules is None:
            books, score = self._default_layers.explained(
                subject, target, lambda subject, layers: _explained(subject, target, _coarsest(layers))
            )
        else:
            books, score = _explained(subject, target, self._modules)
        size = None if self._has_own_grid else (image.shape[2], image.shape[3])
        with torch.no_grad():
            weights = _default_weights(books, score) if self._modules is None else torch.ones(len(books), 1)
            weights = (weights / weights.sum(0)).to(score)
            each = list(zip(weights, books, strict=True))
            complete = sum(weight[:, None, None, None] * book.complete_map(size) for weight, book in each)
            placeless = sum(weight * book.placeless_sum(score, size) for weight, book in each)
        formatted = complete if isinstance(inputs, Tensor) else (complete,)
        return (formatted, placeless) if return_placeless else formatted


def _coarsest(layers: Mapping[nn.Module, Grid]) -> list[nn.Module]:
    """Return the last layer of each of the two coarsest resolutions, the finer one first."""
    last = {grid: module for module, grid in layers.items()}
    return [last[grid] for grid in sorted(last, key=math.prod)[1::-1]]


def _explained(subject: Subject, target: Target, layers: Sequence[nn.Module]) -> tuple[list[Ledger], Tensor]:
    """Return the ledgers of layers, or that of the image where there are none, and the score."""
    return explain_completely(subject, target, [(layer, False) for layer in layers] or [None])


def _default_weights(books: Sequence[Ledger], score: Tensor) -> Tensor:
    """Return the weights of the default layers' complete maps, (layers, N): the size of a cell times a share.

    The share is that of the layer's sub-scores which stands at places: where a transformer has carried the score over
    to its class token, the map of its tokens is nearly empty. Without class tokens it is 1.
    """
    weights = []
    for book in books:
        own = book.maps.get("")
        share = torch.ones_like(score)
        if own is not None and "" in book.placeless:
            placed, rest = own.flatten(1).sum(1).abs(), book.placeless[""].abs()
            tiny = torch.finfo(placed.dtype).tiny  # of no score at all
            share = (placed + tiny) / (placed + rest + tiny)
        weights.append(share / (1 if own is None else own.shape[2]))
    return torch.stack(weights)
