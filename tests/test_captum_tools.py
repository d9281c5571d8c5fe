"""Our classes in every place where Captum takes an attribution method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum import attr as captum
from captum.concept import TCAV, Classifier, Concept
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from captum.robust import FGSM, AttackComparator, MinParamPerturbation
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from captum_scoremap import FusedScoreMap, LayerScoreMap, NeuronScoreMap, ScoreMap
from tests.configurations import Image, SeveralTensors, TwoInputs, built, randn

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64; sums in another order


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Captum draws from PyTorch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(count: int = 3) -> Tensor:
    return randn(count, 2, 6, 6)


# --- NoiseTunnel -----------------------------------------------------------------------------------------------------

PEERS: list[tuple[Callable[[Any], Any], Callable[[Any], Any], dict[str, Any]]] = [
    (ScoreMap, captum.InputXGradient, {"target": [0, 2, 1]}),
    (
        lambda model: LayerScoreMap(model, model.relu),
        lambda model: captum.LayerGradientXActivation(model, model.relu),
        {"target": torch.tensor([0, 2, 1])},
    ),
    (
        lambda model: NeuronScoreMap(model, model.relu, multiply_by_inputs=False),
        lambda model: captum.NeuronGradient(model, model.relu),
        {"neuron_selector": (1, 2, 0)},
    ),
]
each_peer = pytest.mark.parametrize(("ours", "theirs", "options"), PEERS, ids=["input", "layer", "neuron"])


@each_peer
@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("batch", [None, 2])
def test_noise_tunnel(ours: Any, theirs: Any, options: Any, nt_type: str, batch: int | None) -> None:
    model = built(Image)
    found, expected = [], []
    for make, results in ((ours, found), (theirs, expected)):
        torch.manual_seed(1)
        further = {"attr_dim_summation": False} if make is ours and "target" in options and ours is not ScoreMap else {}
        results.append(
            captum.NoiseTunnel(make(model)).attribute(
                images(),
                nt_type=nt_type,
                nt_samples=5,
                nt_samples_batch_size=batch,
                stdevs=0.3,
                **options,
                **further,
            )
        )
    assert found[0].grad_fn is None
    assert_close(found[0], expected[0].detach(), rtol=1e-10, atol=1e-10)


def test_noise_tunnel_of_a_fused_map() -> None:
    method = FusedScoreMap(built(Image))
    found = captum.NoiseTunnel(method).attribute(images(), nt_samples=3, stdevs=1e-6, target=[0, 2, 1])
    assert_close(found, method.attribute(images(), [0, 2, 1]), rtol=1e-3, atol=1e-3)


def test_noise_tunnel_with_several_inputs_and_arguments() -> None:
    model, inputs = built(TwoInputs), (randn(2, 2, 6, 6), randn(2, 1, 6, 6, seed=5))
    options = {"target": 1, "additional_forward_args": (randn(2, 4, 4, 4, seed=6), 3, "shifted"), "stdevs": (0.1, 0.2)}
    results = []
    for method in (ScoreMap(model), captum.InputXGradient(model)):
        torch.manual_seed(1)
        results.append(captum.NoiseTunnel(method).attribute(inputs, nt_samples=4, **options))
    assert isinstance(results[0], tuple)
    assert_close(results[0], tuple(one.detach() for one in results[1]), **EXACT)


@each_peer
def test_noise_tunnel_passes_the_delta_on(ours: Any, theirs: Any, options: Any) -> None:
    tunnel = captum.NoiseTunnel(ours(built(Image)))
    _, delta = tunnel.attribute(images(), nt_samples=4, return_convergence_delta=True, **options)
    assert_close(delta, torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-10)


# --- infidelity ------------------------------------------------------------------------------------------------------


def shifted(inputs: Tensor) -> Tensor:
    """A step too small to leave the linear region."""
    return inputs - 1e-6 * torch.sign(inputs)


@pytest.mark.parametrize("multiply", [True, False], ids=["sub-scores", "coefficients"])
@pytest.mark.parametrize("matching", [True, False], ids=["matching", "mismatched"])
def test_infidelity_is_zero_with_the_matching_perturbation_only(multiply: bool, matching: bool) -> None:
    """Inside one linear region A·Δx is the change of the score, exactly."""
    model = built(Image)
    attributions = ScoreMap(model, multiply_by_inputs=multiply).attribute(images(), 1)
    perturb = infidelity_perturb_func_decorator(multiply if matching else not multiply)(shifted)
    found = infidelity(model, perturb, images(), attributions, target=1, n_perturb_samples=2)
    change = model(images()) - model(shifted(images()))
    relative = found / change[:, 1].detach().square()
    assert (relative < 1e-12).all() if matching else (relative > 1e-3).all()


def test_infidelity_of_several_inputs() -> None:
    model, inputs = built(TwoInputs), (randn(2, 2, 6, 6), randn(2, 1, 6, 6, seed=5))

    @infidelity_perturb_func_decorator(True)
    def perturb(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(shifted, given))

    attributions = ScoreMap(model).attribute(inputs, [0, 2])
    found = infidelity(model, perturb, inputs, attributions, target=[0, 2])
    assert_close(found, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-18)


# --- sensitivity_max -------------------------------------------------------------------------------------------------


def moved(inputs: Any) -> Any:
    return tuple(0.9 * one for one in inputs) if isinstance(inputs, tuple) else 0.9 * inputs


METHODS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "input": (ScoreMap, {"target": 1}),
    "layer": (lambda model: LayerScoreMap(model, model.conv), {"target": 1}),
    "layer, sub-scores": (
        lambda model: LayerScoreMap(model, model.relu),
        {"target": torch.tensor([2, 0, 1]), "attr_dim_summation": False},
    ),
    "fused": (lambda model: FusedScoreMap(model, [model.conv, model.pool]), {"target": [2, 0, 1]}),
    "neuron": (lambda model: NeuronScoreMap(model, model.relu), {"neuron_selector": (slice(None), 2, 0)}),
    "neuron, lower layer": (
        lambda model: NeuronScoreMap(model, model.relu),
        {"neuron_selector": (slice(None), 2, 0), "to_layer": "conv"},
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [1, 3])
def test_sensitivity_max(name: str, count: int) -> None:
    """Of any batch size; Captum's own layer methods raise beyond one image."""
    model, (make, options) = built(Image), METHODS[name]
    method, inputs = make(model), images(count)
    options = {key: model.conv if key == "to_layer" else value for key, value in options.items()}
    if not isinstance(options.get("target", 0), int):
        options["target"] = options["target"][:count]
    direct = [method.attribute(one, **options).flatten(1) for one in (inputs, moved(inputs))]
    expected = (direct[1] - direct[0]).norm(dim=1) / direct[0].norm(dim=1)
    if "to_layer" in options:  # Captum copies the options, and with them the layer
        explain = lambda given, **rest: method.attribute(given, to_layer=model.conv, **rest)  # noqa: E731
        del options["to_layer"]
    else:
        explain = method.attribute
    found = sensitivity_max(explain, inputs, moved, n_perturb_samples=2, **options)
    assert_close(found, expected, **EXACT)


