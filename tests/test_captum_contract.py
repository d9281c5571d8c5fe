"""Captum's own layer, neuron and input methods and ours, through the same calls."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum import attr as captum
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import CompleteScoreMap, FusedScoreMap, LayerScoreMap, NeuronScoreMap, ScoreMap, linear_form
from captum_scoremap.linear.batching import over_rows
from captum_scoremap.rules import Tangent
from tests.configurations import (
    CONFIGURATIONS,
    Configuration,
    Image,
    InPlace,
    OneInputUnderTheOther,
    OneScore,
    SeveralTensors,
    TwoInputs,
    X,
    built,
    randn,
)
from tests.state import GlobalState, untouched

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64; sums in another order

# Each of Captum's methods that differentiate; those that perturb have the same bases and arguments.
INPUT = [
    captum.Saliency,
    captum.InputXGradient,
    captum.IntegratedGradients,
    captum.DeepLift,
    captum.GuidedBackprop,
    captum.Deconvolution,
    ScoreMap,
]
LAYER = [
    captum.LayerActivation,
    captum.LayerGradientXActivation,
    captum.LayerGradCam,
    captum.LayerConductance,
    captum.LayerIntegratedGradients,
    captum.InternalInfluence,
    captum.LayerDeepLift,
    LayerScoreMap,
]
NEURON = [
    captum.NeuronGradient,
    captum.NeuronIntegratedGradients,
    captum.NeuronConductance,
    captum.NeuronGuidedBackprop,
    captum.NeuronDeconvolution,
    captum.NeuronDeepLift,
    NeuronScoreMap,
]
OURS = (ScoreMap, LayerScoreMap, NeuronScoreMap)
PER_POSITION = (captum.LayerGradCam, LayerScoreMap)  # summed over channels


def refuses(cls: type, case: Configuration) -> bool:
    """Whether one of Captum's own methods cannot be called like this. Ours always can."""
    name, wrapped = cls.__name__, case.wrap(nn.Identity())
    if cls in OURS:
        return False
    hooks_modules_only = name.endswith(("DeepLift", "GuidedBackprop", "Deconvolution"))
    needs_every_input_at_the_neuron = cls in NEURON
    looks_for_a_gpu = name == "LayerIntegratedGradients"
    return (
        (hooks_modules_only and not isinstance(wrapped, nn.Module))
        or (needs_every_input_at_the_neuron and case.layer in {"first", "second"})
        or (looks_for_a_gpu and (case.device_ids is not None or isinstance(wrapped, nn.DataParallel)))
    )


def each(classes: Sequence[type], cases: Sequence[Configuration] = CONFIGURATIONS) -> pytest.MarkDecorator:
    """Every class in every configuration in which it can be called."""
    pairs = [(cls, case) for cls in classes for case in cases if not refuses(cls, case)]
    return pytest.mark.parametrize(
        ("cls", "case"), [pytest.param(cls, case, id=f"{cls.__name__}-{case.name}") for cls, case in pairs]
    )


def constructed(cls: type, case: Configuration, explained: Any, layer: nn.Module, **options: Any) -> Any:
    if cls in INPUT:
        return cls(explained, **options)
    if case.device_ids is not None and "device_ids" in inspect.signature(cls).parameters:
        options["device_ids"] = case.device_ids
    return cls(explained, layer, **options)


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Captum's methods warn of the gradients and hooks that they set."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return call


def attribute(cls: type, method: Any, case: Configuration, inputs: Any, target: Any, **options: Any) -> Any:
    """The same call for every class of a family."""
    options["additional_forward_args"] = case.additional
    call = method.attribute if cls in OURS else quiet(method.attribute)
    if cls in NEURON:
        if cls is captum.NeuronConductance:
            options["target"] = case.target
        selector = 99 if target == "wrong" else case.neuron
        return call(inputs, selector, attribute_to_neuron_input=case.at_input, **options)
    if cls in LAYER:
        options["attribute_to_layer_input"] = case.at_input
    if cls is not captum.LayerActivation:
        options["target"] = 99 if target == "wrong" else target
    return call(inputs, **options)


