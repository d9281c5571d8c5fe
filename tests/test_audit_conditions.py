"""Conditions for a build pipeline: what they mean, and what the program does with them."""

import json
import subprocess
import sys

import pytest
import torch

import captum_scoremap.audit
from captum_scoremap.audit import audit
from captum_scoremap.audit.conditions import failures, parse_condition
from captum_scoremap.cli import main
from tests.audit_pictures import tiny_model, write_digits, write_odd_files


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    write_digits(folder / "in", 12, by_label=True)
    (folder / "in" / "digit 0" / "empty.png").write_bytes(b"")
    return audit(folder / "in", tiny_model(), out=folder / "out", progress=False)


def found(done, *texts):
    conditions = [parse_condition(text) for text in texts]
    return failures(conditions, done.images, done.layers, done.settings["layers"][-1])


def test_numbers_of_the_set_name_the_images_behind_them(done):
    wrong = [row["name"] for row in done.images.to_pylist() if row["correct"] is False]
    accuracy, failed = found(done, "accuracy<1", "failed>0")
    assert list(accuracy.images) == wrong
    assert accuracy.value == pytest.approx(1 - len(wrong) / 12)
    assert failed.images == ("digit 0/empty.png",)
    assert str(failed) == "failed>0 holds: failed is 1"


def test_numbers_of_images_name_those_that_meet_them(done):
    last = done.settings["layers"][-1]
    shares = {row["index"]: row["border_share"] for row in done.layers.to_pylist() if row["layer"] == last}
    limit = sorted(shares.values())[-3]
    (failure,) = found(done, f"border_share >= {limit!r}")
    names = {row["index"]: row["name"] for row in done.images.to_pylist()}
    assert set(failure.images) == {names[index] for index, share in shares.items() if share >= limit}
    assert failure.value == max(shares.values())
    lowest = min(row["score"] for row in done.images.to_pylist() if row["score"] is not None)
    (failure,) = found(done, "score<1e9")
    assert failure.value == lowest


