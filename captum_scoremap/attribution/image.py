"""ScoreMap: sub-scores of the image itself, l = 0."""

from collections.abc import Callable, Mapping
from typing import Any

from captum.log import log_usage
from torch import Tensor

from captum_scoremap.checks import check_grad_kwargs, check_inputs
from captum_scoremap.linear import Reduction, explain
from captum_scoremap.rules import Rule
from captum_scoremap.scores import Target

from .contract import Contract

__all__ = ["ScoreMap"]


class ScoreMap(Contract):
    """Sub-scores A·x of the image x: S = A·x + B, Eq. (3) of Yu et al. 2015 at l = 0.

    For piecewise-linear networks this equals Captum's ``InputXGradient``; for others the coefficients A are exact where
    the gradient is not, and B says what the sub-scores leave out.

    In ``captum.metrics.infidelity``, use ``multiply_by_inputs=True`` with a ``perturb_func`` decorated by
    ``infidelity_perturb_func_decorator(True)``, and ``False`` with ``False``: sub-scores respond to relative
    perturbations, coefficients to absolute ones.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        multiply_by_inputs: Whether to return the sub-scores A·x, or the coefficients A.
        rules: Operation to rule, to replace or add some.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> sub_scores, delta = ScoreMap(model).attribute(
        ...     torch.rand(2, 3, 6, 6), target=7, return_convergence_delta=True
        ... )
        >>> sub_scores.shape, bool(delta.abs().max() < 1e-5)
        (torch.Size([2, 3, 6, 6]), True)
        >>> ScoreMap(model).attribute(torch.rand(1, 3, 6, 6), target=lambda scores: scores[:, 7] - scores[:, 2]).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        multiply_by_inputs: bool = True,
        *,
        rules: Mapping[Any, Rule] | None = None,
    ) -> None:
        super().__init__(forward_func, rules, multiply_by_inputs)

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object = None,
        return_convergence_delta: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the sub-scores (or coefficients) of the inputs.

        Args:
            inputs: The image, (N, C, H, W), or a tuple of such inputs.
            target: Label of each image, in any of Captum's forms, or a function from the model's output to (N,).
            additional_forward_args: Additional arguments of ``forward_func``; they are constants.
            return_convergence_delta: Whether to return S - (A·x + B) too, with B from the frozen model at zero.
            grad_kwargs: With ``create_graph=True`` the result can be differentiated, in the inputs and in the model's
                parameters; the other options of ``torch.autograd.grad`` are accepted for compatibility with Captum.

        Returns:
            Tensor or tuple shaped like ``inputs``, in logits (coefficients: logits per unit of input); with the delta a
            pair of it and a tensor (N,) in logits.

        Raises:
            TypeError: If an input is not floating point, or a target has no known form.
            ValueError: If an input or the target is not as it must be, or the model is in training mode.
            RuntimeError: If ``torch.inference_mode`` is on.
            UnsupportedOperationError: If operations have no rule; all are listed.
        """
        create_graph = check_grad_kwargs(grad_kwargs)
        found = explain(
            self._subject(check_inputs(inputs), additional_forward_args),
            target,
            [None],
            Reduction(self.multiplies_by_inputs),
            keep=return_convergence_delta,
            create_graph=create_graph,
        )
        results = found.results[None]
        formatted = results[0] if isinstance(inputs, Tensor) else results
        return (formatted, found.residual(None)) if return_convergence_delta else formatted

    def compute_convergence_delta(
        self,
        attributions: Tensor | tuple[Tensor, ...],
        start_point: object,
        end_point: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object = None,
    ) -> Tensor:
        """Return S - (A·x + B), (N,) in logits, for sub-scores that were computed before.

        ``start_point`` must be None or zero, where B is taken; ``end_point`` is the image.

        Raises:
            ValueError: If the sub-scores do not fit the image, or the start point is not zero.
        """
        return self._delta(None, attributions, start_point, end_point, target, additional_forward_args)
