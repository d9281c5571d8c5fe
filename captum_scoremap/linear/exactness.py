"""Is the linear form of a model exact? What it is made of, layer by layer."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import UnsupportedOperationError, check_callable, check_inputs
from captum_scoremap.rules import Rule, display_name, with_rules
from captum_scoremap.scores import Target, select_scores
from captum_scoremap.tape import Recording, Site

from .bias_terms import shares_of_constants
from .explanation import Explanation
from .reduction import Reduction, relative_residual
from .subject import warn_of_probabilities

__all__ = ["Exactness", "LayerExactness", "check_exactness"]


@dataclass(frozen=True)
class LayerExactness:
    """One module that runs operations of its own, or whose residual was measured."""

    layer: str  # its name; "" for the model itself, "input" for the image
    operations: Mapping[tuple[str, str], int]  # and what their rules freeze ("linear": nothing), to how often they run
    unsupported: tuple[str, ...]  # operations without a rule
    # |S - (A·Y + B)| / (|S| + |A·Y|) at its output, a fraction; None where it has no single one on the way to the score
    residual: float | None
    bias: float  # share of its biases in B at the image, in logits


@dataclass(frozen=True)
class Exactness:
    """What a model's linear form at one image is made of."""

    layers: tuple[LayerExactness, ...]  # in the order in which they run, the image first
    score: float | None  # S in logits; None if the model holds unsupported operations
    bias: float | None  # B at the image, in logits; None likewise
    tolerance: float  # the largest residual that counts as rounding

    @property
    def worst(self) -> float:
        """The largest residual; infinite if operations are unsupported."""
        if self.score is None:
            return float("inf")
        # not max(), which may pass over a NaN
        residuals = torch.tensor([layer.residual for layer in self.layers if layer.residual is not None])
        return float(residuals.max())

    @property
    def is_exact(self) -> bool:
        """Whether every operation has a rule and every residual is rounding."""
        return self.worst <= self.tolerance


def check_exactness(
    model: nn.Module,
    inputs: Tensor,
    target: Target,
    *,
    rules: Mapping[Any, Rule] | None = None,
    tolerance: float | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Exactness:
    """Measure S = A·Y + B at the image and at every module, and say what each freezes.

    Args:
        model: The model in evaluation mode.
        inputs: One image, (1, C, H, W).
        target: Label in any of Captum's forms, or a function from the model's output to (N,).
        rules: Operation to rule, to replace or add some.
        tolerance: The largest residual that counts as rounding; None for one that fits the type of the inputs.
        progress: Wraps the loop over layers, as ``tqdm`` does.

    Returns:
        The findings. Unsupported operations are among them rather than raised.

    Raises:
        TypeError: If the model is compiled or scripted, or an input is not floating point.
        ValueError: If an input or the target is not as it must be, or the model is in training mode.
        RuntimeError: If ``torch.inference_mode`` is on.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> found = check_exactness(model, torch.rand(1, 3, 6, 6), target=7)
        >>> found.is_exact, [(layer.layer, *layer.operations) for layer in found.layers][2]
        (True, ('1', ('relu', 'mask')))
    """
    check_callable(model)
    tensors = check_inputs(inputs)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(
            f"tolerance must be a number from 0, got {tolerance}. Leave it out for one that fits the type."
        )
    if tolerance is None:
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(inputs.dtype, 5e-2)
    names = {module: name for name, module in model.named_modules() if name}
    recording = Recording(model, with_rules(rules), [(module, False) for module in names], keep_bypass=True)

    def select(output: Any) -> Tensor:
        warn_of_probabilities(recording, output)
        return select_scores(output, target, len(tensors[0]))

    unsupported: dict[str, list[str]] = {}
    try:
        score = recording.record(tensors, (), select)
    except UnsupportedOperationError as error:
        for operation, module in error.operations:
            unsupported.setdefault(module, []).append(operation)
    operations, residuals, shares = _operations(recording), {}, dict[str, float]()
    if not unsupported:
        modules = dict(model.named_modules())
        with torch.no_grad():
            for key, share in shares_of_constants(recording, score).items():
                module = _module_of(key, modules)
                shares[module] = shares.get(module, 0.0) + float(share.sum())
            residuals = _residuals(recording, score, names, progress)
    order = dict.fromkeys(([] if unsupported else ["input"]) + [*operations, *unsupported, *residuals])
    layers = tuple(
        LayerExactness(
            name, operations.get(name, {}), tuple(unsupported.get(name, ())), residuals.get(name), shares.get(name, 0.0)
        )
        for name in order
    )
    if unsupported:
        return Exactness(layers, None, None, tolerance)
    return Exactness(layers, float(score), sum(shares.values()), tolerance)


def _operations(recording: Recording) -> dict[str, Counter[tuple[str, str]]]:
    """Return for each module, in the order in which they run, the operations of its own and what their rules freeze."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    for step in recording.tape.steps:
        if display_name(step.operation) == "alias":  # a tap of ours
            continue
        kind = "linear" if step.rule.is_affine(step) else step.rule.kind
        name = recording.modules.name_of(step.module)
        found.setdefault(name, Counter())[display_name(step.operation), kind] += 1
    return found


def _residuals(
    recording: Recording,
    score: Tensor,
    names: Mapping[nn.Module, str],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> dict[str, float]:
    """Return the relative residual at the input and at every module with one output that runs once."""
    sites: list[Site | None] = [None]
    for site, tapped in recording.tapped.items():
        if site is None or recording.modules.calls[site[0]] != 1 or len(tapped.values) != 1 or tapped.is_tuple:
            continue
        if tapped.values[0].is_of_image:
            sites.append(site)
    found = Explanation(recording, score, sites, Reduction())
    found.push_back(consume=False)
    residuals: dict[str, float] = {}
    for site in progress(sites):
        sums = found.sums(site)
        name = "input" if site is None else names[site[0]]
        residuals[name] = float(relative_residual(score - sums - found.bias(site), score, sums).max())
    return residuals


def _module_of(key: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the module that a bias term's name points into."""
    name = key.split("#")[0].split(":")[0]
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
