"""Findings: where they were planted, of the right kind, with proof; and none where nothing is."""

import functools
import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap
from captum_scoremap.audit import audit
from captum_scoremap.audit.explaining import layers_to_pool, pooled
from captum_scoremap.audit.proof import _filled
from captum_scoremap.audit.screening import FALSE_ALARMS, _separations, at_any, stand_out
from captum_scoremap.audit.shards import Shards
from captum_scoremap.models import LoadedModel, prepare
from tests.planted import Case, pictures, trained

CASES = {
    "fixed corner": (Case("fixed corner", "digits", "pooled", 2), "place"),
    "random place": (Case("random place", "digits", "pooled", 0), "concept"),
    "color": (Case("color", "textures", "plain", 1), "background"),
    "stripes": (Case("stripes", "digits", "pooled", 2), "background"),
    "another label's": (Case("another label's", "textures", "normed", 0), "concept"),
}


CLEAN = Case("clean", "digits", "plain", 1)


@pytest.fixture(scope="module")
def networks():
    """Networks by case, each trained once."""
    return functools.cache(trained)


@pytest.fixture(scope="module")
def audits(tmp_path_factory, networks):
    """Audits by name of the case, each done once."""
    done = {}

    def of(name):
        if name not in done:
            case = CASES[name][0] if name in CASES else CLEAN
            model = LoadedModel("small", networks(case))
            out = tmp_path_factory.mktemp("audit") / "out"
            done[name] = audit(pictures(case, 300, test=True), model, out=out, progress=False)
        return done[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_what_was_planted_comes_first_with_proof(name, audits):
    case, kind = CASES[name]
    done, data = audits(name), pictures(case, 300, test=True)
    first = done.analysis.findings[0]
    assert (first["label"], first["kind"], first["confident"]) == (case.planted[0], kind, True)
    assert first["chance"] <= FALSE_ALARMS
    carry = data.marked[first["images"]].double().mean()
    assert carry >= 0.9  # the images named are those that carry it
    effect = first["effect"]
    assert effect["score_fall"] > 2 * max(effect["control_score_fall"], 0)
    assert effect["accuracy_fall"] >= effect["control_accuracy_fall"]
    assert 0.05 < first["share"] <= 1.5
    images = {image["index"]: image for image in done.images.to_pylist()}
    assert all(images[index]["predicted"] == case.planted[0] for index in first["images"])
    assert json.loads((done.folder / "analysis" / "findings.json").read_text())["findings"] == done.analysis.findings


def test_a_label_taken_for_another_by_its_mark_is_a_pair(audits):
    case = CASES["another label's"][0]
    data = pictures(case, 300, test=True)
    pair = next(one for one in audits("another label's").analysis.findings if one["kind"] == "confused pair")
    assert (pair["label"], pair["true"]) == (case.planted[0], case.victim)
    assert all(data.labels[index] == case.victim for index in pair["images"])


def test_a_fixed_place_is_named(audits):
    first = audits("fixed corner").analysis.findings[0]
    assert first["row"] > 0.75  # the lower left corner
    assert first["column"] < 0.25


def test_nothing_is_named_where_nothing_was_planted(audits):
    findings = audits("clean").analysis.findings
    assert len(findings) == 10
    assert not any(one["confident"] for one in findings)


def test_the_page_shows_what_was_found(audits):
    page = (audits("color").folder / "report.html").read_text(encoding="utf-8")
    assert 'id="findings"' in page
    assert "background" in page
    quiet = (audits("clean").folder / "report.html").read_text(encoding="utf-8")
    assert "No label stands out among the 10" in quiet


def test_channels_are_the_parts_of_the_sub_scores(audits, networks):
    done = audits("random place")
    parts = {(row["index"], row["layer"]): row for row in Shards(done.folder).table("channels").to_pylist()}
    for row in done.layers.to_pylist():
        assert sum(parts[row["index"], row["layer"]]["sub_scores"]) == pytest.approx(row["sub_scores"], abs=1e-4)
    case = CASES["random place"][0]
    data, module = pictures(case, 300, test=True), networks(case)
    layer = module[7]
    image = done.images.to_pylist()[5]
    expected = LayerScoreMap(module, layer).attribute(data.images[5:6], image["predicted"], attr_dim_summation=False)
    torch.testing.assert_close(
        torch.tensor(parts[5, "7"]["sub_scores"]), expected.sum((2, 3))[0].detach().float(), rtol=1e-3, atol=1e-4
    )
    outputs = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        module(data.images[5:6])
    handle.remove()
    expected = outputs[0][0].flatten(1)
    torch.testing.assert_close(torch.tensor(parts[5, "7"]["mean"]), expected.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(parts[5, "7"]["maximum"]), expected.amax(1), rtol=1e-3, atol=1e-4)


def test_first_activations_and_main_layers_are_pooled(networks):
    module = prepare(networks(CLEAN), torch.rand(1, 3, 28, 28))
    assert [layer.name for layer in layers_to_pool(module, torch.rand(1, 3, 28, 28))] == ["2", "5", "8", "9"]


def test_what_a_module_hands_on_is_pooled_once():
    stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
    block = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, stride=2, padding=1), torch.nn.ReLU())
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    module = torch.nn.Sequential(torch.nn.Sequential(stem, torch.nn.Identity()), block, head).eval()
    chosen = [layer.name for layer in layers_to_pool(module, torch.rand(1, 3, 16, 16))]
    outputs: list[int] = []
    for name in chosen:
        module.get_submodule(name).register_forward_hook(lambda _, __, output: outputs.append(output))
    module(torch.rand(1, 3, 16, 16))
    assert chosen
    assert len({id(output) for output in outputs}) == len(chosen)


