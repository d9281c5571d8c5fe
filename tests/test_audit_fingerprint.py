"""Fingerprints: what computes something else has another one, whatever it is called."""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_scoremap.audit import audit
from captum_scoremap.audit.fingerprint import code_fingerprint, fingerprint, weights_fingerprint
from captum_scoremap.scores import region_mean

LABEL = 3


def scaled(output, factor=2.0):
    return output[:, LABEL] * factor


def own(factor):
    def score(output):
        return scaled(output) * factor

    return score


class Weighted:
    def __init__(self, weights):
        self.weights = weights

    def __call__(self, output):
        return output @ self.weights


def test_what_a_function_was_made_with_counts():
    mask = torch.zeros(4, 4)
    mask[0, 0] = 1
    pairs = [
        (own(1), own(2)),
        (region_mean(mask, 1), region_mean(mask, 2)),
        (region_mean(mask, 1), region_mean(mask.T.flip(0), 1)),
        (functools.partial(scaled, factor=1), functools.partial(scaled, factor=2)),
        (Weighted(torch.ones(2)), Weighted(torch.zeros(2))),
        (nn.Linear(2, 1), nn.Linear(2, 1)),
        (lambda output: output[:, 0], lambda output: output[:, 1]),
        (lambda output: [one[0] for one in output], lambda output: [one[1] for one in output]),
        (torch.sum, torch.mean),
    ]
    for one, other in pairs:
        assert fingerprint(one) == fingerprint(one)
        assert fingerprint(one) != fingerprint(other)
    assert fingerprint(own(1)) == fingerprint(own(1))
    assert fingerprint(region_mean(mask, 1)) == fingerprint(region_mean(mask.clone(), 1))
    assert fingerprint(Weighted(torch.ones(2))) == fingerprint(Weighted(torch.ones(2)))


def test_what_a_function_reads_of_its_module_counts(monkeypatch):
    before = fingerprint(scaled)
    monkeypatch.setattr(sys.modules[__name__], "LABEL", 4)
    assert fingerprint(scaled) != before
    other = fingerprint(own(1))
    monkeypatch.setattr(sys.modules[__name__], "LABEL", 3)
    assert fingerprint(scaled) == before
    assert fingerprint(own(1)) != other  # a function that it calls reads it


def test_a_recursive_function_ends():
    def down(output):
        return down(output[1:]) if len(output) > 1 else output

    assert fingerprint(down) == fingerprint(down)


class Gated(nn.Module):
    def __init__(self, mode="sum"):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return self.inner(x) if self.mode == "sum" else x

    def inner(self, x):
        return x.sum(1)


def test_code_of_a_module_counts(monkeypatch):
    model = nn.Sequential(Gated())
    before = code_fingerprint(model)
    assert code_fingerprint(nn.Sequential(Gated("none"))) != before
    assert weights_fingerprint(nn.Sequential(Gated("none"))) == weights_fingerprint(model)
    monkeypatch.setattr(Gated, "inner", lambda self, x: x.mean(1))
    assert code_fingerprint(model) != before


QUICK = {"progress": False, "prepare_model": False}


def build(body: str, folder: Path):
    (folder / "scores_of_an_audit.py").write_text(body)
    sys.modules.pop("scores_of_an_audit", None)
    importlib.invalidate_caches()
    return importlib.import_module("scores_of_an_audit").age


def test_resume_knows_that_the_code_of_a_score_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    data, out = list(torch.rand(4, 3, 8, 8)), tmp_path / "out"
    one = "LABEL = 0\n\ndef age(output):\n    return output[:, LABEL]\n"
    done = audit(data, model, out=out, score=build(one, tmp_path), **QUICK)
    again = audit(data, model, out=out, score=build(f"# a comment\n{one}", tmp_path), resume=True, **QUICK)
    assert again.images.equals(done.images)
    for changed in (one.replace("LABEL = 0", "LABEL = 1"), one.replace(", LABEL]", ", LABEL] * 2")):
        with pytest.raises(ValueError, match="got other values of score"):
            audit(data, model, out=out, score=build(changed, tmp_path), resume=True, **QUICK)


def test_an_audit_that_failed_before_its_first_image_is_in_nobody_s_way(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    data = list(torch.rand(4, 3, 8, 8))
    with pytest.raises(ValueError, match="labels must be less than 2"):
        audit([(image, 7) for image in data], model, out=tmp_path, **QUICK)
    assert audit(data, model, out=tmp_path, **QUICK).images.num_rows == 4
