"""Eq. (2)-(3) as objects: the score of a label as A·Y + B with the outputs Y of any layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import check_callable, check_inputs, check_layer, unwrap_parallel
from captum_scoremap.rules import Rule, tensors_in
from captum_scoremap.scores import Target, select_scores
from captum_scoremap.tape import Site, as_tuple_of_arguments

from .explanation import explain
from .ledger import Ledger, ledgers
from .reduction import Reduction

__all__ = ["LinearForm", "linear_form"]

Tensors = Tensor | tuple[Tensor, ...]


def _no_ledger() -> Ledger:
    raise ValueError(
        "complete maps are those of a form of one layer with a place in the image, as linear_form returns it; got "
        "another. Take the complete map of each form first."
    )


@dataclass(frozen=True)
class LinearForm:
    """The score of a label as an affine function of one layer's output: S = A·Y + B, Eq. (3) of Yu et al. 2015.

    Attributes:
        coefficients: A, shaped like the layer's output (a tuple where it has several).
        activations: Y.
        bias: B, (N,), in logits: the frozen model with the layer at zero.
        score: S, (N,), in logits, as the model gives it.
        sums: Sum of A·Y for each image, (N,), in logits.

    Example:
        >>> form = linear_form(nn.Linear(3, 2), torch.rand(1, 3), target=0)
        >>> bool(torch.allclose(form.score, form.sub_scores.sum(1) + form.bias))
        True
    """

    coefficients: Tensors
    activations: Tensors
    bias: Tensor
    score: Tensor
    sums: Tensor
    _ledger: Callable[[], Ledger] = field(repr=False, compare=False, default=_no_ledger)

    def complete_map(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return the complete map C: the score map plus every constant above the layer, at its place.

        C_l(p) = M_l(p) + sum over the operations k above l of beta_k(p); the sum over positions is S - ``placeless``.
        Read it as sums over regions.

        Args:
            size: Rows and columns; None for the layer's own grid. Sums are kept.

        Returns:
            In logits, (N, 1, rows, columns).
        """
        return self._ledger().complete_map(size)

    @property
    def placeless(self) -> Tensor:
        """What of S has no place in the image, (N,), in logits: head biases, class tokens."""
        return self._ledger().placeless_sum(self.score)

    @property
    def sub_scores(self) -> Tensors:
        """The products A·Y, in logits, shaped like the layer's output."""
        if isinstance(self.coefficients, Tensor) and isinstance(self.activations, Tensor):
            return self.coefficients * self.activations
        return tuple(a * y for a, y in zip(self.coefficients, self.activations, strict=True))

    def score_map(self, channel_dim: int = 1) -> Tensors:
        """Return the score map M, Eq. (4): the sub-scores summed over channels, kept with size 1.

        Args:
            channel_dim: Dimension of the channels; -1 for tokens, (N, tokens, C).

        Returns:
            In logits, (N, 1, H, W) for a layer of (N, C, H, W).
        """
        reduction = Reduction(channel_dim=channel_dim)
        if isinstance(self.coefficients, Tensor) and isinstance(self.activations, Tensor):
            return reduction(self.coefficients, self.activations)
        return tuple(reduction(a, y) for a, y in zip(self.coefficients, self.activations, strict=True))

    @property
    def residual(self) -> Tensor:
        """S - (A·Y + B), (N,), in logits: zero except for rounding. S, A and B come from three computations."""
        return self.score - (self.sums + self.bias)

    @property
    def relative_residual(self) -> Tensor:
        """|residual| / (|S| + |A·Y|), (N,), a fraction."""
        scale = self.score.abs() + self.sums.abs()
        return self.residual.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)

    def __sub__(self, other: "LinearForm") -> "LinearForm":
        """Return the contrast "why this label and not that": coefficients, bias and score subtracted; Y is the same."""
        if not isinstance(other, LinearForm):
            return NotImplemented
        mine, others = list(tensors_in(self.activations)), list(tensors_in(other.activations))
        if [t.shape for t in mine] != [t.shape for t in others] or not all(map(torch.equal, mine, others)):
            raise ValueError(
                "two linear forms must be of the same layer at the same image to be subtracted; got different "
                "activations."
            )
        if isinstance(self.coefficients, Tensor) and isinstance(other.coefficients, Tensor):
            coefficients: Tensors = self.coefficients - other.coefficients
        else:
            coefficients = tuple(a - b for a, b in zip(self.coefficients, other.coefficients, strict=True))
        return LinearForm(
            coefficients,
            self.activations,
            self.bias - other.bias,
            self.score - other.score,
            self.sums - other.sums,
        )


def linear_form(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Target = None,
    layer: nn.Module | None = None,
    additional_forward_args: object = None,
    *,
    attribute_to_layer_input: bool = False,
    rules: Mapping[Any, Rule] | None = None,
) -> LinearForm:
    """Return the score of a label as A·Y + B with the output Y of a layer, Eq. (3) of Yu et al. 2015.

    A comes from one backward pass, B from the frozen model with the layer set to zero, S from the model itself, so that
    ``residual`` is a check of all three.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        inputs: The image, (N, C, H, W), or a tuple of such inputs.
        target: Label of each image, in any of Captum's forms, or a function from the model's output to (N,).
        layer: The layer; None for the image itself. If it runs more than once, its last call counts.
        additional_forward_args: Additional arguments; they are constants.
        attribute_to_layer_input: Whether Y is the layer's input.
        rules: Operation to rule, to replace or add some.

    Returns:
        The linear form.

    Raises:
        TypeError: If the model is compiled or scripted, an input is not floating point, or the layer is no module.
        ValueError: If an input, the target or the layer is not as it must be.
        RuntimeError: If ``torch.inference_mode`` is on.
        UnsupportedOperationError: If operations have no rule; all are listed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> form = linear_form(model, torch.rand(2, 3, 6, 6), target=7, layer=model[1])
        >>> form.score_map().shape
        torch.Size([2, 1, 4, 4])
        >>> bool(form.relative_residual.max() < 1e-5)
        True
    """
    check_callable(forward_func)
    tensors = check_inputs(inputs, indices=layer is not None)
    site: Site | None = None
    if layer is not None:
        check_layer(forward_func, layer)
        site = (layer, attribute_to_layer_input)
    forward_func = unwrap_parallel(forward_func)
    additional = as_tuple_of_arguments(additional_forward_args)

    def select(output: Any) -> Tensor:
        return select_scores(output, target, len(tensors[0]))

    found = explain(
        forward_func, tensors, select, [site], Reduction(multiply=False), additional, rules=rules, keep=True
    )
    coefficients, activations = found.results[site], found.tapped(site).activations
    single = isinstance(inputs, Tensor) if site is None else not found.tapped(site).is_tuple

    @torch.no_grad()
    def ledger() -> Ledger:
        if tensors[0].dim() != 4 or any(y.dim() < 3 for y in activations):
            return _no_ledger()
        seeds = found.seeds(torch.ones_like(found.score))
        return ledgers(found.recording, seeds, found.score, [site], tensors[0].shape)[0]

    return LinearForm(
        coefficients[0] if single else coefficients,
        activations[0].clone() if single else tuple(y.clone() for y in activations),
        found.bias(site),
        found.score,
        found.sums(site),
        cache(ledger),
    )
