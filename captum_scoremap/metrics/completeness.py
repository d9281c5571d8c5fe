"""Does the attribution add up to the score?"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from captum_scoremap.metrics.maps import Attribution, Score, attributed, checked_target, label_scores


def completeness(
    forward_func: Callable[..., Any],
    attribute: Attribution,
    inputs: Tensor,
    target: Score,
    offset: Tensor | float = 0.0,
) -> Tensor:
    """Return what an attribution leaves unexplained: score - offset - sum of the attribution.

    Zero for a complete method. The offset is what the method does not claim: the bias B for score maps (Eq.
    (3): S = sum M + B), the score of the baseline for integrated gradients (Sundararajan et al. 2017,
    *Axiomatic Attribution for Deep Networks*).

    Args:
        forward_func: The model; returns scores ``(N, K)``.
        attribute: ``attribute(inputs, target) -> (N, C, h, w)``; summed as it is, never resized.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        offset: ``(N,)`` or one number, logits.

    Returns:
        ``(N,)``, logits.

    Raises:
        ValueError: If inputs or target have the wrong shape.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2, bias=False)).double()
        >>> inputs, target = torch.rand(1, 3, 2, 2, dtype=torch.float64), torch.tensor([1])
        >>> input_x_weight = lambda inputs, target: inputs * model[1].weight[target].view_as(inputs)
        >>> bool(completeness(model, input_x_weight, inputs, target).abs() < 1e-12)
        True
    """
    target = checked_target(inputs, target)
    sums = attributed(attribute, inputs, target).detach().flatten(start_dim=1).sum(dim=1)
    return label_scores(forward_func, inputs, target) - offset - sums
