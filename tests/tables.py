"""Tables that sweeps write: a row as soon as it is known, and a sweep that was stopped goes on where it was."""

from __future__ import annotations

from pathlib import Path


class Table:
    """A table in Markdown, printed and, if there is a file for it, written.

    Args:
        header: All above the rows, with the versions that they are of.
        out: The file; None to print only. Rows that stand there under the same header are kept.
    """

    def __init__(self, header: str, out: Path | None) -> None:
        before = out.read_text(encoding="utf-8") if out is not None and out.exists() else ""
        self._text, self._out = before if before.startswith(header) else header, out
        self._names = {
            line.split("|")[1].strip().rstrip("*") for line in self._text.splitlines() if line.startswith("| ")
        }
        print(self._text, end="")

    def has(self, name: str) -> bool:
        """Whether there is a row of this name, with or without an asterisk."""
        return name in self._names

    def add(self, row: str) -> None:
        print(row, flush=True)
        self._text += row + "\n"
        if self._out is not None:
            self._out.write_text(self._text, encoding="utf-8")