def form(value: Any) -> Any:
    """Nesting and shapes."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return type(value), [form(one) for one in value]


def without_channels(expected: Any) -> Any:
    if isinstance(expected[0], type):
        return expected[0], [without_channels(one) for one in expected[1]]
    return expected[0], 1, *expected[2:]


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [one for part in value for one in tensors(part)]


each_case = pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda case: case.name)


# --- one call for all ------------------------------------------------------------------------------------------------


@each([*INPUT, *LAYER, *NEURON])
def test_same_call_gives_the_same_form(cls: type, case: Configuration) -> None:
    _, explained, layer, inputs = case.call()
    result = attribute(cls, constructed(cls, case, explained, layer), case, inputs, case.target)
    if cls not in LAYER:
        assert form(result) == form(inputs)
        return
    peer = captum.LayerActivation(explained, layer)
    expected = form(attribute(captum.LayerActivation, peer, case, inputs, case.target))
    expected = without_channels(expected) if cls in PER_POSITION else expected
    # sensitivity_max takes a tuple apart into its tensors, and a tensor into its images
    expected = (tuple, [expected]) if cls is LayerScoreMap and case.is_tuple else expected
    assert form(result) == expected


@each(OURS)
def test_ours_leave_no_graph_and_nothing_else_behind(cls: type, case: Configuration) -> None:
    model, explained, layer, inputs = case.call()
    watched = [tensor.clone().requires_grad_() for tensor in tensors(inputs)]
    given = watched[0] if isinstance(inputs, Tensor) else tuple(watched)
    with untouched(model, *watched):
        result, delta = attribute(
            cls,
            constructed(cls, case, explained, layer),
            case,
            given,
            case.target,
            return_convergence_delta=True,
        )
    assert not any(tensor.requires_grad for tensor in (*tensors(result), *tensors(delta)))
    assert_close(delta, torch.zeros(len(watched[0]), dtype=torch.float64), rtol=0, atol=1e-10)


@each(OURS)
def test_ours_work_under_no_grad(cls: type, case: Configuration) -> None:
    _, explained, layer, inputs = case.call()
    method = constructed(cls, case, explained, layer)
    with torch.no_grad():
        found = attribute(cls, method, case, inputs, case.target)
        assert not torch.is_grad_enabled()
    assert_close(found, attribute(cls, method, case, inputs, case.target), rtol=0, atol=0)


# --- equal values ----------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("multiply", [True, False])
def test_sub_scores_of_a_layer_are_gradient_times_activation(case: Configuration, multiply: bool) -> None:
    _, explained, layer, inputs = case.call()
    ours, theirs = (
        constructed(cls, case, explained, layer, multiply_by_inputs=multiply)
        for cls in (LayerScoreMap, captum.LayerGradientXActivation)
    )
    found = attribute(LayerScoreMap, ours, case, inputs, case.target, attr_dim_summation=False)
    expected = attribute(captum.LayerGradientXActivation, theirs, case, inputs, case.target)
    assert_close(tensors(found), [one.detach() for one in tensors(expected)], **EXACT)
    score_map = attribute(LayerScoreMap, ours, case, inputs, case.target)
    assert_close(tensors(score_map), [one.sum(1, keepdim=True) for one in tensors(found)], **EXACT)
    positive = attribute(LayerScoreMap, ours, case, inputs, case.target, relu_attributions=True)
    assert_close(tensors(positive), [one.clamp(min=0) for one in tensors(score_map)], rtol=0, atol=0)


@each_case
def test_sub_scores_of_the_image_are_input_times_gradient(case: Configuration) -> None:
    _, explained, layer, inputs = case.call()
    found, expected = (
        attribute(cls, constructed(cls, case, explained, layer), case, inputs, case.target)
        for cls in (ScoreMap, captum.InputXGradient)
    )
    assert_close(tensors(found), [one.detach() for one in tensors(expected)], **EXACT)
    coefficients = constructed(ScoreMap, case, explained, layer, multiply_by_inputs=False)
    found = attribute(ScoreMap, coefficients, case, inputs, case.target)
    expected = attribute(captum.Saliency, captum.Saliency(explained), case, inputs, case.target, abs=False)
    assert_close(found, expected, **EXACT)


@each([captum.NeuronGradient])
def test_coefficients_of_a_neuron_are_its_gradient(cls: type, case: Configuration) -> None:
    _, explained, layer, inputs = case.call()
    ours = constructed(NeuronScoreMap, case, explained, layer, multiply_by_inputs=False)
    theirs = constructed(cls, case, explained, layer)
    found = attribute(NeuronScoreMap, ours, case, inputs, None)
    assert_close(found, attribute(cls, theirs, case, inputs, None), **EXACT)


def test_input_that_does_not_reach_a_neuron_adds_nothing() -> None:
    model, inputs = built(TwoInputs), (X[0], randn(2, 1, 6, 6))
    first, second = NeuronScoreMap(model, model.second).attribute(inputs, (0, 1, 1))
    assert not first.any()
    assert second.any()


def test_several_inputs_of_a_layer_are_counted_once() -> None:
    """Where one input is made of another, the gradient counts its share of the score in both."""
    model, x = built(OneInputUnderTheOther), X[0]
    ours = LayerScoreMap(model, model.pair).attribute(x, 1, attribute_to_layer_input=True, attr_dim_summation=False)
    theirs = captum.LayerGradientXActivation(model, model.pair).attribute(x, 1, attribute_to_layer_input=True)
    assert_close(ours[0], theirs[0].detach(), **EXACT)
    form = linear_form(model, x, 1, model.pair, attribute_to_layer_input=True)
    total = sum(one.flatten(1).sum(1) for one in ours)
    assert_close(total + form.bias, model(x)[:, 1].detach(), rtol=0, atol=1e-10)
    again = sum(one.detach().flatten(1).sum(1) for one in theirs)
    assert_close(again - total, ours[0].flatten(1).sum(1), **EXACT)


# --- several layers, further options, all labels, lower layers ------------------------------------------------------


def test_layer_that_overwrites_its_input() -> None:
    model, in_place = built(Image), built(InPlace)
    for name in ("conv", "relu"):
        found = LayerScoreMap(in_place, in_place.get_submodule(name)).attribute(X[0], 2)
        expected = LayerScoreMap(model, model.get_submodule(name)).attribute(X[0], 2)
        assert_close(found, expected, rtol=0, atol=0)


def test_list_of_layers_gives_a_list() -> None:
    model = built(SeveralTensors)
    layers = [model.conv, model.pair, model.fc]
    found = LayerScoreMap(model, layers).attribute(X[0], 1, attr_dim_summation=False)
    theirs = captum.LayerGradientXActivation(model, layers).attribute(X[0], 1)
    assert form(found) == form(theirs)
    assert isinstance(found, list)
    assert_close(tensors(found), [one.detach() for one in tensors(theirs)], **EXACT)
    maps, deltas = LayerScoreMap(model, layers).attribute(X[0], 1, return_convergence_delta=True)
    for layer, one, delta in zip(layers, maps, deltas, strict=True):
        assert_close(one, LayerScoreMap(model, layer).attribute(X[0], 1), **EXACT)
        assert_close(delta, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("cls", OURS)
def test_grad_kwargs_reach_autograd(cls: type) -> None:
    case = CONFIGURATIONS[0]
    _, explained, layer, inputs = case.call()
    method = constructed(cls, case, explained, layer)
    expected = attribute(cls, method, case, inputs, 1)
    found = attribute(cls, method, case, inputs, 1, grad_kwargs={"create_graph": True})
    # the graph is there to train through, as in Captum; values may round otherwise
    assert found.grad_fn is not None
    assert_close(found.detach(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(TypeError, match="no_such_option"):
        attribute(cls, method, case, inputs, 1, grad_kwargs={"no_such_option": True})


@pytest.mark.parametrize("cls", [captum.LayerGradientXActivation, LayerScoreMap])
def test_layer_may_be_set_after_construction(cls: type) -> None:
    """As TCAV does."""
    model = built(Image)
    options = {"attr_dim_summation": False} if cls is LayerScoreMap else {}
    method = cls(model, None, multiply_by_inputs=False)
    method.layer = model.relu
    expected = cls(model, model.relu, multiply_by_inputs=False).attribute(X[0], 1, **options)
    assert_close(method.attribute(X[0], 1, **options), expected, rtol=0, atol=0)


def test_a_layer_set_later_says_what_tcav_takes() -> None:
    model = built(Image)
    for method in (LayerScoreMap(model, None), LayerScoreMap(model, model.conv)):
        method.layer = model.relu
        with pytest.raises(ValueError, match=r"attr_dim_summation must be False .* multiply_by_inputs=False\)"):
            method.attribute.__wrapped__(method, X[0], target=1, attribute_to_layer_input=False)


def test_layer_that_was_never_set_is_named() -> None:
    with pytest.raises(TypeError, match=r"layer must be a module, got NoneType"):
        LayerScoreMap(built(Image), None).attribute(X[0], 1)


@pytest.mark.parametrize("layer", ["conv", "relu", "pool", "fc"])
def test_all_labels_equal_one_call_per_label(layer: str) -> None:
    model = built(Image)
    method = LayerScoreMap(model, model.get_submodule(layer))
    each = [method.attribute(X[0], label) for label in range(3)]
    assert_close(method.attribute_targets(X[0]), torch.cat(each, 1), **EXACT)
    assert_close(method.attribute_targets(X[0], [2, 0]), torch.cat([each[2], each[0]], 1), **EXACT)


SELECTORS = {
    "tuple": (1, 1, 0),
    "negative": (-1, 0, -1),
    "slices": (slice(1, 3), 0, slice(None)),
    "function": lambda layer: layer[:, 2].sum((1, 2)),
}
NEURONS = [
    *(("fc", selector, lower) for selector in (0, -1) for lower in (None, "conv", "relu", "pool")),
    *(("pool", selector, lower) for selector in SELECTORS.values() for lower in (None, "conv", "relu")),
]


@pytest.mark.parametrize(("upper", "selector", "lower"), NEURONS)
def test_neuron_is_the_sum_over_a_lower_layer_and_a_bias(upper: str, selector: Any, lower: str | None) -> None:
    model = built(Image)
    layer, to_layer = model.get_submodule(upper), lower and model.get_submodule(lower)
    found, delta = NeuronScoreMap(model, layer).attribute(
        X[0], selector, to_layer=to_layer, return_convergence_delta=True
    )
    assert found.shape == (X[0] if to_layer is None else captum.LayerActivation(model, to_layer).attribute(X[0])).shape
    assert_close(delta, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_function_may_select_a_column() -> None:
    model = built(Image)
    method = NeuronScoreMap(model, model.fc)
    assert_close(method.attribute(X[0], lambda scores: scores[:, 1:2]), method.attribute(X[0], 1), rtol=0, atol=0)


WRONG_SELECTORS = {
    "a number": ("conv", lambda _: 1.0, TypeError, r"must return a tensor \(N,\), got float"),
    "a name": ("fc", "0", TypeError, r"must be an int, a tuple of ints and slices, or a function, got '0'"),
    "a truth": ("fc", True, TypeError, r"must be an int, .* got True"),
    "beyond": ("fc", 3, ValueError, r"must be from 0 to 2, got 3"),
    "before": ("pool", (0, -3, 0), ValueError, r"must be from 0 to 1, got -3"),
    "too few indices": ("pool", 0, ValueError, r"must have 3 indices for a layer of \(4, 2, 2\), got 0"),
    "several of each": ("pool", lambda y: y[:, 0], ValueError, r"must select one number for each image"),
}


@pytest.mark.parametrize("name", WRONG_SELECTORS)
def test_what_is_wrong_with_a_selector_is_said(name: str) -> None:
    layer, selector, error, message = WRONG_SELECTORS[name]
    model = built(Image)
    with untouched(model, X[0]), pytest.raises(error, match=f"neuron_selector {message}"):
        NeuronScoreMap(model, model.get_submodule(layer)).attribute(X[0], selector)


def test_a_delta_needs_what_adds_up() -> None:
    model = built(Image)
    method = LayerScoreMap(model, model.conv, multiply_by_inputs=False)
    with pytest.raises(ValueError, match=r"return_convergence_delta needs A·Y, got coefficients summed over channels"):
        method.attribute(X[0], 1, return_convergence_delta=True)
    coefficients, delta = method.attribute(X[0], 1, attr_dim_summation=False, return_convergence_delta=True)
    assert coefficients.shape[1] == 4
    assert_close(delta, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_positive_parts_of_all_labels() -> None:
    model = built(Image)
    for layer in (model.conv, [model.pool, model.conv]):
        method = LayerScoreMap(model, layer)
        maps, positive = method.attribute_targets(X[0]), method.attribute_targets(X[0], relu_attributions=True)
        for one, other in zip(maps, positive, strict=True):
            assert_close(other, one.clamp_min(0), rtol=0, atol=0)


@pytest.mark.parametrize(("bound", "largest"), [(1, 1), (3, 1), (4, 2), (6, 3), (None, 3)])
def test_no_more_images_at_once_than_the_bound(
    bound: int | None, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def counted(function: Any, rows: Tensor) -> Any:
        seen.append(len(rows))
        return over_rows(function, rows)

    monkeypatch.setattr("captum_scoremap.linear.all_labels.over_rows", counted)
    model = built(Image)  # two images, three labels
    LayerScoreMap(model, model.conv).attribute_targets(X[0], internal_batch_size=bound)
    assert max(seen) == largest
    assert sum(seen) == 3


class Recurring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x.mean(1))[0][:, -1])


def test_all_labels_of_a_layer_of_several_tensors_are_refused() -> None:
    model = built(Recurring)
    with pytest.raises(ValueError, match=r"needs layers with one output tensor, got 3\. Use attribute"):
        LayerScoreMap(model, model.lstm).attribute_targets(torch.rand(2, 2, 5, 5, dtype=torch.float64))


class Aside(Image):
    """A layer that runs, of whose output nothing becomes of."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(self.pool(x.relu()).flatten(1)[:, :16])
        return super().forward(x)


