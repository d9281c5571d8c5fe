"""README.md: its Python runs, its command lines are accepted, its links lead somewhere, tests that it names exist."""

import operator
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

import captum_scoremap
from captum_scoremap.cli import app

ROOT = Path(__file__).parent.parent


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


TEXT = read("README.md")
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


def links(text: str) -> list[str]:
    return sorted(set(re.findall(r"\]\(([^)\s]+)\)", text)))


@pytest.mark.parametrize(
    ("page", "target"), [(page, target) for page in ("README.md", "CHANGELOG.md") for target in links(read(page))]
)
def test_links_lead_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    if target.startswith("https://"):
        return
    assert (ROOT / path).exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", read(path or page), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors


TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
NAMES = re.findall(r"^\|[^|]*\| `([\w.]+)`[^|]*\| `tests/[\w/]+\.py::", TEXT, flags=re.MULTILINE)


def test_every_row_about_the_paper_names_a_test() -> None:
    section = TEXT.partition("## Where the paper is\n")[2].partition("\n## ")[0]
    _, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows
    assert len(NAMES) == len(rows)


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_tests_that_are_named_exist(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", read(file), flags=re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_what_they_test_is_public(name: str) -> None:
    rooms = (captum_scoremap, captum_scoremap.visualization)
    assert any(hasattr(room, name.partition(".")[0]) for room in rooms)
    if "." in name:
        assert operator.attrgetter(name)(captum_scoremap)


def test_ci_finds_the_two_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r'\$\(command_line "(.*)"\)', script)
    assert len(patterns) == 2
    for pattern in patterns:
        assert sum(bool(re.match(rf"python -m pip install .* && {pattern}$", line)) for line in LINES) == 1
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
