"""What the program does on a terminal that closes, knows few letters, or tells it to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captum_scoremap.audit.shards import Shards
from tests.audit_pictures import tiny_model, write_digits

ROOT = Path(__file__).parent.parent


def build_slow():
    """A model for the command line that takes its time over a batch."""
    loaded = tiny_model()
    loaded.module.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return loaded


def start(source: Path, out: Path, *more: str, model: str = "build_slow", **environment: str):
    """The audit as a program of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "captum_scoremap", "audit", str(source), "--out", str(out), "--device", "cpu"),
            *("--model", f"{__name__}:{model}", "--layers", "1", "--batch-size", "2", "--shard-size", "4", *more),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts if os.name == "posix" else None,
    )


def heed_interrupts() -> None:
    """Undo what a shell does to programs in the background, which these tests may be: Ctrl-C is not for them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_what_is_kept_and_how_to_go_on(tmp_path, number, code):
    write_digits(tmp_path / "in", 120)  # enough for the run to be on when the signal comes
    out = tmp_path / "out"
    process = start(tmp_path / "in", out)
    while len(Shards(out).finished()) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    kept = Shards(out).count_images()
    assert process.returncode == code
    assert said.splitlines()[-1] == (
        f"captum-scoremap: stopped. {kept} images are kept in {out}. Go on with the same command and --resume."
    )
    assert "Traceback" not in said
    assert 8 <= kept < 120
    process = start(tmp_path / "in", out, "--resume")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "120 images audited, 0 not." in printed


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_two_programs_at_once_one_is_told(tmp_path):
    write_digits(tmp_path / "in", 40)
    out = tmp_path / "out"
    first = start(tmp_path / "in", out)
    while not Shards(out).finished():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path / "in", out, "--resume")
    _, said = second.communicate(timeout=300)
    first.send_signal(signal.SIGCONT)
    printed, _ = first.communicate(timeout=300)
    assert second.returncode == 2
    assert "no other audit writes to" in said
    assert first.returncode == 0
    assert "40 images audited, 0 not." in printed


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_who_goes_away_does_no_harm(tmp_path):
    write_digits(tmp_path / "in", 6)
    process = start(tmp_path / "in", tmp_path / "out", "--fail-on", "score>-1e9")
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 2  # of the condition
    assert f"standard output is closed. Results and report are in {tmp_path / 'out'}." in said
    assert "score>-1e+09 holds" in said
    assert "Exception" not in said
    assert "Broken pipe" not in said
    process = start(tmp_path / "in", tmp_path / "other")
    process.stderr.close()  # progress has no reader
    assert "6 images audited" in process.stdout.read()
    assert process.wait(timeout=300) == 0
    process.stdout.close()


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path, closed):
    write_digits(tmp_path / "in", 3)
    command = (
        f"{sys.executable} -m captum_scoremap audit {tmp_path / 'in'} --out {tmp_path / 'out'} --device cpu "
        f"--model {__name__}:build_slow --layers 1 {closed}"
    )
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_letters_that_the_terminal_does_not_know(tmp_path):
    folder = tmp_path / "naïve 猫"
    write_digits(folder, 3)
    (folder / "bad 猫.png").write_bytes(b"")
    process = start(folder, tmp_path / "out 猫", **ASCII)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "3 images audited, 1 not." in printed
    assert "the file is empty" in printed
    done = subprocess.run(
        [sys.executable, "-m", "captum_scoremap", "audit", "--help"],
        cwd=ROOT,
        env={**os.environ, **ASCII},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "--single-file" in done.stdout or "--resume" in done.stdout
