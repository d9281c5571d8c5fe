"""The site is built without a warning, its links lead somewhere, and its reference shows all of our docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup, Tag

from tests.docs import PAGES, public
from tests.programs import Program

ROOT = Path(__file__).parent.parent
PUBLIC = {f"{module}.{name}": value for module in PAGES.values() for name, value in public(module).items()}
EXPLAINED = {name: value for name, value in PUBLIC.items() if inspect.isclass(value) or inspect.isfunction(value)}

each_name = pytest.mark.parametrize("name", EXPLAINED)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BeautifulSoup]:
    """Every page of the site, by its address."""
    folder = tmp_path_factory.mktemp("site")
    status, _, said = Program(str(folder), module="tests.docs").ended()
    assert (status, said) == (0, "")
    files = sorted(folder.rglob("*.html"))
    return {
        file.relative_to(folder).as_posix(): BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")
        for file in files
        if file.name != "404.html"
    }


def page_of(name: str) -> str:
    """Where a public name is described."""
    module = next(
        module for module in PAGES.values() if name.startswith(f"{module}.") and name.rpartition(".")[0] == module
    )
    return f"api/{next(page for page, its in PAGES.items() if its == module)}.html"


def rendered(site: dict[str, BeautifulSoup], name: str, member: str = "") -> str:
    """What the reference says of a name or of its member, without what it says of its members."""
    heading = site[page_of(name)].find(id=f"{name}.{member}" if member else name)
    assert isinstance(heading, Tag), f"the reference lacks {name} {member}"
    contents = heading.find_next("div", class_="doc-contents")
    assert isinstance(contents, Tag)
    copy = BeautifulSoup(str(contents), "html.parser")
    for children in copy.find_all("div", class_="doc-children"):
        children.decompose()
    return " ".join(words(copy.get_text(" ")))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def statements(docstring: str) -> list[str]:
    """What a docstring says, each paragraph and each entry by itself, without headings and markup."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"\1", inspect.cleandoc(docstring))
    text = re.sub(r"^(Args|Attributes|Returns|Yields|Raises|Example|Equation):$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^    \*{0,2}(\w+): ", r"\n\n\1\n\n", text, flags=re.MULTILINE)  # an entry
    text = re.sub(r"^\s*(?:\d+\.|-) ", "\n\n", text, flags=re.MULTILINE)  # an item of a list
    text = re.sub(r"^\s*>>>|^\s*\.\.\.", "\n\n", text, flags=re.MULTILINE)
    return [" ".join(words(one)) for one in re.split(r"\n\s*\n", text) if words(one)]


def own_members(value: object) -> dict[str, str]:
    """Public members of a class that have a docstring of their own."""
    if not inspect.isclass(value):
        return {}
    return {
        name: documented(member)
        for name, member in vars(value).items()
        if is_public_method(name, member) and documented(member)
    }


@each_name
def test_reference_shows_the_docstring(site: dict[str, BeautifulSoup], name: str) -> None:
    texts = {"": documented(EXPLAINED[name]), **own_members(EXPLAINED[name])}
    for member, docstring in texts.items():
        shown = rendered(site, name, member)
        missing = [statement for statement in statements(docstring) if statement not in shown]
        assert missing == [], f"{name} {member}"


def test_every_public_name_is_in_the_reference(site: dict[str, BeautifulSoup]) -> None:
    for name, value in PUBLIC.items():
        if isinstance(value, ModuleType):
            assert name in PAGES.values(), f"the reference lacks a page of {name}"
        else:
            assert site[page_of(name)].find(id=name), f"the reference lacks {name}"


def test_attribute_has_our_words(site: dict[str, BeautifulSoup]) -> None:
    shown = rendered(site, "captum_scoremap.LayerScoreMap", "attribute")
    for said in ("channel_dim", "N 1 h w for a layer of N C h w", "UnsupportedOperationError", "LayerScoreMap model"):
        assert said in shown, said


def test_links_lead_somewhere(site: dict[str, BeautifulSoup]) -> None:
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in site.items()}
    broken = []
    for page, soup in site.items():
        for link in soup.find_all("a", href=True):
            path, _, anchor = unquote(str(link["href"])).partition("#")
            if re.match(r"\w+:", path):
                continue
            target = (Path("/") / page).parent.joinpath(path).as_posix() if path else f"/{page}"
            parts: list[str] = []
            for part in target.split("/"):
                parts = parts[:-1] if part == ".." else [*parts, part] if part not in {"", "."} else parts
            found = "/".join(parts) or "index.html"
            if found.endswith(".html") and (found not in site or (anchor and anchor not in anchors[found])):
                broken.append(f"{page}: {link['href']}")
    assert broken == []


def test_every_page_is_reached_from_the_first(site: dict[str, BeautifulSoup]) -> None:
    first = {str(link["href"]).partition("#")[0] for link in site["index.html"].find_all("a", href=True)}
    for page in site:
        assert page in first or page == "index.html", f"no way leads to {page}"


def test_pictures_have_a_text(site: dict[str, BeautifulSoup]) -> None:
    for page, soup in site.items():
        assert [str(image) for image in soup.find_all("img") if not image.get("alt")] == [], page


def test_nothing_is_loaded_from_elsewhere(site: dict[str, BeautifulSoup]) -> None:
    for page, soup in site.items():
        for tag in soup.find_all(["script", "link", "img", "iframe"]):
            assert not str(tag.get("src") or tag.get("href") or "").startswith(("http:", "https:", "//")), page


def test_no_source_is_left(site: dict[str, BeautifulSoup]) -> None:
    for page, soup in site.items():
        fences = [code for code in soup.find_all("code") if "```" in code.get_text()]
        assert fences == [], page
        soup = BeautifulSoup(str(soup), "html.parser")  # other tests read it, too
        for code in soup.find_all(["pre", "code", "script"]):
            code.decompose()
        text = soup.get_text()
        found = re.findall(
            r"```|:(?:class|meth|func|mod):|^::: .*|\$[^$\n]+\$|\\\(|::$|\]\[|<!--", text, flags=re.MULTILINE
        )
        assert found == [], page


def is_public_method(name: str, member: object) -> bool:
    kinds = (staticmethod, classmethod, property)
    named = not name.startswith("_") or name in {"__call__", "__sub__"}
    return named and (inspect.isfunction(member) or isinstance(member, kinds))


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
    missing = [
        parameter for parameter in parameters if not re.search(rf"^    \*{{0,2}}{parameter}:", listed, re.MULTILINE)
    ]
    assert missing == []


@each_name
def test_there_is_an_example(name: str) -> None:
    assert ">>> " in sections(documented(EXPLAINED[name])).get("Example", "")