def test_sensitivity_max_of_a_layer_with_several_tensors() -> None:
    model = built(SeveralTensors)
    method = LayerScoreMap(model, model.pair)
    direct = [torch.cat(method.attribute(one, 1), 1).flatten(1) for one in (images(), moved(images()))]
    expected = (direct[1] - direct[0]).norm(dim=1) / direct[0].norm(dim=1)
    assert_close(sensitivity_max(method.attribute, images(), moved, target=1), expected, **EXACT)


# --- TCAV ------------------------------------------------------------------------------------------------------------


class MeanDifference(Classifier):
    """The direction to each concept's mean activation from the mean of the others."""

    def __init__(self) -> None:
        pass

    def train_and_eval(self, dataloader: DataLoader[Any], **_: Any) -> dict[str, Any]:
        batches = list(dataloader)
        features, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        self._classes = sorted(set(labels.tolist()))
        means = torch.stack([features[labels == label].mean(0) for label in self._classes])
        self._weights = means - (means.sum(0) - means) / (len(means) - 1)
        return {}

    def weights(self) -> Tensor:
        return self._weights

    def classes(self) -> list[int]:
        return self._classes


@pytest.mark.filterwarnings("ignore:You are using .torch.load. with .weights_only=False.:FutureWarning")  # PyTorch 2.5
@pytest.mark.parametrize("at_input", [False, True])
def test_tcav(tmp_path: Path, at_input: bool) -> None:
    model = built(Image).float()

    def concept(number: int) -> Concept:
        data = [randn(2, 6, 6, seed=10 * number + i).float() + number for i in range(4)]
        return Concept(number, f"concept {number}", DataLoader(data, batch_size=2))

    concepts = [[concept(0), concept(1)]]
    scores = []
    for place, method, options in (
        ("ours", LayerScoreMap(model, None, multiply_by_inputs=False), {"attr_dim_summation": False}),
        ("theirs", None, {}),
    ):
        tcav = TCAV(
            model,
            ["relu", "pool"],
            classifier=MeanDifference(),
            layer_attr_method=method,
            attribute_to_layer_input=at_input,
            save_path=str(tmp_path / place),
        )
        scores.append(tcav.interpret(images().float(), concepts, target=1, **options))
    for layer in ("relu", "pool"):
        for kind in ("sign_count", "magnitude"):
            found, expected = (one["0-1"][layer][kind] for one in scores)
            assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_interpolate() -> None:
    model = built(Image)
    score_map = LayerScoreMap(model, model.pool).attribute(images(), 1)
    for mode in ("nearest", "bilinear"):
        found = LayerScoreMap.interpolate(score_map, (6, 6), mode)
        assert_close(found, captum.LayerAttribution.interpolate(score_map, (6, 6), mode), rtol=0, atol=0)
        assert found.shape == (3, 1, 6, 6)


