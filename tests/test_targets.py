"""Many labels at once equal one call for each, whichever way they are pushed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

import captum_scoremap.linear.all_labels
from captum_scoremap import (
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    ScoreMap,
    bias_terms,
    linear_form,
    metrics,
    semantic_patches,
)
from captum_scoremap.scores import detection, logits_in, region_mean, select_scores, similarity
from captum_scoremap.tape import Tape

LABELS = 12
CASES = {
    "alexnet": ("features.12", 1, 64),
    "resnet18": ("layer4.0.conv2", 1, 64),
    "squeezenet1_1": ("features.12.expand1x1", 1, 64),
    "mobilenet_v3_small": ("features.11.block.2.fc1", 1, 64),
    "densenet121": ("features.denseblock4.denselayer3", 1, 32),
    "swin_t": ("features.7.1.mlp", -1, 64),
    "convnext_tiny": ("features.7.2", 1, 32),
}


def build(name: str) -> tuple[nn.Module, nn.Module, int, Tensor]:
    layer, channel_dim, size = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None, num_classes=LABELS).double().eval()
        inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
    return model, model.get_submodule(layer), channel_dim, inputs


@pytest.mark.parametrize("name", CASES)
def test_both_ways_equal_one_call_for_each_label(name: str) -> None:
    model, layer, channel_dim, inputs = build(name)
    method = LayerScoreMap(model, layer)
    every = [method.attribute(inputs, label, channel_dim=channel_dim) for label in range(LABELS)]
    expected = torch.cat(every, channel_dim)
    scale = float(expected.abs().max())
    for positions in (0, 10**9):  # fewer and more than there are labels
        with mock.patch.object(captum_scoremap.linear.all_labels, "_positions", lambda *_, count=positions: count):
            found = method.attribute_targets(inputs, channel_dim=channel_dim, internal_batch_size=10)
            some = method.attribute_targets(inputs, [3, 7], channel_dim=channel_dim)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)
        chosen = torch.cat([every[3], every[7]], channel_dim)
        torch.testing.assert_close(some, chosen, rtol=0, atol=1e-12 * scale)
        assert not found.requires_grad


def test_a_list_of_layers_gives_a_list() -> None:
    model, _, _, inputs = build("resnet18")
    layers = [model.layer1, model.layer4]
    found = LayerScoreMap(model, layers).attribute_targets(inputs)
    assert [one.shape[1] for one in found] == [LABELS, LABELS]
    for maps, layer in zip(found, layers, strict=True):
        expected = LayerScoreMap(model, layer).attribute(inputs, 5)
        torch.testing.assert_close(maps[:, 5:6], expected, rtol=1e-9, atol=1e-14)


def test_targets_must_be_named_where_they_cannot_be_counted() -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    with pytest.raises(ValueError, match=r"targets must be given for a model that does not return \(N, K\)"):
        LayerScoreMap(model, model).attribute_targets(torch.rand(1, 3, 5, 5))
    model, layer, _, inputs = build("alexnet")
    with pytest.raises(ValueError, match="targets must name at least one label, got none"):
        LayerScoreMap(model, layer).attribute_targets(inputs, [])
    with pytest.raises(ValueError, match="target must be from 0 to 11, got 12"):
        LayerScoreMap(model, layer).attribute_targets(inputs, [12])


SAME = {"rtol": 1e-12, "atol": 1e-12}  # float64; sums in another order


@pytest.mark.parametrize(
    ("target", "plain"),
    [
        (np.int64(3), 3),
        (np.array([3, 5]), [3, 5]),
        ([np.int32(3), np.int64(5)], [3, 5]),
        ((np.int64(3),), 3),
        (torch.tensor([3, 5], dtype=torch.int32), [3, 5]),
        ([torch.tensor(3), torch.tensor(5)], [3, 5]),
    ],
    ids=str,
)
def test_numbers_of_numpy(target: Any, plain: Any) -> None:
    model, layer, _, inputs = build("alexnet")
    assert torch.equal(ScoreMap(model).attribute(inputs, target), ScoreMap(model).attribute(inputs, plain))
    method = LayerScoreMap(model, layer)
    assert torch.equal(method.attribute(inputs, target), method.attribute(inputs, plain))


def test_scores_are_found_by_the_names_that_models_of_hugging_face_give_them() -> None:
    scores, tokens = torch.rand(2, 3), torch.rand(2, 5, 4)
    for found in ({"logits": scores}, {"logits_per_image": scores}, {"last_hidden_state": scores}):
        assert logits_in(found) is scores
    assert logits_in({"last_hidden_state": tokens, "logits": scores}) is scores
    of_tokens = {"last_hidden_state": tokens}
    assert logits_in(of_tokens) is of_tokens  # no scores, which what takes them says


def test_targets_alone_are_refused() -> None:
    model, layer, _, inputs = build("alexnet")
    for targets in (3, np.int64(3), lambda output: output[:, 0]):
        with pytest.raises(TypeError, match=r"targets must be a sequence of labels, got .* Put it in a list"):
            LayerScoreMap(model, layer).attribute_targets(inputs, targets)


@pytest.mark.parametrize("target", [np.float64(3), np.array([1.0, 2.0]), [1.5, 2.0], True, [True, False], np.True_])
def test_targets_that_are_no_integers(target: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval()
    with pytest.raises(TypeError, match="target must"):
        ScoreMap(model).attribute(torch.rand(2, 2, 2, 2), target)


# --- functions of the output ----------------------------------------------------------------------------------------


def margin(output: Tensor) -> Tensor:
    return output[:, 3] - output[:, [0, 5]].logsumexp(1)


FUNCTIONS = {
    "difference": lambda output: output[:, 3] - output[:, 5],
    "log-odds": margin,
    "similarity": similarity(torch.linspace(-1, 1, LABELS, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("model_name", ["resnet18", "swin_t"])
def test_functions_of_the_output(name: str, model_name: str) -> None:
    """Every entry that takes a target explains the same function, exactly."""
    target = FUNCTIONS[name]
    model, layer, channel_dim, inputs = build(model_name)
    score = target(model(inputs)).detach()
    assert_close(linear_form(model, inputs, target).score, score, **SAME)
    form = linear_form(model, inputs, target, layer)
    assert_close(form.sums + form.bias, score, rtol=1e-12, atol=1e-12)
    assert_close(sum(bias_terms(model, inputs, target).values()), linear_form(model, inputs, target).bias, **SAME)
    method = LayerScoreMap(model, layer)
    one, delta = method.attribute(inputs, target, channel_dim=channel_dim, return_convergence_delta=True)
    assert_close(delta, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    label = method.attribute(inputs, 7, channel_dim=channel_dim)
    for positions in (0, 10**9):  # pushed forward, pushed back
        with mock.patch.object(captum_scoremap.linear.all_labels, "_positions", lambda *_, count=positions: count):
            several = method.attribute_targets(inputs, [target, 7], channel_dim=channel_dim)
        assert_close(several, torch.cat([one, label], channel_dim), **SAME)
    complete, placeless = CompleteScoreMap(model).attribute(inputs, target, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, score, **SAME)
    assert FusedScoreMap(model).attribute(inputs, target).shape == (2, 1, *inputs.shape[2:])


def test_a_function_of_one_label_is_that_label() -> None:
    model, layer, _, inputs = build("resnet18")
    for method in (ScoreMap(model), LayerScoreMap(model, layer), CompleteScoreMap(model)):
        assert_close(method.attribute(inputs, lambda output: output[:, 3]), method.attribute(inputs, 3), **SAME)


def test_functions_that_do_not_fit_are_named() -> None:
    model, _, _, inputs = build("resnet18")
    wrong = r"a target function must return one score for each image, \(2,\), got"
    for target in (torch.sum, lambda output: output, lambda output: output[:1, 0]):
        with pytest.raises(ValueError, match=wrong):
            ScoreMap(model).attribute(inputs, target)
    with pytest.raises(TypeError, match=r"a target function must return a floating-point tensor"):
        ScoreMap(model).attribute(inputs, lambda output: 3)
    one = ScoreMap(model).attribute(inputs[:1], lambda output: output[0, 3])  # of one image, a number will do
    assert_close(one, ScoreMap(model).attribute(inputs[:1], 3), **SAME)


def test_patches_of_a_function() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).double().eval()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for by in ("score_map", "gradient", "complete_map"):
        found, plain = (
            semantic_patches(model, model[1], images, target, by, k=4, progress=False)
            for target in (lambda output: output[:, 3], 3)
        )
        assert [(one.image, one.box, one.value) for one in found] == [(one.image, one.box, one.value) for one in plain]
        assert [one.target for one in found] == [None] * 4


def test_metrics_of_a_function() -> None:
    """A metric of a function is that of a model which returns the function beside another label, bar the softmax."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    label = torch.tensor([3, 3, 3])

    def attribute(inputs: Tensor, target: Any) -> Tensor:
        return ScoreMap(model).attribute(inputs, target)

    def function(output: Tensor) -> Tensor:
        return output[:, 3]

    for metric in (metrics.completeness, metrics.single_deletion):
        found = metric(model, attribute, images, function)
        assert_close(found, metric(model, attribute, images, label))
    changed = images.clone()
    changed[:, :, 2:5, 3:6] += 1
    found, plain = (metrics.cause_game(model, attribute, images, changed, one) for one in (function, label))
    assert_close(found.placed, plain.placed)
    assert_close(found.rise, plain.rise)
    by_softmax = metrics.deletion(model, attribute, images, label, steps=4).probabilities
    by_function = metrics.deletion(model, lambda x, _: attribute(x, 3), images, lambda o: o.softmax(1)[:, 3], steps=4)
    assert_close(by_function.probabilities, by_softmax)
    boxes = torch.tensor([[0, 0, 4, 4]] * 3)
    found = metrics.patch_score(model, images, lambda output: output.softmax(1)[:, 3], boxes)
    assert_close(found, metrics.patch_score(model, images, label, boxes))


