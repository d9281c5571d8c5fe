"""Tutorials run, are stored as they run, and show a reader nothing but what they mean to show."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from scipy.stats import t

from tests.tutorials import FOLDER, SOURCES, ForkedKernel, execute, noise, notebook_from, source_from

REBUILD = "Run python -m tests.tutorials."
LARGEST = 1_500_000
MACHINE = {
    "path": r"(?<![\w.:/<])/(?:[\w.-]+/)+[\w.-]*|\b[A-Z]:\\|site-packages",
    "address": r"\b0x[0-9a-f]{6,}",
    "traceback": r"Traceback \(most recent call last\)",
}

ELSEWHERE = {f"{student:.2f}" for student in t.ppf(0.975, [5, 3, 1e9])}
"""Numbers of prose that no cell gives: Student's t."""

NUMBER = r"\d+(?:\.\d+)?(?:e[-+]\d+)?"
NO_CLAIM = r"```.*?```|\$[^$]*\$|`[^`]*`|^#+ \d+\.|\bet al\. \d{4}|\b(?:Fig\.|Section|Tutorial|Tutorials) [\d.]+"
"""What holds numbers but states none: code, formulas, the number of a tutorial, places in the literature."""

each_tutorial = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def stored(source: Path) -> NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=nbformat.NO_CONVERT)


def texts(cell: NotebookNode) -> list[str]:
    """All that a cell shows but pictures."""
    found = []
    for output in cell.get("outputs", ()):
        found.append(output.get("text", ""))
        found += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return found


def untold(notebook: NotebookNode) -> set[str]:
    """Numbers of the prose that nothing in the code or in what it prints, and no table that is linked, rounds to."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = numbers_in(" ".join(text for cell in code for text in (cell.source, *texts(cell))))
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = set()
    for paragraph in re.sub(NO_CLAIM, "", prose, flags=re.DOTALL | re.MULTILINE).split("\n\n"):
        tables = [FOLDER / page for page in re.findall(r"\]\((site/benchmarks\.md)", paragraph)]
        told = shown | {number for table in tables for number in numbers_in(table.read_text(encoding="utf-8"))}
        said = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)", re.sub(r"\]\([^)]*\)", "]", paragraph))
        found |= set(said) - told - ELSEWHERE
    return found


def numbers_in(text: str) -> set[str]:
    """The numbers in a text, rounded to whole ones, and to one, two and three decimals."""
    return {f"{float(number):.{places}f}" for number in re.findall(NUMBER, text) for places in range(4)}


def kinds(notebook: NotebookNode) -> list[list[str]]:
    """What every cell shows, by kind: printed text, results, pictures."""
    return [
        sorted(kind for output in cell.get("outputs", ()) for kind in output.get("data", [output.output_type]))
        for cell in notebook.cells
    ]


@each_tutorial
def test_runs_without_a_warning(source: Path) -> None:
    notebook = notebook_from(source)
    execute(notebook, ForkedKernel)
    assert list(noise(notebook)) == []
    assert kinds(notebook) == kinds(stored(source)), REBUILD
    assert untold(notebook) == untold(stored(source)) == set(), "prose states a number that the code does not give"


def test_imports_say_nothing_in_a_new_interpreter() -> None:
    """Forked kernels have imported most of it."""
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in SOURCES]
    lines = {
        ast.unparse(one): None for tree in trees for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)
    }
    notebook = notebook_from(SOURCES[0])
    notebook.cells = [nbformat.v4.new_code_cell("\n".join(lines))]
    del notebook.cells[0]["id"]  # of a later format
    execute(notebook)
    assert list(noise(notebook)) == []


def test_numbers_of_prose_are_looked_for() -> None:
    said = nbformat.v4.new_markdown_cell(
        "# 7. Scores\n\nThe score (Yu et al. 2015, Section 2.1) is 9.14, of which 0.3 and not 8.77; `x = 1.25` is code."
        "\n\nIt is that of 12 [images](site/index.md#5), not 13."
    )
    did = nbformat.v4.new_code_cell(
        "print(1)", outputs=[nbformat.v4.new_output("stream", text="9.1382 and 0.27, 12 images\n")]
    )
    assert untold(nbformat.v4.new_notebook(cells=[said, did])) == {"8.77", "13"}


@each_tutorial
def test_source_and_notebook_are_equal(source: Path) -> None:
    notebook = stored(source)
    forward = [(cell.cell_type, cell.source) for cell in notebook_from(source).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == forward, REBUILD
    assert source_from(notebook) == source.read_text(encoding="utf-8"), REBUILD
    assert notebook.metadata == notebook_from(source).metadata, REBUILD


@each_tutorial
def test_notebook_is_executed_in_order_and_clean(source: Path) -> None:
    notebook = stored(source)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), REBUILD
    assert list(noise(notebook)) == []
    for what, pattern in MACHINE.items():
        found = [text for cell in notebook.cells for text in (cell.source, *texts(cell)) if re.search(pattern, text)]
        assert found == [], f"{source.name} shows a {what} of one machine"
    assert source.with_suffix(".ipynb").stat().st_size < LARGEST


@each_tutorial
def test_links_lead_somewhere(source: Path) -> None:
    prose = "\n".join(cell.source for cell in notebook_from(source).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith("https://"):
            assert (FOLDER / target.partition("#")[0]).exists(), target


def test_every_notebook_has_its_source() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {source.stem for source in SOURCES}