def test_maps_of_what_the_score_does_not_depend_on_are_zero() -> None:
    model = built(Aside)
    method = LayerScoreMap(model, model.aside)
    for maps, channels in ((method.attribute_targets(X[0]), 3), (method.attribute(X[0], 1), 1)):
        assert_close(maps, torch.zeros(2, channels, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_score_that_does_not_depend_on_the_image(create_graph: bool) -> None:
    inputs, options = X[0].clone().requires_grad_(), {"create_graph": create_graph}
    table = torch.ones(2, 3, dtype=torch.float64)
    maps, delta = ScoreMap(lambda _: table * 2).attribute(inputs, 1, return_convergence_delta=True, grad_kwargs=options)
    assert_close(maps, torch.zeros_like(inputs), rtol=0, atol=0)
    assert_close(delta, torch.zeros(2, dtype=torch.float64), rtol=0, atol=0)


def test_maps_of_one_dimension_are_interpolated() -> None:
    maps = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert_close(LayerScoreMap.interpolate(maps, 6), maps.repeat_interleave(2, 2), rtol=0, atol=0)


@pytest.mark.parametrize("to_layer", ["pool", "relu", "fc"])
def test_layer_that_is_not_below_the_neuron_is_named(to_layer: str) -> None:
    model = built(Image)
    with pytest.raises(ValueError, match=r"to_layer must lie below the neuron's layer"):
        NeuronScoreMap(model, model.conv).attribute(X[0], (0, 0, 0), to_layer=model.get_submodule(to_layer))


class Parallel(nn.Module):
    """Two branches, of which the first to run does not lead to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.first(x) + self.second(x)).mean((2, 3)))


def test_layer_beside_the_neuron_is_named() -> None:
    model = built(Parallel)
    neuron = NeuronScoreMap(model, model.second)
    with pytest.raises(ValueError, match="got a Conv2d that does not reach this Conv2d"):
        neuron.attribute(X[0], (0, 0, 0), to_layer=model.first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device_ids", [None, [0]])
def test_data_parallel_on_gpus(device_ids: list[int] | None) -> None:
    model = built(SeveralTensors).cuda()
    parallel, x = nn.DataParallel(model), X[0].cuda()
    found = LayerScoreMap(parallel, model.pair, device_ids).attribute(x, [0, 2], attr_dim_summation=False)
    theirs = captum.LayerGradientXActivation(parallel, model.pair, device_ids).attribute(x, [0, 2])
    assert_close(tensors(found), [one.detach() for one in tensors(theirs)], rtol=1e-10, atol=1e-10)


# --- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ScoreMap, captum.InputXGradient),
        (LayerScoreMap, captum.LayerGradCam),
        (NeuronScoreMap, captum.NeuronGradient),
        (NeuronScoreMap, captum.NeuronGuidedBackprop),
    ],
)
def test_arguments_begin_with_captums(ours: type, theirs: type) -> None:
    """Names, order and defaults."""
    for name in ("__init__", "attribute"):
        mine, peers = (
            [(one.name, one.kind, one.default) for one in inspect.signature(getattr(cls, name)).parameters.values()]
            for cls in (ours, theirs)
        )
        peers = [("forward_func" if peer[0] == "model" else peer[0], *peer[1:]) for peer in peers]
        assert mine[: len(peers)] == peers


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ScoreMap, captum.InputXGradient),
        (LayerScoreMap, captum.LayerGradientXActivation),
        (NeuronScoreMap, captum.NeuronGradient),
    ],
)
def test_same_bases(ours: type, theirs: type) -> None:
    assert set(theirs.__mro__[1:]) <= set(ours.__mro__)
    assert ours.attribute.__wrapped__  # type: ignore[attr-defined]  # NoiseTunnel and TCAV call what log_usage wraps


def test_properties_say_what_is_returned() -> None:
    model = built(Image)
    for multiply in (True, False):
        for method in (
            ScoreMap(model, multiply),
            LayerScoreMap(model, model.relu, None, multiply),
            NeuronScoreMap(model, model.relu, None, multiply),
        ):
            assert method.multiplies_by_inputs is multiply
            assert method.has_convergence_delta()


# --- what Captum's base classes bring along --------------------------------------------------------------------------


def ours(model: Any) -> list[Any]:
    return [
        ScoreMap(model),
        LayerScoreMap(model, model.relu),
        NeuronScoreMap(model, model.relu),
        FusedScoreMap(model),
        CompleteScoreMap(model),
    ]


@pytest.mark.parametrize("copied", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize("rules", [None, {"relu": Tangent()}])
@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("make", [ScoreMap, CompleteScoreMap, FusedScoreMap])
def test_methods_are_pickled_and_copied(make: Any, is_used: bool, rules: Any, copied: Callable[[Any], Any]) -> None:
    method, x = make(built(Image), rules=rules), X[0]
    if is_used:
        method.attribute(x, 1)
    twin = copied(method)
    for _ in range(2):
        assert_close(twin.attribute(x, 1), method.attribute(x, 1), rtol=0, atol=0)


def test_futures_are_refused_in_words() -> None:
    for method in ours(built(Image)):
        with pytest.raises(NotImplementedError, match=f"attribute_future .* {type(method).__name__}. Use attribute"):
            method.attribute_future(X[0], 1)


def test_gradient_functions_are_refused() -> None:
    for method in ours(built(Image)):
        method.gradient_func = method.gradient_func  # Captum's own
        with pytest.raises(ValueError, match=r"gradient_func must be left as it is.*rules="):
            method.gradient_func = lambda *_: None


@each_case
def test_deltas_of_attributions_that_were_computed_before(case: Configuration) -> None:
    _, explained, layer, inputs = case.call()
    zero = torch.zeros(len(X[0]), dtype=torch.float64)[: len(tensors(inputs)[0])]
    for cls in (ScoreMap, LayerScoreMap):
        method = constructed(cls, case, explained, layer)
        found = attribute(cls, method, case, inputs, case.target)
        options = {"attribute_to_layer_input": case.at_input} if cls is LayerScoreMap else {}
        for start in (None, 0):
            delta = method.compute_convergence_delta(found, start, inputs, case.target, case.additional, **options)
            assert_close(delta, zero, rtol=0, atol=1e-10)
        off = tuple(one + 1 for one in found) if isinstance(found, tuple) else found + 1
        wrong = method.compute_convergence_delta(off, None, inputs, case.target, case.additional, **options)
        assert bool((wrong < -0.5).all())


def test_deltas_that_cannot_be_are_refused() -> None:
    model, x = built(Image), X[0]
    found = ScoreMap(model).attribute(x, 1)
    for method in ours(model)[2:]:
        with pytest.raises(NotImplementedError, match=f"compute_convergence_delta .* {type(method).__name__}"):
            method.compute_convergence_delta(found, 0, x, 1)
    with pytest.raises(ValueError, match=r"start_point must be None or zero"):
        ScoreMap(model).compute_convergence_delta(found, x, x, 1)
    with pytest.raises(ValueError, match=r"needs A·Y"):
        ScoreMap(model, multiply_by_inputs=False).compute_convergence_delta(found, 0, x, 1)
    with pytest.raises(AssertionError, match=r"attributions must be shaped like .* got \[\(1, 2, 6, 6\)\]"):
        ScoreMap(model).compute_convergence_delta(found[:1], 0, x, 1)


def test_what_captum_asserts_is_an_assertion_error() -> None:
    model, x = built(Image), X[0]
    calls: list[Callable[[], Any]] = [
        lambda: ScoreMap(model).attribute(x, (9999,) * 20),
        lambda: ScoreMap(model).attribute(x, 9),
        lambda: ScoreMap(model).attribute(x, [0, 1, 2]),
        lambda: ScoreMap(model).attribute(x, None),
        lambda: ScoreMap(model).attribute(x, "cat"),
        lambda: ScoreMap(model).attribute("cat", 1),
        lambda: ScoreMap(built(lambda: OneScore(False))).attribute(x, 1),
        lambda: NeuronScoreMap(model, model.relu).attribute(x, (9999,) * 20),
        lambda: LayerScoreMap(model, model.relu).attribute(x, (0, 1)),
    ]
    for call in calls:
        with pytest.raises(AssertionError, match="must"):
            call()


def test_grad_kwargs_may_come_fifth() -> None:
    model, x = built(Image), X[0].clone()
    options = {"create_graph": True}
    ours = LayerScoreMap(model, model.relu, None, True, False)  # memory_efficient
    theirs = captum.LayerGradientXActivation(model, model.relu, None, True, False)
    found, expected = (method.attribute(x, 1, None, False, options) for method in (ours, theirs))
    assert found.grad_fn is not None
    assert_close(found.detach(), expected.detach().sum(1, keepdim=True), **EXACT)


@pytest.mark.parametrize("norm", [nn.LayerNorm(3), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.BatchNorm2d(2)])
def test_the_graph_of_a_map_is_its_derivative(norm: nn.Module) -> None:
    """A map can be trained through: its gradient is that of finite differences, past kernels of several outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 2, 2), norm, nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)
        model = nn.Sequential(*layers).double().eval()
        x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    for method in (ScoreMap(model), LayerScoreMap(model, model[0])):
        assert torch.autograd.gradcheck(lambda x, m=method: m.attribute(x, 1, grad_kwargs={"create_graph": True}), x)