def drawn(axes: Any) -> Tensor:
    """The values of the topmost picture."""
    return torch.as_tensor(np.asarray(axes.images[-1].get_array()))


def pixels(values: Tensor) -> np.ndarray[Any, Any]:
    return values.movedim(0, -1).numpy()


@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map", "masked_image", "alpha_scaling"])
def test_visualize_image_attr(method: str) -> None:
    model = built(Image)
    score_map = LayerScoreMap(model, model.conv).attribute(images(1), 1)
    full = LayerScoreMap.interpolate(score_map, (6, 6))[0]
    photograph = pixels(images(1)[0, [0, 1, 0]].sigmoid())
    _, axes = captum.visualization.visualize_image_attr(
        pixels(full), photograph, method=method, sign="positive", outlier_perc=0, use_pyplot=False
    )
    if "heat_map" in method:
        assert_close(drawn(axes), (full[0] / full.max()).clamp(min=0), rtol=1e-6, atol=1e-6)
    else:
        assert drawn(axes).shape[:2] == (6, 6)


def test_visualize_image_attr_multiple() -> None:
    sub_scores = ScoreMap(built(Image)).attribute(images(1), 1)[0]
    _, axes = captum.visualization.visualize_image_attr_multiple(
        pixels(sub_scores),
        pixels(images(1)[0, [0, 1, 0]].sigmoid()),
        ["original_image", "heat_map"],
        ["all", "all"],
        outlier_perc=0,
        use_pyplot=False,
    )
    total = sub_scores.sum(0)
    assert_close(drawn(axes[1]), total / total.abs().max(), rtol=1e-6, atol=1e-6)


class Series(nn.Module):
    """A 1-D network on two channels of nine steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(27, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).flatten(1))


@pytest.mark.parametrize("method", ["overlay_individual", "overlay_combined", "colored_graph"])
def test_visualize_timeseries_attr(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Captum 0.9 calls what Matplotlib 3.11 has no more, and its colour bar opens a figure of pyplot's all the same
    monkeypatch.setattr("matplotlib.cm.get_cmap", plt.get_cmap, raising=False)
    model, series = built(Series), randn(1, 2, 9)
    sub_scores = ScoreMap(model).attribute(series, 1)
    score_map = LayerScoreMap(model, model.relu).attribute(series, 1)
    assert score_map.shape == (1, 1, 9)
    for values in (sub_scores, score_map.expand(-1, 2, -1)):
        figure, _ = captum.visualization.visualize_timeseries_attr(
            values[0].numpy(),
            series[0].numpy(),
            method=method,
            sign="all",
            channels_last=False,
            channel_labels=["one", "two"],
            use_pyplot=False,
        )
        lines = [line for axes in figure.axes for line in (*axes.lines, *axes.collections, *axes.patches)]
        assert lines
    plt.close("all")


# --- language models -------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """Token embeddings with their positions, a hidden layer and the next token's scores, as transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 8)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        embedded = self.embedding(input_ids)
        place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)[:, None]
        return SimpleNamespace(logits=self.head(torch.relu(self.hidden((embedded * place).cumsum(1)))))


