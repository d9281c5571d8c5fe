"""``explain --bundle``: a folder that can be filed as evidence, checked and run again."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import captum_scoremap
from captum_scoremap.cli import main


@pytest.fixture
def photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file, in the folder that one works in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def manifest(folder: str) -> dict:
    return json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_holds_maps_arrays_residuals_versions_and_the_command(photograph: Path) -> None:
    typed = ["explain", photograph.name, "--layers", "bn2", "--target", "tiger cat", "--bundle", "evidence"]
    assert main(typed) == 0
    found = manifest("evidence")
    assert {path.name for path in Path("evidence").iterdir()} == {"manifest.json", "maps.npz", "score_maps.png"}
    assert found["files"] == {name: sha256(Path("evidence", name)) for name in ("maps.npz", "score_maps.png")}
    assert found["images"] == {photograph.name: {"sha256": sha256(photograph)}}
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0])
    assert found["versions"]["captum_scoremap"] == captum_scoremap.__version__
    assert shlex.split(found["command"])[1:] == typed
    assert found["settings"]["model"] == "efficientnet_lite0"
    (one,) = found["explanations"]
    (layer,) = one["layers"]
    assert abs(layer["sum"] + layer["bias"] - one["score"]) < 1e-4
    assert layer["residual"] < 1e-5
    arrays = np.load("evidence/maps.npz")
    np.testing.assert_allclose(arrays["0/maps/bn2"].sum(), layer["sum"], rtol=1e-4)
    np.testing.assert_allclose(arrays["0/complete_map"].sum() + one["placeless"], one["score"], rtol=1e-4)


def test_the_command_that_it_names_gives_the_same(photograph: Path) -> None:
    assert main(["explain", photograph.name, "-l", "bn2", "-t", "3", "--no-prepare", "--bundle", "first"]) == 0
    first = manifest("first")
    again = [word if word != "first" else "second" for word in shlex.split(first["command"])[1:]]
    assert "--no-prepare" in again
    assert main(again) == 0
    second = manifest("second")
    for same in ("explanations", "images", "network_sha256"):
        assert first[same] == second[same]


def test_another_network_has_another_sum(photograph: Path) -> None:
    sums = set()
    for weights in ("none", "default"):
        assert main(["explain", photograph.name, "-w", weights, "-l", "bn2", "--bundle", weights]) == 0
        sums.add(manifest(weights)["network_sha256"])
    assert len(sums) == 2


def test_an_occupied_folder_is_left_alone(photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("evidence").mkdir()
    Path("evidence", "note.txt").write_text("mine", encoding="utf-8")
    assert main(["explain", photograph.name, "--bundle", "evidence"]) == 2
    assert "--bundle must be a new or empty folder, got 'evidence'. Name another one." in capsys.readouterr().err
    assert [path.name for path in Path("evidence").iterdir()] == ["note.txt"]


@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_run_leaves_no_bundle(photograph: Path, capsys: pytest.CaptureFixture[str], existed: bool) -> None:
    if existed:
        Path("evidence").mkdir()
    Path("fails_in_this_folder.py").write_text(
        "first = []\n"
        "def fails(scores):\n"
        "    first.append(float(scores[0, 0]))\n"
        "    if first[-1] != first[0]:\n"
        "        raise ValueError('another image')\n"
        "    return scores[:, 0]\n"
    )
    try:
        images = [photograph.name, "sample:coffee"]
        arguments = ["explain", *images, "-l", "bn2", "--score", "fails_in_this_folder:fails"]
        assert main([*arguments, "--bundle", "evidence"]) == 2
    finally:
        sys.modules.pop("fails_in_this_folder", None)
    output = capsys.readouterr()
    assert "another image" in output.err
    assert output.out.count("Picture: ") == 1
    assert Path("evidence").exists() == existed
    assert not existed or not list(Path("evidence").iterdir())