def test_what_does_not_hold_is_no_failure(done):
    assert found(done, "residual>1e-3", "accuracy<0", "failed>1") == []


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("accuracy<0.9", "no image has a known accuracy. Give true labels: --labels"),
        ("region_share<2", "no image has a known region_share. Give boxes or masks"),
        ("insertion<2", "Ask for it: --metrics insertion."),
    ],
)
def test_conditions_that_cannot_be_evaluated_fail_with_words(tmp_path, text, advice):
    done = audit([torch.rand(3, 32, 32)] * 2, tiny_model(), out=tmp_path / "out", progress=False)
    (failure,) = found(done, text)
    assert (failure.value, failure.images) == (None, ())
    assert str(failure).startswith(f"{text} cannot be evaluated: ")
    assert advice in str(failure)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "a condition must be a name, one of > < >= <=, and a number, got 'accuracy'"),
        ("accuracy<much", "got 'accuracy<much'"),
        ("accuracy<nan", "got 'accuracy<nan'"),
        ("residual==0", "got 'residual==0'"),
        ("boder_share>0.5", "got 'boder_share'. Did you mean 'border_share'"),
        ("__import__('os')>0", 'got "__import__'),
    ],
)
def test_wrong_conditions_say_what_to_write(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse_condition(text)


def build_tiny():
    """A model for the command line."""
    return tiny_model()


def test_program_says_what_it_found_and_exits_with_2(tmp_path, capsys):
    write_odd_files(tmp_path / "in")
    (tmp_path / "in" / "bomb.png").unlink()
    arguments = ["audit", str(tmp_path / "in"), "--model", f"{__name__}:build_tiny", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu", "--fail-on", "residual>1e-3", "--fail-on", "score>-1e9"]) == 2
    out, err = capsys.readouterr()
    assert "6 images audited, 3 not." in out
    assert "truncated.jpg: image file is truncated" in out
    assert "largest residual" in out
    assert str(tmp_path / "out" / "report.html") in out
    assert "score>-1e+09 holds" in err
    assert "  animated.gif" in err
    assert "residual>" not in err
    assert "shortcut" not in out  # nothing is named where nothing was shown to be
    assert main([*arguments, "--device", "cpu"]) == 2
    assert "Go on with resume" in capsys.readouterr().err
    assert main([*arguments, "--device", "cpu", "--resume", "--fail-on", "residual>1e-3"]) == 0


@pytest.mark.parametrize(("error", "said"), [(2e-3, True), (5e-4, False)])
def test_a_run_that_is_not_exact_says_so(tmp_path, capsys, monkeypatch, error, said):
    from captum_scoremap.audit import explaining

    real, spoiled = explaining._scores_at_zero, []

    def spoil(tape, scores, tapped):
        """B of one layer in two is wrong, by a share of S."""
        spoiled.append(tapped)
        wrong = error * scores if len(spoiled) % 2 == 0 else 0
        return real(tape, scores, tapped) + wrong

    write_digits(tmp_path / "in", 3)
    monkeypatch.setattr(explaining, "_scores_at_zero", spoil)
    arguments = ["audit", str(tmp_path / "in"), "--model", f"{__name__}:build_tiny", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu", "--layers", "1,4", "--batch-size", "3"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "out" / "analysis" / "summary.json").read_text(encoding="utf-8"))
    assert len(spoiled) == 2
    assert [layer["inexact"] for layer in summary["layers"]] == [0, 3 * said]
    assert summary["inexact"] == 3 * said
    if said:
        assert last == (
            "Not exact: the residual of 3 images is above 0.001 of their score |S|, at 4. Do not rely on their maps."
        )
        assert "The residual of 3 of 3 images is above\n0.001 of their score |S|, at <code>4</code> (3)." in page
    else:
        assert last == f"Report: {tmp_path / 'out' / 'report.html'}"
        assert "Not exact" not in page


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["photos"], None),
        (["photos", "--ray"], "local"),
        (["--ray", "photos"], "local"),
        (["photos", "--ray", "--workers", "3"], "local"),
        (["--ray", "torchvision:CIFAR10/test:data"], "local"),
        (["photos", "--ray", "auto"], "auto"),
        (["--ray", "auto", "photos"], "auto"),
        (["photos", "--ray", "10.0.0.7:6379"], "10.0.0.7:6379"),
        (["--ray", "ray://head.example:10001", "photos"], "ray://head.example:10001"),
        (["photos", "--ray=elsewhere"], "elsewhere"),
    ],
)
def test_ray_with_and_without_an_address(arguments, address, monkeypatch):
    called = {}

    def stop(source, model, *, ray, **_):
        called.update(source=source, ray=ray)
        raise ValueError("enough")

    monkeypatch.setattr(captum_scoremap.audit, "audit", stop)
    assert main(["audit", "--model", f"{__name__}:build_tiny", "--device", "cpu", *arguments]) == 2
    source = next(one for one in arguments if one.startswith(("photos", "torchvision")))
    assert called == {"source": source, "ray": address}


def test_program_exits_with_2_where_a_condition_cannot_be_evaluated(tmp_path, capsys):
    write_digits(tmp_path / "in", 3)
    arguments = ["audit", str(tmp_path / "in"), "--model", f"{__name__}:build_tiny", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu", "--fail-on", "accuracy<0.9"]) == 2
    assert "accuracy<0.9 cannot be evaluated" in capsys.readouterr().err
    assert main([*arguments, "--device", "cpu", "--resume", "--fail-on", "deletion>0.9"]) == 2
    assert "--fail-on deletion>0.9 needs --metrics deletion." in capsys.readouterr().err


def test_program_names_what_it_cannot_use(tmp_path, capsys):
    assert main(["audit", str(tmp_path / "nowhere")]) == 2
    assert "source must be a folder or a list of images" in capsys.readouterr().err
    assert main(["audit", str(tmp_path), "--fail-on", "acuracy<1"]) == 2
    assert "Did you mean 'accuracy'" in capsys.readouterr().err


def test_importing_the_package_loads_nothing_of_the_audit():
    # Captum may bring pandas and with it pyarrow; what the package itself adds is looked at.
    code = (
        "import sys, captum.attr, torchvision, typer; before = set(sys.modules); import captum_scoremap.cli\n"
        "print(sorted({'pyarrow', 'jinja2', 'ray', 'captum_scoremap.audit'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_pyarrow_the_error_names_the_extra(monkeypatch):
    code = "import sys; sys.modules['pyarrow'] = None\nimport captum_scoremap.audit"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pyarrow is not installed. Do python -m pip install "captum-scoremap[audit]".' in done.stderr


def test_weights_load_without_running_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("harm",))

    torch.save({"weight": Harm()}, tmp_path / "weights.pt")
    write_digits(tmp_path / "in", 1)
    arguments = ["audit", str(tmp_path / "in"), "--model", f"{__name__}:build_tiny"]
    assert main([*arguments, "--weights", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
