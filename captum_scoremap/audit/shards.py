"""Results on disk: shards of Parquet that are there whole or not at all.

A shard is one file in each table's folder, ``images/00003.parquet`` and so on. Every file is written under a
temporary name, flushed to the disk and renamed into place, ``images`` last; a shard without that file is not
done and is written anew. So a program killed at any moment loses at most the shard it was writing, and what is there
can be read at any time.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captum_scoremap.audit.schema import COMMIT, TABLES

__all__ = ["Shards", "write_json", "write_table", "write_whole"]


class Shards:
    """The tables of one audit.

    Args:
        folder: Where they lie.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> shards = Shards(Path(tempfile.mkdtemp()))
        >>> empty = {name: schema.empty_table() for name, schema in TABLES.items()}
        >>> shards.write(3, empty)
        >>> shards.finished()
        [3]
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, table: str, number: int) -> Path:
        """Return the file of one shard of one table."""
        return self.folder / table / f"{number:05d}.parquet"

    def finished(self) -> list[int]:
        """Return the numbers of the shards that are done, ascending."""
        return sorted(int(path.stem) for path in (self.folder / COMMIT).glob("[0-9]*.parquet"))

    def write(self, number: int, tables: Mapping[str, pa.Table]) -> None:
        """Put one shard in place.

        Raises:
            OSError: If the disk is full or the folder cannot be written; shards that are done stay as they
                are.
        """
        for name in TABLES:
            write_table(self.path(name, number), tables[name])

    def read(self, table: str, number: int) -> pa.Table:
        """Return one shard of one table."""
        return pq.ParquetFile(self.path(table, number)).read()

    def each(self, table: str) -> Iterator[tuple[int, pa.Table]]:
        """Number and content of every finished shard of one table, ascending; one in memory at a time."""
        for number in self.finished():
            yield number, self.read(table, number)

    def table(self, name: str) -> pa.Table:
        """Return all finished shards of one table in one."""
        parts = [part for _, part in self.each(name)]
        return pa.concat_tables(parts) if parts else TABLES[name].empty_table()

    def clear_leftovers(self) -> None:
        """Remove what a killed run left: half-written files, and parts of shards that are not done."""
        done = set(self.finished())
        for name in TABLES:
            for path in (self.folder / name).glob("*"):
                if path.name.startswith(".") or (path.suffix == ".parquet" and int(path.stem) not in done):
                    path.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    with _explained(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all."""
    with _explained(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path``, flushed to the disk, if nothing goes wrong."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        if os.name == "posix":
            _flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    """Turn an error on writing into a message that says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"out must be a folder with space to write; {what} could not be written there "
            f"({error.strerror or error}). What is done stays readable: make room, then go on with resume",
            str(folder),
        ) from error