def test_selector_that_sums_over_the_batch() -> None:
    model, x = built(Image), X[0].clone()
    ours = NeuronScoreMap(model, model.relu, multiply_by_inputs=False)
    found, delta = ours.attribute(x, torch.sum, return_convergence_delta=True)
    each = ours.attribute(x, lambda layer: layer.flatten(1).sum(1))
    assert_close(found, each, **EXACT)
    theirs = quiet(captum.NeuronGradient(model, model.relu).attribute)(x[:1], torch.sum)
    assert_close(found[:1], theirs, **EXACT)
    assert_close(delta, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-10)


def test_one_number_for_each_example() -> None:
    """A batch of one dimension, as in Captum's own tests."""
    x, y = torch.tensor([3.0, -2.0, 1.0]), torch.tensor([1.0, 0.5, -4.0])

    def model(x: Tensor, y: Tensor) -> Tensor:
        return 1 - F.relu(1 - F.relu(x) - 2 * y)

    found, delta = ScoreMap(model).attribute((x, y), return_convergence_delta=True)
    expected = quiet(captum.InputXGradient(model).attribute)((x.clone(), y.clone()))
    assert_close(found, tuple(one.detach() for one in expected), **EXACT)
    assert_close(delta, torch.zeros(3), rtol=0, atol=1e-6)