class Letters:
    """A tokenizer for which every letter from a to h is a token."""

    def encode(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = ["abcdefgh".index(letter) for letter in text]
        return ids if return_tensors is None else torch.tensor([ids])

    def decode(self, ids: Any) -> str:
        return "".join(self.convert_ids_to_tokens(torch.as_tensor(ids).reshape(-1).tolist()))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["abcdefgh"[i] for i in ids]

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": self.encode(text), "offset_mapping": [(i, i + 1) for i in range(len(text))]}


class LanguageScoreMaps(captum.LLMGradientAttribution):
    """Captum's class with one more method that it supports."""

    SUPPORTED_METHODS = (*captum.LLMGradientAttribution.SUPPORTED_METHODS, LayerScoreMap)


def test_language_models_by_a_subclass_that_names_the_method() -> None:
    model, letters = built(Language), Letters()
    text = captum.TextTokenInput("cabdh", letters)
    ours = LanguageScoreMaps(LayerScoreMap(model, model.embedding), letters)
    theirs = captum.LLMGradientAttribution(captum.LayerGradientXActivation(model, model.embedding), letters)
    found = ours.attribute(text, target="fge", channel_dim=-1)
    expected = theirs.attribute(text, target="fge")
    assert found.input_tokens == list("cabdh")
    assert_close(found.token_attr, expected.token_attr, **EXACT)
    assert_close(found.seq_attr, expected.seq_attr, **EXACT)


def test_language_models_ask_for_a_class_by_name() -> None:
    model = built(Language)
    with pytest.raises(AssertionError, match="LLMGradientAttribution does not support"):
        captum.LLMGradientAttribution(LayerScoreMap(model, model.embedding), Letters())


def test_tokens_are_explained_at_their_embedding() -> None:
    model, tokens = built(Language), torch.tensor([[2, 0, 1], [5, 5, 7]])

    def scores(input_ids: Tensor) -> Tensor:
        return model(input_ids).logits[:, -1]

    score_map, delta = LayerScoreMap(scores, model.embedding).attribute(
        tokens, 3, channel_dim=-1, return_convergence_delta=True
    )
    assert score_map.shape == (2, 3, 1)
    assert_close(delta, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = captum.LayerGradientXActivation(scores, model.embedding).attribute(tokens, 3)
    assert_close(score_map, expected.detach().sum(-1, keepdim=True), **EXACT)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_of_either_type(dtype: torch.dtype) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens.reshape(-1, 1)))

    model, tokens = built(Words), torch.tensor([2, 0, 1], dtype=dtype)
    found, delta = LayerScoreMap(model, model.embedding).attribute(tokens, 1, return_convergence_delta=True)
    assert found.shape == (3, 1)
    assert_close(delta, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_tokens_themselves_have_no_map() -> None:
    with pytest.raises(TypeError, match=r"inputs must be floating point, got torch\.int64\. Of token ids explain"):
        ScoreMap(built(Language)).attribute(torch.tensor([[2, 0, 1]]), 3)


# --- captum.robust ---------------------------------------------------------------------------------------------------


def test_attack_comparator_measures_maps_under_attack() -> None:
    """``forward_func`` may be any function of the images: here one whose output is the map."""
    model = built(Image)
    method = LayerScoreMap(model, model.relu)

    def largest(output: Tensor) -> Tensor:
        return output.flatten(1).amax(1)

    comparator = AttackComparator(lambda inputs: method.attribute(inputs, 1), largest)
    comparator.add_attack(FGSM(model), "FGSM", attack_kwargs={"epsilon": 0.1, "target": 1})
    comparator.evaluate(images().requires_grad_())
    attacked = FGSM(model).perturb(images().requires_grad_(), epsilon=0.1, target=1)
    summary = comparator.summary()
    for name, inputs in (("Original", images()), ("FGSM", attacked)):
        expected = largest(method.attribute(inputs, 1)).mean()
        assert_close(torch.as_tensor(summary[name]["mean"]), expected, **EXACT)


def test_min_param_perturbation_finds_where_a_map_moves() -> None:
    model = built(Image)
    method = LayerScoreMap(model, model.relu)

    def peak(inputs: Tensor) -> Tensor:
        return method.attribute(inputs, 1).flatten(1).argmax(1)

    def brighter(inputs: Tensor, by: float) -> Tensor:
        return inputs + by

    search = MinParamPerturbation(
        peak, brighter, "by", arg_min=0.0, arg_max=20.0, arg_step=0.5, correct_fn=lambda output, at: bool(output == at)
    )
    start = int(peak(images(1)))
    found, least = search.evaluate(images(1), correct_fn_kwargs={"at": start})
    assert least > 0
    assert int(peak(found)) != start
    assert int(peak(brighter(images(1), least - 0.5))) == start