# --- scores ready made ----------------------------------------------------------------------------------------------


def test_region_mean_is_the_mean_logit_of_the_region() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 8, generator=generator) > 0.5
    expected = torch.stack([one[2][mask].mean() for one in logits])
    assert_close(region_mean(mask, 2)(logits), expected, **SAME)
    assert_close(region_mean(mask, 2)({"out": logits, "aux": logits}), expected, **SAME)
    each = torch.rand(2, 6, 8, generator=generator) > 0.5
    expected = torch.stack([one[2][own].mean() for one, own in zip(logits, each, strict=True)])
    assert_close(region_mean(each, 2)(logits), expected, **SAME)
    fine = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)  # of the image's size, where the map is coarser
    assert_close(region_mean(fine, 2)(logits), region_mean(mask, 2)(logits), **SAME)


def test_similarity_is_the_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    own, one, each = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((3, 5), (5,), (3, 5)))
    assert_close(similarity(one)(own), torch.cosine_similarity(own, one[None]), **SAME)
    assert_close(similarity(each)({"image_embeds": own}), torch.cosine_similarity(own, each), **SAME)


def test_the_detection_that_is_meant() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [21, 21, 33, 33]])
    found = [{"boxes": boxes, "labels": torch.tensor([1, 1, 2]), "scores": torch.tensor([0.6, 0.9, 0.99])}]
    logit = torch.logit
    assert_close(detection(1)(found), logit(torch.tensor([0.9])))
    assert_close(detection(1, (1, 1, 9, 9))(found), logit(torch.tensor([0.6])))
    assert_close(detection(2, torch.tensor([0.0, 0, 10, 10]))(found), logit(torch.tensor([0.99])))
    queries = {"logits": torch.tensor([[[0.0, 5.0], [2.0, 1.0]]]), "pred_boxes": torch.tensor([[[0.2] * 4, [0.7] * 4]])}
    assert_close(detection(0)(queries), torch.tensor([2.0]))
    assert_close(detection(0, (0.1, 0.1, 0.3, 0.3))(queries), torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: region_mean(torch.zeros(4, 4), 1), "mask must mark a region"),
        (lambda: region_mean(torch.ones(4), 1), r"mask must be \(H, W\) or \(N, H, W\), got \(4,\)"),
        (lambda: region_mean(torch.ones(4, 4), 7)(torch.zeros(1, 3, 4, 4)), r"more than 7 labels, got \(1, 3, 4, 4\)"),
        (lambda: region_mean(torch.ones(3, 4, 4), 0)(torch.zeros(2, 3, 4, 4)), "one for each of the 2 images, got 3"),
        (
            lambda: region_mean(torch.ones(4, 4), 0)({"logits": torch.zeros(1)}),
            "mapping with 'out', got dict with logits",
        ),
        (lambda: similarity(torch.zeros(4)), r"embedding must be \(D,\) or \(N, D\) and not zero"),
        (lambda: similarity(torch.ones(4))(torch.ones(2, 5)), r"embeddings \(N, 4\), got \(2, 5\)"),
        (lambda: detection(1, (3, 3, 2, 2)), "box must be x0, y0, x1, y1"),
        (
            lambda: detection(4)([{"boxes": torch.ones(1, 4), "labels": torch.tensor([1]), "scores": torch.ones(1)}]),
            r"must find label 4 in every image, got \[1\] in one",
        ),
    ],
)
def test_ready_scores_that_do_not_fit(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_a_region_of_a_segmentation(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = getattr(torchvision.models.segmentation, name)
        model = make(weights=None, weights_backbone=None, num_classes=4).double().eval()
        inputs = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    mask = torch.zeros(40, 48, dtype=torch.bool)
    mask[5:20, 10:30] = True
    target = region_mean(mask, 2)
    layer = next(module for key, module in model.named_modules() if key.startswith("classifier") and "." in key)
    forms = linear_form(model, inputs, target, [None, layer])
    expected = model(inputs)["out"][:, 2][:, mask].mean(1).detach()
    for form in forms:
        assert_close(form.score, expected, rtol=1e-10, atol=1e-12)
        assert_close(form.sums + form.bias, expected, rtol=1e-9, atol=1e-12)


def test_a_regression_and_a_video() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        regression = torchvision.models.resnet18(weights=None, num_classes=1).double().eval()
        video = torchvision.models.video.r3d_18(weights=None, num_classes=5).double().eval()
        image, clip = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    for model, inputs, target in (
        (regression, image, None),
        (regression, image, lambda output: 3 * output[:, 0] - 1),
        (video, clip, lambda output: output[:, 1] - output[:, 2]),
    ):
        for form in linear_form(model, inputs, target, [None, model.layer2]):
            assert_close(form.sums + form.bias, form.score, rtol=1e-9, atol=1e-12)
    assert LayerScoreMap(video, video.layer2).attribute(clip, 1).shape == (1, 1, 2, 8, 8)


def test_more_labels_than_positions_need_no_pass_for_each_label(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, LABELS)).double()
    images = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    expected = LayerScoreMap(model, model[1]).attribute(images, 1)
    with mock.patch.object(Tape, "transposed", side_effect=AssertionError):
        found = LayerScoreMap(model, model[1]).attribute_targets(images)
    assert_close(found[:, 1:2], expected, rtol=1e-12, atol=1e-14)


def test_one_image_may_have_its_score_as_a_single_number() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)).double().eval()
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    expected = ScoreMap(model).attribute(image)
    torch.testing.assert_close(ScoreMap(lambda x: model(x).squeeze()).attribute(image), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="got a single number"):
        ScoreMap(lambda x: model(x).mean()).attribute(image.repeat(2, 1, 1, 1))


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Held:
    found: dict[str, Tensor]


