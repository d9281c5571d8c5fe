"""Run a benchmark: ``python -m tests.benchmarks [NAME] ...``; without a name, the one of speed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

DEFAULT = "speed"


def main(arguments: list[str]) -> None:
    """Hand the arguments to the benchmark that the first of them names."""
    folder = Path(__file__).parent
    programs = {path.stem: path for path in folder.glob("[!_]*.py")}
    programs |= {path.parent.name: path for path in folder.glob("[!_]*/__init__.py")}
    known = sorted(name for name, path in programs.items() if "\ndef main(" in path.read_text(encoding="utf-8"))
    name, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in known else (DEFAULT, arguments)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        sys.exit(f"NAME must be one of {', '.join(known)}, got {arguments[0]!r}.")
    sys.argv[0] = f"python -m tests.benchmarks {name}"
    importlib.import_module(f"tests.benchmarks.{name}").main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
