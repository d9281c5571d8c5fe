"""Build the documentation site: ``python -m tests.docs [FOLDER]``.

MkDocs builds it from ``tutorials/`` and the docstrings, as ``.mkdocs.yml`` says. This file is its hook: it makes pages
of the executed notebooks, of the public names, of the command line, of the rules' equations and of the changelog, so
that none of them is written twice. Formulas become MathML, which browsers set themselves.
"""

import argparse
import functools
import importlib
import inspect
import logging
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe
import nbformat
from latex2mathml.converter import convert
from mkdocs.config import load_config
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / ".mkdocs.yml"
PACKAGE = "captum_scoremap"

ROOMS = ("rules", "scores", "metrics", "visualization", "models", "audit", "quantus")
PAGES = {PACKAGE: PACKAGE, **{room: f"{PACKAGE}.{room}" for room in ROOMS}}
"""Name of a page to the module whose ``__all__`` is public."""


def public(module: str) -> dict[str, Any]:
    """The public names of a module and what they stand for."""
    imported = importlib.import_module(module)
    return {name: getattr(imported, name) for name in imported.__all__}


class Roles(griffe.Extension):
    """Docstrings as Markdown: cross-references for roles, one colon before a literal block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def as_markdown(text: str, obj: griffe.Object | None = None) -> str:
    """A docstring whose roles are cross-references."""

    def reference(match: re.Match[str]) -> str:
        name = match[1]
        owner = obj if obj is None or obj.is_class else obj.parent
        try:
            path = owner.resolve(name) if owner is not None else name
        except griffe.NameResolutionError:
            return f"`{name}`"
        return f"[`{name}`][{path}]"

    # one line of an equation is one line on the page
    text = re.sub(
        r"(?<=^Equation:\n)(?:    .*\n?)+", lambda lines: lines[0].replace("\n", "  \n"), text, flags=re.MULTILINE
    )
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the parser's name for a section of doctests
    return re.sub(r":\w+:`~?([\w.]+)`", reference, re.sub(r"::$", ":", text, flags=re.MULTILINE))


def equations() -> str:
    """Every rule of the table: what it freezes, its equation, and the operations that have it."""
    from captum_scoremap.rules.table import DEFAULT, display_name

    operations = defaultdict(list)
    for name, rule in DEFAULT.items():
        operations[type(rule)].append(display_name(name))
    parts = []
    for kind, names in operations.items():
        text = inspect.cleandoc(kind.__doc__ or "")
        summary = text.split("\n\n")[0]
        equation = re.search(r"^Equation:\n((?:    .*\n?|\n)+)", text, flags=re.MULTILINE)
        if equation is None:
            raise ValueError(f"{kind.__name__} must have a section Equation in its docstring.")
        lines = inspect.cleandoc(equation[1])
        listed = ", ".join(f"`{name}`" for name in sorted(set(names)))
        frozen = "Nothing is frozen" if kind.kind == "linear" else f"Frozen: {kind.kind}"
        parts += [
            f"### {kind.__name__} {{ #rule-{kind.__name__} }}",
            as_markdown(summary),
            f"```text\n{lines}\n```",
            f"*{frozen}*, for {listed}."
            if len(names) < 20
            else f'??? note "{frozen}; {len(names)} operations"\n    {listed}',
        ]
    return "\n\n".join(parts)


def command_line() -> str:
    """The help of every command."""
    import typer
    from typer.cli import get_docs_for_click

    from captum_scoremap.cli import app

    command = typer.main.get_command(app)
    text: str = get_docs_for_click(
        obj=command, ctx=typer.Context(command), name="captum-scoremap", title="Command line"
    )
    commands = re.search(r"\*\*Commands\*\*:\n.*?(?=\n## )", text, flags=re.DOTALL)  # their first lines, cut short
    return text.replace(commands[0] if commands else "", "").replace("\\[", "[")


def reference(module: str) -> str:
    """The page of a module: what it is for, and all of its public names."""
    text = as_markdown(inspect.cleandoc(importlib.import_module(module).__doc__ or ""))
    parts = [f"# {module}", text]
    for name, value in public(module).items():
        path = f"{module}.{name}"
        if isinstance(value, ModuleType):
            continue
        home = getattr(value, "__module__", module)
        if home.endswith(f".{name}"):  # a function in a file of its own name, which the path would mean
            parts += [f'<span class="alias" id="{path}"></span>', f"::: {home}.{name}"]
        else:
            parts.append(f"::: {path}")
    return "\n\n".join(parts)


def gallery() -> str:
    """Every tutorial with its first paragraph and its largest picture."""
    cards = []
    for source in sorted((ROOT / "tutorials").glob("*.ipynb")):
        text, pictures = notebook(source)
        title = text.partition("\n")[0].removeprefix("# ")
        largest = max(pictures, key=lambda name: len(pictures[name]))
        link = f"../{source.stem}.md"
        cards.append(f"<div markdown>\n[![{title}](../{largest})]({link})\n\n[{title}]({link})\n</div>")
    return "\n".join(['<div class="gallery" markdown>', *cards, "</div>"])


@functools.cache
def notebook(source: Path) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as Markdown, and its pictures by file name."""
    exporter = MarkdownExporter()
    content = nbformat.read(source, as_version=4)
    resources = {"unique_key": source.stem, "output_files_dir": f"{source.stem}_files"}
    text, resources = exporter.from_notebook_node(content, resources=resources)
    text = re.sub(r"!\[(?:jpe?g|png)\]", "![What the cell above draws]", text)
    text = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", text)
    head, _, body = text.partition("\n\n")
    note = f'!!! abstract "Executed notebook"\n    [Download it]({source.name}); in a clone: `jupyter lab tutorials`.'
    return f"{head}\n\n{note}\n\n{body}", {Path(name).as_posix(): data for name, data in resources["outputs"].items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    for name, module in PAGES.items():
        add(f"api/{name}.md", reference(module))
    add("api/command_line.md", command_line())
    add("changelog.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for source in sorted(Path(config.docs_dir).glob("*.ipynb")):
        text, pictures = notebook(source)
        add(f"{source.stem}.md", text)
        for name, data in pictures.items():
            add(name, data)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put in what is read off the code, where a page asks for it."""
    made = {"<!-- rules -->": equations, "<!-- gallery -->": gallery}
    for mark, make in made.items():
        markdown = markdown.replace(mark, make()) if mark in markdown else markdown
    markdown = re.sub(r"^(```\w+) needs=\w+$", r"\1", markdown, flags=re.MULTILINE)  # what its test needs
    return markdown.replace(" ± ", "\u00a0±\u00a0")


@functools.cache
def mathml(formula: str, display: str) -> str:
    """A formula, set by the browser."""
    return convert(formula, display=display)


def on_page_content(html: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn formulas into MathML, and let cross-references find names that have two paths."""
    for alias in re.findall(r'<span class="alias" id="([\w.]+)">', html):
        config.plugins["autorefs"].register_anchor(page, alias, primary=True)  # type: ignore[attr-defined]
    unescape = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}

    def inline(match: re.Match[str]) -> str:
        formula = re.sub("|".join(unescape), lambda found: unescape[found[0]], match[2].strip())
        return mathml(formula, "block" if match[1] == "[" else "inline")

    return re.sub(r'<(?:span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</(?:span|div)>', inline, html, flags=re.S)


def build(folder: Path | None = None) -> Path:
    """Build the site.

    Returns:
        Its folder.

    Raises:
        ValueError: If something of it is not as it must be; MkDocs has said what.
    """
    from mkdocs.commands.build import build as build_site

    options: dict[str, Any] = {} if folder is None else {"site_dir": str(folder)}
    config = load_config(str(CONFIG), strict=True, **options)
    config.plugins.on_startup(command="build", dirty=False)
    build_site(config)
    config.plugins.on_shutdown()
    return Path(config.site_dir)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="where to write it (build/site)")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    print(build(parser.parse_args().folder) / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
