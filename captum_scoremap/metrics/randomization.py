"""Does the attribution depend on what the network has learned?"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from captum_scoremap.copies import copied
from captum_scoremap.metrics.maps import Score, checked_target, input_sized


def parameter_randomization(
    model: nn.Module,
    attribute: Callable[[nn.Module, Tensor, Any], Tensor],
    inputs: Tensor,
    target: Score,
    seed: int = 0,
    layers: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return how alike the maps stay while the layers are initialized anew, one after another from the top.

    The cascading test of Adebayo et al. 2018, *Sanity Checks for Saliency Maps*: a method whose maps do not
    change does not show what the network has learned. Layers are the modules that have ``reset_parameters``,
    in reverse order of registration.

    Args:
        model: The trained network; left as it is (a copy is randomized).
        attribute: ``attribute(model, inputs, target) -> (N, C or 1, h, w)``: the method, built on the model
            it is given.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        seed: Of the new parameters; torch's own generator is left as it is.
        layers: Names of the layers after which to compare; after every one if None. All are randomized.

    Returns:
        For each layer, by name, from the top to the bottom: Spearman's rank correlation ``(N,)`` of each map
        with the one of the trained network, after this layer and all above were randomized; 0 where a map is
        constant.

    Raises:
        ValueError: If inputs or target have the wrong shape, or a name is that of no layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(32, 3))
        >>> edges = lambda model, inputs, target: inputs.diff(dim=-1)  # looks at no parameter
        >>> correlations = parameter_randomization(model, edges, torch.rand(1, 1, 4, 4), torch.tensor([0]))
        >>> {name: float(value.round(decimals=4)) for name, value in correlations.items()}
        {'2': 1.0, '0': 1.0}
    """
    target = checked_target(inputs, target)
    randomized = copied(model)
    trained = attribute(randomized, inputs, target).detach()
    resettable = {name: one for name, one in randomized.named_modules() if hasattr(one, "reset_parameters")}
    if unknown := set(layers or ()) - set(resettable):
        raise ValueError(f"layers must be names of modules that have reset_parameters, got {sorted(unknown)}.")
    correlations = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, layer in reversed(resettable.items()):
            layer.reset_parameters()
            if layers is None or name in layers:
                correlations[name] = rank_correlation(trained, attribute(randomized, inputs, target))
    return correlations


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return Spearman's rank correlation of each pair of maps.

    Args:
        one: ``(N, C, h, w)``; channels are summed.
        other: Of the same shape.

    Returns:
        ``(N,)`` between -1 and 1; 0 where a map is constant.
    """
    height, width = one.shape[-2:]
    pairs = zip(input_sized(one, height, width), input_sized(other, height, width), strict=True)
    return torch.tensor([
        0.0 if len(a.unique()) == 1 or len(b.unique()) == 1 else float(spearmanr(a.flatten(), b.flatten()).statistic)
        for a, b in ((a.cpu().double(), b.cpu().double()) for a, b in pairs)
    ])
