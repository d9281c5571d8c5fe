"""Explains the batches of an audit by a compiled graph, where there are enough of them for it to pay."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from captum_scoremap.audit.explaining import ROLES, Explained, MapLayer, explain
from captum_scoremap.compiled import Backend, Batches, elsewhere

__all__ = ["ENOUGH", "Explainer"]

_BACKEND: Backend = "inductor"

ENOUGH = 5000
"""Images from which an audit is compiled by itself: what that saves exceeds the minute or two that it takes."""


class Explainer:
    """Explains batches of images, each as `explain` does; but for rounding, the numbers are the same.

    What is compiled is for the size of the first whole batch. Smaller batches are filled up; images of another size,
    and labels where the first batch had none, are explained as they are. So is everything where it cannot be compiled.

    Args:
        model: The network, in eval mode.
        layers: Its layers to map.
        pool: Layers whose output is pooled.
        kind: One of `MAPS`.
        batch_size: Images of a whole batch; 0 to compile nothing.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[MapLayer], pool: Sequence[MapLayer], kind: str, batch_size: int = 0
    ) -> None:
        self._model, self._layers, self._pool, self._kind = model, layers, pool, kind
        self._batch_size = batch_size
        self._batches: Batches | None = None
        self._shape: torch.Size | None = None
        self._spec = pytree.tree_structure(None)
        self._labels, self._passes = 0, 0

    def __call__(self, inputs: Tensor, true: Tensor) -> Explained:
        """Explain a batch.

        Args:
            inputs: Images (N, C, H, W).
            true: True labels (N,), -1 where not known.

        Returns:
            The maps.
        """
        if self._batch_size == len(inputs) and self._batches is None:
            return self._compile(inputs, true)
        if self._batches is None or not self._fits(inputs, true):
            return self._explained(inputs, true)
        return Explained(**pytree.tree_unflatten(self._batches(inputs, true), self._spec))

    def _explained(self, inputs: Tensor, true: Tensor, passes: int | None = None) -> Explained:
        return explain(self._model, self._layers, inputs, true, self._pool, self._kind, passes)

    def _fits(self, inputs: Tensor, true: Tensor) -> bool:
        known = self._labels if self._passes == len(ROLES) else 0
        return inputs.shape[1:] == self._shape and (self._labels == 1 or int(true.max()) < known)

    def _compile(self, inputs: Tensor, true: Tensor) -> Explained:
        """Explain the first whole batch as it is, and compile that."""
        found = self._explained(inputs, true)
        self._batch_size = 0  # once
        self._labels = found.scores.shape[1]
        self._passes = len(ROLES) if bool((found.labels[:, -1] >= 0).any()) else len(ROLES) - 1

        def tensors(passes: int | None) -> Callable[[Tensor, Tensor], list[Tensor]]:
            return lambda images, labels: pytree.tree_leaves(vars(self._explained(images, labels, passes)))

        def other(arguments: Sequence[Tensor]) -> Sequence[Tensor]:
            return *elsewhere(arguments[:1]), arguments[1].flip(0)

        try:
            modules = dict(self._model.named_modules())
            self._batches = Batches(tensors(self._passes), tensors(None), (inputs, true), other, modules, _BACKEND)
            self._shape, self._spec = inputs.shape[1:], pytree.tree_structure(vars(found))
        except Exception as error:  # whatever a compiler raises, the maps can be had without it
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"maps are computed without compiling them, which takes longer: {reason}", stacklevel=2)
        return found
