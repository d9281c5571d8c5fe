"""The table of what exports: it says where it comes from, and a stopped run goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import exports
from tests.zoo import PIECEWISE_LINEAR, SMOOTH

TABLE = Path(__file__).with_name("exports_table.md")
NUMBER = re.compile(r"\d(e[+-]\d+)?")


def test_the_table_names_its_command_and_what_is_wrong_where_it_has_no_number() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert text.startswith("# What exports, model by model\n")
    assert "Written by `python -m tests.exports` with torch " in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows
    assert {row[0] for row in rows} == {*PIECEWISE_LINEAR, *SMOOTH}
    for name, *cells in rows:
        assert len(cells) == 4
        for number, cell in enumerate(cells):
            assert float(cell) <= 1e-5 if NUMBER.fullmatch(cell) or number < 2 else len(cell) > 20, name


def test_a_difference_is_called_rounding_only_where_the_eager_map_s_own_is_as_large() -> None:
    assert exports.cell(9e-6, 1e-7) == "9e-06"
    assert exports.cell(7e-4, 1e-3).startswith("7e-04: rounding, ")
    assert exports.cell(7e-4, 1e-6) == "7e-04"


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measure(name: str) -> Iterator[str]:
        seen.append(name)
        yield from ("0e+00", f"of {name}")

    monkeypatch.setattr(exports, "measure", measure)
    out = tmp_path / "table.md"
    exports.main(["small vit", "--out", str(out)])
    exports.main(["small vit", "swin_t", "--out", str(out)])
    assert seen == ["small vit", "swin_t"]
    assert out.read_text(encoding="utf-8").endswith(
        "| small vit | 0e+00 | of small vit |\n| swin_t | 0e+00 | of swin_t |\n"
    )
