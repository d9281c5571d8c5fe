"""README.md and the site's pages: Python runs, command lines are accepted, links lead somewhere, named tests exist."""

import operator
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

import captum_scoremap
from captum_scoremap.cli import app
from captum_scoremap.models import load_model, read_image

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "tutorials"
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in TUTORIALS.rglob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, package beyond the extra dev that it needs ("python needs=zennit"), and text of every block."""
    return re.findall(r"^```(\w+)(?: needs=(\w+))?\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)


def lines(page: str) -> list[str]:
    """What is to be typed."""
    return [line for language, _, code in blocks(page) if language == "console" for line in code.splitlines()]


PYTHON = [
    pytest.param(page, needs, code, id=f"{Path(page).stem}-{number}")
    for page in PAGES
    for number, (language, needs, code) in enumerate(blocks(page))
    if language == "python"
]
COMMANDS = sorted({
    line.rpartition("&& ")[2]
    for page in PAGES
    for line in lines(page)
    if line.rpartition("&& ")[2].startswith("captum-scoremap ")
})


@pytest.mark.parametrize(("page", "needs", "code"), PYTHON)
def test_python_runs(page: str, needs: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if needs:
        pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "page"})


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
    installing = [line for line in lines("README.md") if line.startswith('python -m pip install "')]
    installing += [line for line in lines("README.md") if line.startswith('python -m pip install -e ".[dev]')]
    assert [line.rpartition(" && ")[2] for line in installing] == ["captum-scoremap explain", "python -m tests"]


def test_readme_takes_five_minutes() -> None:
    assert len(read("README.md").splitlines()) <= 200


def test_numbers_of_the_cat() -> None:
    cat = load_model()
    inputs, target = cat.preprocessing(read_image("sample:chelsea"))[None], cat.label_index("tiger cat")
    layers = {"blocks.4": cat.module.blocks[4], "image": None, "bn2": cat.module.bn2}
    forms = {name: captum_scoremap.linear_form(cat.module, inputs, target, layer) for name, layer in layers.items()}
    score, b = f"{forms['bn2'].score.item():.2f}", {name: f"{form.bias.item():.2f}" for name, form in forms.items()}
    sums = f"{forms['blocks.4'].sums.item():.2f}"
    assert f"At this layer S = {score}, A·Y = {sums} and B = {b['blocks.4']}:" in read("README.md")
    said = (
        f"S = {score}, with B = {b['blocks.4']} at `blocks.4`, {b['image']} at the image and "
        f"{b['bn2'].replace('-', '−')} at `bn2`"
    )
    assert said in " ".join(read("tutorials/site/faq.md").split())


def links(text: str) -> list[str]:
    return sorted(set(re.findall(r"\]\(([^)\s]+)\)", text)))


def heading_anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# links of the site's pages to pages that are made are followed where the site is built
@pytest.mark.parametrize(
    ("page", "target"), [(page, target) for page in ("README.md", "CHANGELOG.md") for target in links(read(page))]
)
def test_links_lead_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    if target.startswith("https://"):
        return
    assert (ROOT / path).exists()
    if anchor:
        assert anchor in heading_anchors(read(path or page))


MATHEMATICS = read("tutorials/site/mathematics.md")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", MATHEMATICS)))
NAMES = re.findall(r"^\|[^|]*\| `([\w.]+)`[^|]*\| `tests/[\w/]+\.py::", MATHEMATICS, flags=re.MULTILINE)


def test_every_row_about_the_paper_names_a_test() -> None:
    section = MATHEMATICS.partition("## Where the paper is\n")[2].partition("\n## ")[0]
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
        assert sum(bool(re.match(rf"python -m pip install .* && {pattern}$", line)) for line in lines("README.md")) == 1
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