# --- hooks -----------------------------------------------------------------------------------------------------------

HOOKED = [case for case in CONFIGURATIONS if case.name in {"int", "two inputs", "several outputs", "layer input"}]
WITH_TARGET = [cls for cls in (*INPUT, *LAYER, *NEURON) if cls is not captum.LayerActivation]


def hooks(model: nn.Module) -> dict[str, list[int]]:
    return {
        f"{name} {kind}": list(found)
        for name, module in model.named_modules()
        for kind, found in vars(module).items()
        if kind.endswith("_hooks") and found
    }


@each([*INPUT, *LAYER, *NEURON], HOOKED)
def test_hooks_are_gone_after_success(cls: type, case: Configuration) -> None:
    model, explained, layer, inputs = case.call()
    before = GlobalState.now()
    attribute(cls, constructed(cls, case, explained, layer), case, inputs, case.target)
    assert not hooks(model)
    assert GlobalState.now() == before


@each(WITH_TARGET, HOOKED)
def test_hooks_are_gone_after_a_wrong_target(cls: type, case: Configuration) -> None:
    model, explained, layer, inputs = case.call()
    before = GlobalState.now()
    wrong = r"(target|neuron_selector) must" if cls in OURS else None
    with pytest.raises(ValueError if cls in OURS else (AssertionError, IndexError), match=wrong):
        attribute(cls, constructed(cls, case, explained, layer), case, inputs, "wrong")
    assert not hooks(model)
    assert GlobalState.now() == before


@each([*INPUT, *LAYER, *NEURON], HOOKED)
def test_hooks_are_gone_after_a_module_that_raises(cls: type, case: Configuration) -> None:
    model, explained, layer, inputs = case.call()

    def broken(*_: Any, **__: Any) -> Tensor:
        raise KeyError("broken layer")

    # what lies above a neuron need not run
    failing = next(model.children()) if cls in NEURON else model.fc
    failing.forward = broken
    before = GlobalState.now()
    with pytest.raises(KeyError, match="broken layer"):
        attribute(cls, constructed(cls, case, explained, layer), case, inputs, case.target)
    assert not hooks(model)
    assert GlobalState.now() == before
