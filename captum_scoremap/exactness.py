"""Is the linear form of a model exact? What it is made of, layer by layer."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import UnsupportedOperationError, check_callable, check_inputs
from captum_scoremap.freeze import Recording, Reduction, Site
from captum_scoremap.linear_form import bias_at, bias_terms, explain, image_sums, select_scores
from captum_scoremap.rules import Call, Rule, with_rules

__all__ = ["Exactness", "LayerExactness", "check_exactness"]


@dataclass(frozen=True)
class LayerExactness:
    """One module that runs operations of its own, or whose residual was measured.

    Attributes:
        layer: Name of the module; "" for the model itself, "input" for the image.
        operations: Pairs of operation and what its rule freezes ("linear" for nothing), to how often it is called.
        unsupported: Operations without a rule.
        residual: |S - (A·Y + B)| / (|S| + |A·Y|) at the module's output, a fraction; None where it has no single
            floating-point output on the way to the score.
        bias: Share of the module's biases in B at the image, in logits.
    """

    layer: str
    operations: Mapping[tuple[str, str], int]
    unsupported: tuple[str, ...]
    residual: float | None
    bias: float


@dataclass(frozen=True)
class Exactness:
    """What a model's linear form at one image is made of.

    Attributes:
        layers: In the order in which they run, the image first.
        score: S in logits; None if the model holds unsupported operations.
        bias: B at the image, in logits; None likewise.
        tolerance: The largest residual that counts as rounding.
    """

    layers: tuple[LayerExactness, ...]
    score: float | None
    bias: float | None
    tolerance: float

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
    target: int,
    *,
    rules: Mapping[Any, Rule] | None = None,
    tolerance: float | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Exactness:
    """Measure S = A·Y + B at the image and at every module, and say what each freezes.

    Args:
        model: The model in evaluation mode.
        inputs: One image, (1, C, H, W).
        target: Index of the label.
        rules: Operation to rule, to replace or add some.
        tolerance: The largest residual that counts as rounding; None for one that fits the type of the inputs.
        progress: Wraps the loop over layers, as ``tqdm`` does.

    Returns:
        The findings. Unsupported operations are among them rather than raised.

    Raises:
        TypeError: If the model's inside cannot be seen, or an input is not floating point.
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
    if tolerance is None:
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(inputs.dtype, 5e-2)
    survey = _Survey(model, with_rules(rules))
    unsupported: dict[str, list[str]] = {}
    try:
        with torch.no_grad():
            survey.record(tensors, ())
    except UnsupportedOperationError as error:
        for operation, module in error.operations:
            unsupported.setdefault(module, []).append(operation)
    operations = survey.operations
    names = [*operations, *(name for name in unsupported if name not in operations)]
    if unsupported:
        layers = [
            LayerExactness(name, operations.get(name, {}), tuple(unsupported.get(name, ())), None, 0.0)
            for name in names
        ]
        return Exactness(tuple(layers), None, None, tolerance)

    shares: dict[str, float] = {}
    modules = dict(model.named_modules())
    for key, share in bias_terms(model, tensors, target, rules=rules).items():
        module = _module_of(key, modules)
        shares[module] = shares.get(module, 0.0) + float(share)
    residuals, score = _residuals(model, tensors, target, rules, survey, progress)
    layers = [
        LayerExactness(name, operations.get(name, {}), (), residuals.get(name), shares.get(name, 0.0))
        for name in ["input", *names, *(name for name in residuals if name not in names and name != "input")]
    ]
    return Exactness(tuple(layers), score, sum(shares.values()), tolerance)


class _Survey(Recording):
    """Notes which operations run in which module, and which modules run once and give one floating-point tensor."""

    def __init__(self, model: nn.Module, rules: Mapping[str, Rule]) -> None:
        super().__init__(model, rules)
        self.operations: dict[str, Counter[tuple[str, str]]] = {}
        self.outputs: dict[nn.Module, bool] = {}

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        kind = "linear" if rule.is_affine(call) else rule.kind
        self.operations.setdefault(self.module_name(), Counter())[name, kind] += 1
        return super().operate(key, name, rule, call, run)

    def at_site(self, site: Site, value: Any) -> Any:
        module, at_input = site
        if not at_input:
            self.outputs[module] = isinstance(value, Tensor) and value.is_floating_point() and self.is_live(value)
        return value


def _residuals(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: int,
    rules: Mapping[Any, Rule] | None,
    survey: _Survey,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> tuple[dict[str, float], float]:
    """The relative residual at the input and at every module that can be tapped, and the score."""
    names = {module: name for name, module in model.named_modules() if name}
    layers = [m for m, is_tensor in survey.outputs.items() if is_tensor and survey.calls[m] == 1 and m in names]
    sites: list[Site | None] = [None, *((module, False) for module in layers)]

    def select(output: Any) -> Tensor:
        return select_scores(output, target)

    found = explain(model, inputs, select, sites, Reduction(), rules=rules, keep=True)
    frozen = found.frozen(inputs, ())
    residuals: dict[str, float] = {}
    for site in progress(sites):
        activations = inputs if site is None else found.tapped(site).activations
        sums = image_sums(found.results[site], activations, found.score, multiplied=True)
        rest = found.score - sums - bias_at(frozen, site, activations, select)
        scale = found.score.abs() + sums.abs()
        name = "input" if site is None else names[site[0]]
        residuals[name] = float((rest.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max())
    return residuals, float(found.score)


def _module_of(key: str, modules: Mapping[str, nn.Module]) -> str:
    """The module that a bias term's name points into."""
    name = key.split("#")[0].split(":")[0]
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
