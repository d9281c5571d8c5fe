"""What the program does on a terminal that closes, knows few letters, or tells it to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from captum_scoremap.audit.shards import Shards
from tests.audit_pictures import tiny_model, write_digits
from tests.programs import Program, needs_fork

ROOT = Path(__file__).parent.parent


def build_slow():
    """A model for the command line that takes its time over a batch."""
    loaded = tiny_model()
    loaded.module.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return loaded


def start(source: Path, out: Path, *more: str, closed: Sequence[int] = ()) -> Program:
    """The audit as a program of its own."""
    options = ["--device", "cpu", "--layers", "1", "--batch-size", "2", "--shard-size", "4"]
    return Program(
        "audit", str(source), "--out", str(out), "--model", f"{__name__}:build_slow", *options, *more, closed=closed
    )


@needs_fork
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_what_is_kept_and_how_to_go_on(tmp_path, number, code):
    write_digits(tmp_path / "in", 60)  # enough for the run to be on when the signal comes
    out = tmp_path / "out"
    program = start(tmp_path / "in", out)
    while len(Shards(out).finished()) < 2:
        assert program.process.is_alive()
        time.sleep(0.01)
    program.signal(number)
    status, _, said = program.ended()
    kept = Shards(out).count_images()
    assert status == code
    assert said.splitlines()[-1] == (
        f"captum-scoremap: stopped. {kept} images are kept in {out}. Go on with the same command and --resume."
    )
    assert "Traceback" not in said
    assert 8 <= kept < 60
    status, printed, _ = start(tmp_path / "in", out, "--resume").ended()
    assert status == 0
    assert "60 images audited, 0 not." in printed


@needs_fork
def test_two_programs_at_once_one_is_told(tmp_path):
    write_digits(tmp_path / "in", 20)
    out = tmp_path / "out"
    first = start(tmp_path / "in", out)
    while not Shards(out).finished():
        assert first.process.is_alive()
        time.sleep(0.01)
    first.signal(signal.SIGSTOP)
    status, _, said = start(tmp_path / "in", out, "--resume").ended()
    first.signal(signal.SIGCONT)
    assert status == 2
    assert "no other audit writes to" in said
    status, printed, _ = first.ended()
    assert status == 0
    assert "20 images audited, 0 not." in printed


@needs_fork
def test_a_reader_who_goes_away_does_no_harm(tmp_path):
    write_digits(tmp_path / "in", 6)
    program = start(tmp_path / "in", tmp_path / "out", "--fail-on", "score>-1e9")
    program.output.close()
    status, _, said = program.ended()
    assert status == 2  # of the condition
    assert f"standard output is closed. Results and report are in {tmp_path / 'out'}." in said
    assert "score>-1e+09 holds" in said
    assert "Exception" not in said
    assert "Broken pipe" not in said
    program = start(tmp_path / "in", tmp_path / "other")
    program.errors.close()  # progress has no reader
    status, printed, _ = program.ended()
    assert "6 images audited" in printed
    assert status == 0


@needs_fork
@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_do_no_harm(tmp_path, closed):
    write_digits(tmp_path / "in", 3)
    status, _, said = start(tmp_path / "in", tmp_path / "out", closed=[closed]).ended()
    assert status == 0
    assert "Traceback" not in said
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_an_interpreter_that_starts_without_streams_does_no_harm(tmp_path):
    write_digits(tmp_path / "in", 3)
    command = (
        f"{sys.executable} -m captum_scoremap audit {tmp_path / 'in'} --out {tmp_path / 'out'} --device cpu "
        f"--model {__name__}:build_slow --layers 1 >&- 2>&-"
    )
    done = subprocess.run(command, shell=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_letters_that_the_terminal_does_not_know(tmp_path):
    folder = tmp_path / "naïve 猫"
    write_digits(folder, 3)
    (folder / "bad 猫.png").write_bytes(b"")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    audit = ["audit", str(folder), "--out", str(tmp_path / "out 猫"), "--device", "cpu"]
    audit += ["--model", f"{__name__}:build_slow", "--layers", "1"]
    program = (
        "import sys\nfrom captum_scoremap.cli import main\nassert main(sys.argv[1:]) == main(['audit', '--help']) == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *audit], cwd=ROOT, env=ascii_only, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 images audited, 1 not." in done.stdout
    assert "the file is empty" in done.stdout
    assert "--single-file" in done.stdout or "--resume" in done.stdout