def test_named_tuples_give_their_logits() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert select_scores(Named(scores, scores[:, None]), 1).tolist() == [2.0, 4.0]


def test_what_holds_the_scores_is_named() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for output, way in (
        ({"mask": scores > 1, "out": scores}, "output['out'][:, label]"),
        ((torch.tensor([1]), [scores]), "output[1][0][:, label]"),
        (Held({"boxes": scores}), "output.found['boxes'][:, label]"),
        ({"parts": {"a": scores}}, "output['parts']['a'][:, label]"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"target: lambda output: {way}.")) as caught:
            select_scores(output, 1)
        target = eval(re.search(r"lambda output: \S+ label\]", str(caught.value))[0], {"label": 1})
        assert select_scores(output, target).tolist() == [2.0, 4.0]


FORMS = pytest.mark.parametrize("form", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])


@FORMS
def test_labels_anywhere_in_a_batch_are_checked(form: Callable[[Any], Any]) -> None:
    scores, grids = torch.arange(12.0).view(4, 3), torch.arange(24.0).view(4, 3, 2)
    assert select_scores(scores, form([0, -1, 2, 1])).tolist() == [0.0, 5.0, 8.0, 10.0]
    assert select_scores(grids, form([[0, 1], [2, 0], [1, 1], [-1, -1]])).tolist() == [1.0, 10.0, 15.0, 23.0]
    for output, labels, message in (
        (scores, [0, 3, 2, 1], "target must be from 0 to 2, got 3."),
        (scores, [0, 1, -4, 1], "target must be from 0 to 2, got -4."),
        (grids, [[0, 1], [2, 0], [1, 2], [0, 0]], "target must be from 0 to 1, got 2."),
        (grids, [0, 1, 2, 0], "target must have 2 indices for scores of shape (N, 3, 2), got 0."),
        (scores, [0, 1], "target must have one entry for each of the 4 images, got 2."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            select_scores(output, form(labels))


@FORMS
def test_no_images_have_no_scores(form: Callable[[Any], Any]) -> None:
    labels = form([]) if form is list else form([0])[:0]
    assert select_scores(torch.zeros(0, 3), labels).shape == (0,)
