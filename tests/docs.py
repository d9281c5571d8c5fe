"""Build the API reference of the package from its docstrings: ``python -m tests.docs FOLDER``."""

import argparse
import importlib
import inspect
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc

ROOMS = ("rules", "metrics", "visualization", "models", "audit")
PAGES = ("captum_scoremap", *(f"captum_scoremap.{room}" for room in ROOMS))
"""Modules whose ``__all__`` is public."""


def public(page: str) -> dict[str, object]:
    """The public names of a page and what they stand for."""
    module = importlib.import_module(page)
    return {name: getattr(module, name) for name in module.__all__}


def build(folder: Path) -> None:
    """Write the pages as HTML."""
    for page in PAGES:
        for name, value in public(page).items():
            if isinstance(value, ModuleType):
                continue
            # what is loaded on first use pdoc takes for a missing submodule
            setattr(sys.modules[page], name, value)
            # the generic bases that a class inherits pdoc takes for its own: Captum's methods would stand for ours
            if inspect.isclass(value) and "__orig_bases__" not in vars(value) and hasattr(value, "__orig_bases__"):
                value.__orig_bases__ = ()
    # no page for a file: what is public in it is on the page of its package
    root, *rooms = PAGES
    pdoc.pdoc(root, rf"!{root}\..+", *rooms, rf"!{root}\.\w+\..+", output_directory=folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write the pages")
    folder = parser.parse_args().folder
    warnings.simplefilter("error")  # of pdoc: a name that is not there, an annotation that is not understood
    build(folder)
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