def test_pooling_does_not_mind_where_the_channels_are():
    y = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(pooled(y, 1), pooled(y.movedim(1, -1), -1))
    torch.testing.assert_close(pooled(y, 1), pooled(y.flatten(2).movedim(1, -1), -1))


def test_what_is_taken_out_of_a_mirrored_image_is_mirrored():
    """Cells are of 5 pixels and 5/7, one of them the map's last but one."""
    image, region = torch.rand(1, 3, 40, 40), torch.zeros(1, 7, 7)
    region[0, 2, 5] = 1.0
    filled = _filled(image, region)
    assert_close(_filled(image.flip(3), region.flip(2)).flip(3), filled)
    assert 0.02 < float((filled != image).float().mean()) < 0.2


def test_few_labels_or_images_are_not_compared(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 3))
    data = [torch.rand(1, 8, 8) for _ in range(40)]
    assert audit(data, module.eval(), out=tmp_path, progress=False).analysis.findings == []


@pytest.mark.parametrize("count", [5, 10, 100])
def test_false_alarms_of_the_test_are_as_rare_as_it_says(count):
    rng = np.random.default_rng(0)
    alarms = [stand_out(rng.normal(0, 1, count))[1].min() * count <= FALSE_ALARMS for _ in range(400)]
    assert np.mean(alarms) <= FALSE_ALARMS + 3 * np.sqrt(FALSE_ALARMS * (1 - FALSE_ALARMS) / 400)


def test_labels_that_agree_by_accident_are_no_reason_to_be_sure():
    values = np.array([0.30, 0.31, 0.29, 0.30, 0.32, 0.28, 0.30, 0.31, 0.29, 0.75])
    distances, chances = stand_out(values)
    assert distances.argmax() == 9
    assert chances.min() * 10 > FALSE_ALARMS
    values[9] = 2.0
    assert stand_out(values)[1].argmin() == 9
    assert stand_out(values)[1].min() * 10 <= FALSE_ALARMS


@pytest.mark.parametrize("spread", [0.05, 0.3, 3.0])
def test_false_alarms_are_rare_whatever_the_spread(spread):
    rng = np.random.default_rng(1)
    alarms = [stand_out(rng.normal(0, spread, 10))[1].min() * 10 <= FALSE_ALARMS for _ in range(400)]
    assert np.mean(alarms) <= FALSE_ALARMS + 3 * np.sqrt(FALSE_ALARMS * (1 - FALSE_ALARMS) / 400)


def test_a_neighbor_that_is_gone_does_not_make_a_label_stand_out():
    # On a ring each label is like its two neighbors; label 0 went elsewhere, so that 1 and 9 have one neighbor left.
    labels = np.arange(10)
    predicted = np.repeat(labels, 40)
    distance = np.abs(predicted[:, None] - labels)
    near = np.exp(-np.square(np.minimum(distance, 10 - distance)))
    near[predicted == 0] = 0
    near[:, 0] = 5 * (predicted == 0)
    scores = near + np.random.default_rng(0).normal(0, 0.1, near.shape)
    _, chances = stand_out(np.log(_separations(scores, predicted, labels)))
    assert chances[0] * 10 <= FALSE_ALARMS
    assert min(chances[1:]) * 10 > FALSE_ALARMS


def test_a_label_with_the_same_mark_does_not_hide_another():
    labels = np.arange(10)
    predicted = np.repeat(labels, 40)
    scores = np.random.default_rng(0).normal(0, 0.5, (400, 10)) + (predicted[:, None] == labels)
    scores[predicted == 3, 3] += 6
    scores[np.flatnonzero(predicted == 7)[:16], 3] += 6
    _, chances = stand_out(np.log(_separations(scores, predicted, labels)))
    assert (chances * 10 <= FALSE_ALARMS).tolist() == [label == 3 for label in range(10)]


def test_two_labels_that_stand_out_do_not_hide_each_other():
    values = np.concatenate([np.random.default_rng(0).normal(0, 0.2, 8), [4.0, 5.0]])
    _, chances = stand_out(values)
    assert (chances * 10 <= FALSE_ALARMS).tolist() == [False] * 8 + [True] * 2


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9, 1.0])
def test_chances_over_layers_are_right_to_a_fifth_whatever_layers_share(shared):
    rng = np.random.default_rng(2)
    own, common = rng.normal(size=(5, 40_000)), rng.normal(size=40_000)
    chances = stats.norm.sf(np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
    level = FALSE_ALARMS / 10  # as for ten labels
    alarms = np.mean([at_any(column) <= level for column in chances.T])
    error = 3 * np.sqrt(level / 40_000)
    assert level - error <= alarms <= 1.2 * level + error


def test_a_layer_that_says_nothing_is_no_evidence_against():
    assert at_any([1e-6, 1.0]) == pytest.approx(2e-6, rel=0.01)
    assert at_any([1e-300] * 3) < 1e-299
    assert 0 < at_any([0.0, 0.5]) < 1e-300
    assert at_any([1.0, 1.0]) == pytest.approx(0.99)
