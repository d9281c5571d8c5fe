"""Lists of images, .csv or .parquet: rows with cells by the names of their columns, as spreadsheets write them."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from captum_scoremap.data.extras import import_extra

__all__ = ["column_of", "read_rows"]

_DELIMITERS = ",;\t|"  # what spreadsheets put between cells; which it is, depends on the language


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a list; the case of its columns' names and space around them do not matter.

    Args:
        path: The file.

    Returns:
        Its rows, cell by name of the column; None where a cell is empty.

    Raises:
        ValueError: If it is no such file, or its rows do not fit its columns.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            table = import_extra("pyarrow.parquet", "audit").read_table(path)
            rows: list[dict[str, Any]] = table.rename_columns(_folded(table.column_names, path)).to_pylist()
            return rows
        if kind == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return _rows_of(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"a list must be UTF-8, got {path.name!r}: {error}. Save it as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(
            f"a list must be comma-separated values, got {path.name!r}: {error}. Save it anew, by a spreadsheet."
        ) from error
    raise ValueError(f"a list must be a .csv or .parquet file, got {path.name!r}.")


def column_of(rows: Sequence[Mapping[str, Any]], known: Sequence[str], path: Path) -> str:
    """Return the first of the names that a list has a column of.

    Args:
        rows: The list's rows.
        known: The names.
        path: The file.

    Returns:
        The name.

    Raises:
        ValueError: If there is none.
    """
    found = next((name for name in known if name in rows[0]), None)
    if found is None:
        raise ValueError(
            f"{path.name} must have a column {' or '.join(known)}, got {', '.join(rows[0])}. "
            "Rename one, or add a first row of names."
        )
    return found


def _rows_of(file: TextIO, path: Path) -> list[dict[str, Any]]:
    first = file.readline()
    file.seek(0)
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
    names = _folded(next(reader, []), path)
    rows = []
    for cells in filter(None, reader):
        if any(cells[len(names) :]):
            raise ValueError(
                f"{path.name} must have a cell for each of {', '.join(names)}, got {cells} in line {reader.line_num}. "
                f"Put text with {delimiter!r} in it between quotes."
            )
        padded = [*cells, *[""] * (len(names) - len(cells))]
        rows.append({name: cell or None for name, cell in zip(names, padded, strict=False) if name})
    return rows


def _folded(names: Sequence[str], path: Path) -> list[str]:
    folded = [name.strip().casefold() for name in names]
    for name in folded:
        if name and folded.count(name) > 1:
            raise ValueError(f"{path.name} must have one column {name}, got {folded.count(name)}. Rename one.")
    return folded
