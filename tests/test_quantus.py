"""Quantus evaluates score maps."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from captum_scoremap import LayerScoreMap, ScoreMap
from captum_scoremap.quantus import explain_func
from tests.configurations import Image, SeveralTensors, built, randn


def batch() -> tuple[Any, Any, Any]:
    model = built(Image).float()
    return model, randn(3, 2, 6, 6).float().numpy(), np.array([0, 2, 1])


def test_sub_scores_of_the_image() -> None:
    model, images, labels = batch()
    expected = ScoreMap(model).attribute(torch.from_numpy(images), labels.tolist())
    assert_allclose(explain_func(model, images, labels), expected.numpy())


@pytest.mark.parametrize("relu", [False, True])
def test_map_of_a_layer_on_the_image(relu: bool) -> None:
    model, images, labels = batch()
    score_map = LayerScoreMap(model, model.pool).attribute(torch.from_numpy(images), labels.tolist())
    expected = LayerScoreMap.interpolate(score_map, (6, 6), "bilinear")
    found = explain_func(model, images, labels, layer="pool", relu_attributions=relu)
    assert_allclose(found, (expected.clamp(min=0) if relu else expected).numpy())


def test_numbers_take_the_type_of_the_model() -> None:
    model, images, labels = batch()
    assert explain_func(model, images.astype(np.float64), labels).dtype == np.float32
    assert explain_func(copy.deepcopy(model).double(), images, labels).dtype == np.float64


def test_maps_of_a_series() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(21, 2)).eval()
    assert explain_func(model, np.ones((1, 2, 9)), np.array([1]), layer="1").shape == (1, 1, 9)


def test_layer_must_be_a_name() -> None:
    model, images, labels = batch()
    with pytest.raises(TypeError, match=r"layer must be the name of a module, got MaxPool2d"):
        explain_func(model, images, labels, layer=model.pool)
    with pytest.raises(ValueError, match=r"got 'pol'\. Did you mean 'pool'\?"):
        explain_func(model, images, labels, layer="pol")


@pytest.mark.parametrize(
    ("make", "layer", "shape"), [(Image, "fc", r"\(3, 1\)"), (SeveralTensors, "pair", "2 tensors")]
)
def test_layer_must_lie_on_the_image(make: Any, layer: str, shape: str) -> None:
    _, images, labels = batch()
    with pytest.raises(ValueError, match=rf"layer must give a map that lies on the image.* got {shape} at '{layer}'"):
        explain_func(built(make), images, labels, layer=layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images[..., ::-1],
        lambda images: torch.from_numpy(images[..., ::-1].copy()).requires_grad_(),
        lambda images: list(images[..., ::-1]),
        lambda images: images[..., ::-1].astype(object),
    ],
    ids=["flipped", "tensor", "list", "objects"],
)
def test_images_of_any_kind_of_array(change: Any) -> None:
    model, images, labels = batch()
    assert_allclose(
        explain_func(model, change(images), labels), explain_func(model, images[..., ::-1].copy(), labels), rtol=1e-6
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels.astype(object),
        lambda labels: labels.astype(np.uint8),
        lambda labels: labels.astype(float),
        lambda labels: labels[:, None],
        lambda labels: torch.from_numpy(labels),
        lambda labels: labels.tolist(),
    ],
    ids=["objects", "bytes", "floats", "column", "tensor", "list"],
)
def test_labels_of_any_kind_of_array(change: Any) -> None:
    model, images, labels = batch()
    assert_allclose(explain_func(model, images, change(labels)), explain_func(model, images, labels))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.array([0.0, 1.5, 2.0]), ValueError, r"targets must be whole numbers, got 1\.5"),
        (np.array([0.0, np.nan, 2.0]), ValueError, "targets must be whole numbers, got nan"),
        (np.eye(3), ValueError, r"one label for each image, \(N,\), got \(3, 3\)\. Take targets\.argmax\(1\)"),
        (np.array(["cat", "dog", "cat"]), TypeError, "targets must be an array of numbers, got one of <U3"),
        (np.array([True, False, True]), TypeError, "got one of bool"),
        (None, TypeError, "targets must be an array of numbers, got one of object"),
        (np.array([0, 1]), ValueError, "one entry for each of the 3 images, got 2"),
    ],
    ids=["fraction", "nan", "one-hot", "names", "booleans", "none", "too few"],
)
def test_labels_must_be_whole_numbers(labels: Any, error: type[Exception], message: str) -> None:
    model, images, _ = batch()
    with pytest.raises(error, match=message):
        explain_func(model, images, labels)


def test_images_must_be_real_numbers() -> None:
    model, images, labels = batch()
    for wrong, kind in ((images + 1j, "complex64"), ("cat.png", "<U7"), (images > 0, "bool")):
        with pytest.raises(TypeError, match=f"inputs must be an array of numbers, got one of {kind}"):
            explain_func(model, wrong, labels)


def test_model_must_be_a_module() -> None:
    model, images, labels = batch()
    function: Any = model.forward
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got method"):
        explain_func(function, images, labels)


def test_maps_of_bfloat16_are_float32() -> None:
    model, images, labels = batch()
    found = explain_func(copy.deepcopy(model).bfloat16(), images, labels)
    assert found.dtype == np.float32
    assert_allclose(found, explain_func(model, images, labels), atol=0.05)


# --- Quantus itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def quantus() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from what it imports
        return pytest.importorskip("quantus")


def evaluated(metric: Any, **options: Any) -> Any:
    model, images, labels = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric(
            model=model, x_batch=images, y_batch=labels, explain_func=explain_func, explain_func_kwargs=options
        )


def test_quantus_finds_the_map_complete(quantus: Any) -> None:
    """Without biases, from a baseline of zeros. Quantus asks for equal floats, so all values are small integers."""
    model, images, labels = batch()
    for name, value in model.named_parameters():
        value.data = torch.zeros_like(value) if name.endswith("bias") else (3 * value).round()
    metric = quantus.Completeness(perturb_baseline=0.0, normalise=False, abs=False, disable_warnings=True)
    assert all(metric(model, (3 * images).round(), labels, explain_func=explain_func))
    model.conv.bias.data += 1  # its share is in B
    assert not all(metric(model, (3 * images).round(), labels, explain_func=explain_func))


@pytest.mark.parametrize("options", [{}, {"layer": "pool"}], ids=["image", "layer"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FaithfulnessCorrelation", {"nr_runs": 5, "subset_size": 6, "return_aggregate": False}),
        ("PixelFlipping", {"features_in_step": 6}),
        ("MaxSensitivity", {"nr_samples": 3}),
        ("Sparseness", {}),
        ("RandomLogit", {"num_classes": 3}),
    ],
)
def test_quantus_evaluates_maps(quantus: Any, name: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    metric = getattr(quantus, name)(**settings, disable_warnings=True, display_progressbar=False)
    scores = np.asarray(evaluated(metric, **options), dtype=float)
    assert len(scores) == 3
    assert np.isfinite(scores).all()


def test_quantus_randomizes_copies_of_the_model(quantus: Any) -> None:
    metric = quantus.MPRT(disable_warnings=True, display_progressbar=False, return_average_correlation=False)
    scores = evaluated(metric, layer="relu")
    assert set(scores) >= {"conv", "fc"}


def test_quantus_evaluate_names_the_method(quantus: Any) -> None:
    model, images, labels = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = quantus.evaluate(
            metrics={"Sparseness": quantus.Sparseness(disable_warnings=True, return_aggregate=False)},
            xai_methods={"score map": explain_func},
            explain_func_kwargs={"layer": "pool"},
            model=model,
            x_batch=images,
            y_batch=labels,
        )
    assert np.isfinite(found["score map"]["Sparseness"]).all()
