"""One word for one meaning, in the field's own terms: pages, notebooks, docstrings, messages and help texts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_docs import EXPLAINED, documented, own_members

ROOT = Path(__file__).parent.parent
TEXTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "captum_scoremap").rglob("*.py")),
    *sorted((ROOT / "tutorials").rglob("*.py")),
    *sorted((ROOT / "tutorials").rglob("*.md")),
]

INSTEAD = {
    r"let go\b": "freed",
    r"(drawn )?by lot\b": "in random order",
    r"\bin stretches\b|\bstretches of\b": "in chunks",
    r"inside cannot be seen": "is compiled or scripted",
    r"\bfeign": "simulate",
    r"\bby the way it\b|\bas it goes by\b|\bas the coefficients go by\b": "during the backward pass",
    r"\b(further|more) (argument|option|package|layer|measure)s\b along": "additional",
    r"\bbreak-points?\b|\bbitmasks?\b": "breakpoints, bit mask",
    r"\bgrey\b|\bcolour|\bbehaviour|\bneighbour": "US spelling",
    r"\b(normal|optim|initial|visual|minim|maxim)is(e|ed|ing|ation)\b": "US spelling",
    r"\bcenter-crop|\bcentre\b|\bmetres?\b|\blabell(ed|ing)\b|\bmodell(ed|ing)\b": "US spelling",
}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_terms_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern, better in INSTEAD.items():
        found = re.search(pattern, text)
        assert found is None, f"{found[0]!r}: {better}"


def functions() -> list[tuple[str, str]]:
    """Public functions and methods with their docstrings; properties and classes are named by what they are."""
    found = []
    for name, value in EXPLAINED.items():
        if not isinstance(value, type):
            found.append((name, documented(value)))
        for member, text in own_members(value).items():
            if not isinstance(vars(value)[member], property):
                found.append((f"{name}.{member}", text))
    return found


@pytest.mark.parametrize(("name", "text"), functions(), ids=lambda part: part.partition("\n")[0][:60])
def test_summaries_are_imperative(name: str, text: str) -> None:
    first = text.split()[0]
    assert re.fullmatch(r"[A-Z][a-z-]+", first), f"{name}: {first}"
    assert first not in set("The A An Whether What Where How Which This Always Nothing True".split()), name
    assert not first.endswith("s") or first in {"Pass", "Process"}, f"{name}: {first}"


def test_command_helps_are_imperative() -> None:
    for path in sorted((ROOT / "captum_scoremap" / "cli").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == path.stem:
                first = (ast.get_docstring(node) or "").split()[0]
                assert first[0].isupper(), path
                assert not first.endswith("s"), f"{path.stem}: {first}"
