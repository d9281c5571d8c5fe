"""The API reference is built without a warning, and has all of every public name: arguments, result, example."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs import PAGES, public

ROOT = Path(__file__).parent.parent
PUBLIC = {f"{page}.{name}": value for page in PAGES for name, value in public(page).items()}
EXPLAINED = {name: value for name, value in PUBLIC.items() if inspect.isclass(value) or inspect.isfunction(value)}

each_name = pytest.mark.parametrize("name", EXPLAINED)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The HTML of every page."""
    folder = tmp_path_factory.mktemp("api")
    subprocess.run([sys.executable, "-m", "tests.docs", str(folder)], cwd=ROOT, check=True)
    files = {page: folder / f"{page.replace('.', '/')}.html" for page in PAGES}
    return {page: file.read_text(encoding="utf-8") for page, file in files.items()}


def test_every_public_name_is_in_the_reference(pages: dict[str, str]) -> None:
    for page, html in pages.items():
        anchors = set(re.findall(r'id="([\w.]+)"', html))
        for name, value in public(page).items():
            if isinstance(value, ModuleType):
                assert f"{page}.{name}" in pages
                continue
            assert name in anchors, f"{page} lacks {name}"
            if inspect.isclass(value):
                own = {f"{name}.{member}" for member, it in vars(value).items() if is_public_method(member, it)}
                assert own <= anchors, f"{page} lacks {', '.join(sorted(own - anchors))}"


def is_public_method(name: str, member: object) -> bool:
    kinds = (staticmethod, classmethod, property)
    return not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, kinds))


def documented(value: object) -> str:
    return inspect.cleandoc(getattr(value, "__doc__", None) or "")


def sections(text: str) -> dict[str, str]:
    """The sections of a docstring in Google style."""
    parts = re.split(r"^(\w+):\n(?=    )", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@each_name
def test_arguments_and_result_are_said(name: str) -> None:
    value = EXPLAINED[name]
    text = documented(value)
    assert len(text.splitlines()) > 1
    said = sections(text)
    if dataclasses.is_dataclass(value):
        parameters = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
    else:
        function = value.__init__ if inspect.isclass(value) else value  # type: ignore[misc]
        signature = inspect.signature(function) if inspect.isfunction(function) else inspect.Signature()
        parameters = [parameter for parameter in signature.parameters if parameter != "self"]
        if inspect.isfunction(value) and signature.return_annotation not in {None, "None"}:
            assert "Returns" in said
    listed = said.get("Args", "") + "\n" + said.get("Attributes", "")
    missing = [parameter for parameter in parameters if not re.search(rf"^    {parameter}:", listed, re.MULTILINE)]
    assert missing == []


@each_name
def test_there_is_an_example(name: str) -> None:
    assert ">>> " in sections(documented(EXPLAINED[name])).get("Example", "")
