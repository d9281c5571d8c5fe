"""README.md: its Python runs, its command lines are accepted, its links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from captum_scoremap.cli import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# "python needs=zennit" marks a block for which a package beyond the extra dev must be installed
BLOCKS = re.findall(r"^```(\w+)(?: needs=(\w+))?\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
PYTHON = [(needs, code) for language, needs, code in BLOCKS if language == "python"]
LINES = [line for language, _, code in BLOCKS if language == "console" for line in code.splitlines()]
COMMANDS = [line.rpartition("&& ")[2] for line in LINES if "captum-scoremap " in line.rpartition("&& ")[2]]


@pytest.mark.parametrize(("needs", "code"), PYTHON)
def test_python_runs(needs: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if needs:
        pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_are_accepted(line: str) -> None:
    program, name, *arguments = shlex.split(line)
    assert program == "captum-scoremap"
    group = typer.main.get_command(app)
    command = group.get_command(None, name)
    assert command is not None, f"there is no command {name}"
    try:
        command.make_context(name, [argument for argument in arguments if argument != "--help"])
    except Exception as error:
        pytest.fail(f"{line}: {error}")


def test_there_are_two_commands() -> None:
    installing = [line for line in LINES if line.startswith("python -m pip install")]
    assert [line.rpartition(" && ")[2] for line in installing] == ["captum-scoremap explain", "python -m tests"]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_links_lead_somewhere(target: str) -> None:
    if target.startswith("#"):
        headings = re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert target[1:] in anchors
    elif not target.startswith("https://"):
        assert (ROOT / target.partition("#")[0]).exists()


def test_ci_finds_the_two_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r'\$\(command_line "(.*)"\)', script)
    assert len(patterns) == 2
    for pattern in patterns:
        assert sum(bool(re.match(rf"python -m pip install .* && {pattern}$", line)) for line in LINES) == 1
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
