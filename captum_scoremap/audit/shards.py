"""Results on disk: shards of Parquet that are there whole or not at all.

A shard is one file in each table's folder, ``images/00003.parquet`` and so on. Every file is written under a
temporary name, flushed to the disk and renamed into place, ``images`` last; a shard without that file is not
done and is written anew. So a program killed at any moment loses at most the shard it was writing, and what is there
can be read at any time.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captum_scoremap.audit.schema import COMMIT, TABLES

if sys.platform != "win32":
    import fcntl

_STAMP = b"audit"
_LEFTOVER = re.compile(r"\..+\.parquet\.\d+")

__all__ = ["Shards", "write_json", "write_table", "write_whole"]


class Shards:
    """The tables of one audit.

    Args:
        folder: Where they lie.
        count: How many shards there are in all; files with higher numbers are none of them.
        stamp: What tells the results of one audit from those of another; written into each file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> shards = Shards(Path(tempfile.mkdtemp()))
        >>> empty = {name: schema.empty_table() for name, schema in TABLES.items()}
        >>> shards.write(3, empty)
        >>> shards.finished()
        [3]
    """

    def __init__(self, folder: Path, count: int | None = None, stamp: str = "") -> None:
        self.folder, self.count, self.stamp = folder, count, stamp

    def path(self, table: str, number: int) -> Path:
        """Return the file of one shard of one table."""
        return self.folder / table / f"{number:05d}.parquet"

    def finished(self) -> list[int]:
        """Return the numbers of the shards that are done, ascending."""
        numbers = (self._number(path) for path in (self.folder / COMMIT).glob("*.parquet"))
        return sorted(number for number in numbers if number is not None)

    def write(self, number: int, tables: Mapping[str, pa.Table]) -> None:
        """Put one shard in place.

        Raises:
            OSError: If the disk is full or the folder cannot be written; shards that are done stay as they
                are.
        """
        for name in TABLES:
            metadata = {**(tables[name].schema.metadata or {}), _STAMP: self.stamp.encode()}
            write_table(self.path(name, number), tables[name].replace_schema_metadata(metadata))

    def read(self, table: str, number: int) -> pa.Table:
        """Read one shard of one table.

        Args:
            table: Name of the table.
            number: Number of the shard.

        Returns:
            The rows.

        Raises:
            ValueError: If its file is damaged or gone.
        """
        path = self.path(table, number)
        try:
            return _read(path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"results must be whole, got {table}/{path.name} in {str(self.folder)!r}, which "
                f"{_reason(path, error)}. Go on with that audit by resume, which computes it anew."
            ) from error

    def each(self, table: str) -> Iterator[tuple[int, pa.Table]]:
        """Number and content of every finished shard of one table, ascending; one in memory at a time."""
        for number in self.finished():
            yield number, self.read(table, number)

    def table(self, name: str) -> pa.Table:
        """Return all finished shards of one table in one."""
        parts = [part for _, part in self.each(name)]
        return pa.concat_tables(parts).replace_schema_metadata() if parts else TABLES[name].empty_table()

    def count_images(self) -> int:
        """Return the number of images whose results are kept."""
        return sum(_read(self.path(COMMIT, number)).num_rows for number in self.finished())

    def clear_leftovers(self) -> None:
        """Remove what a killed run left: half-written files, and parts of shards that are not done."""
        done = set(self.finished())
        for name in TABLES:
            for path in (self.folder / name).glob("*"):
                number = self._number(path)
                if _LEFTOVER.fullmatch(path.name) or (number is not None and number not in done):
                    path.unlink(missing_ok=True)

    def mend(self, indices: Callable[[int], Sequence[int]]) -> list[str]:
        """Look at every finished shard, and take those out that are not whole, so that they are computed anew.

        Args:
            indices: Positions of the images of a shard.

        Returns:
            A line for each damaged file, and for each that is none of this audit's.
        """
        lines = []
        for number in self.finished():
            damage = self._damage(number, indices(number))
            if damage is not None:
                lines.append(damage)
                self.path(COMMIT, number).unlink(missing_ok=True)
        for name in TABLES:
            for path in sorted((self.folder / name).glob("*")):
                if self._number(path) is None and not _LEFTOVER.fullmatch(path.name):
                    lines.append(f"{name}/{path.name} is no part of this audit and stays as it is")
        return lines

    def _number(self, path: Path) -> int | None:
        """Return the number of the shard that a file belongs to, by its name."""
        if not re.fullmatch(r"\d{5,}\.parquet", path.name) or (self.count is not None and int(path.stem) >= self.count):
            return None
        return int(path.stem)

    def _damage(self, number: int, indices: Sequence[int]) -> str | None:
        """Return what is wrong with a shard, or None."""
        found: dict[str, pa.Table] = {}
        for name in TABLES:
            path = self.path(name, number)
            try:
                found[name] = table = _read(path)
            except (OSError, pa.ArrowException) as error:
                return f"{name}/{path.name} {_reason(path, error)}"
            if not table.schema.equals(TABLES[name]):
                return f"{name}/{path.name} has other columns"
            if table.schema.metadata.get(_STAMP) != self.stamp.encode():
                return f"{name}/{path.name} is of another audit"
        images = found[COMMIT]
        good = images.filter(pc.is_null(images["error"]))["index"].to_pylist()
        if images["index"].to_pylist() != list(indices):
            return f"{COMMIT}/{self.path(COMMIT, number).name} has other images"
        for name in TABLES:
            if name != COMMIT and sorted(pc.unique(found[name]["index"]).to_pylist()) != good:
                return f"{name}/{self.path(name, number).name} has other images"
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other programs from writing to the folder; it is made if it is not there.

        Raises:
            ValueError: If another one does.
            OSError: If the folder cannot be made.
        """
        with _explained(self.folder, "audit.json"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":  # which locks no folders
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            # The system takes the lock off when the process ends, however it ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"out must be a folder that no other audit writes to, got {str(self.folder)!r}, where one is at work. "
                "Wait for its end, or choose another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            os.close(handle)


def _read(path: Path) -> pa.Table:
    with path.open("rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        return parquet.read()


def _reason(path: Path, error: Exception) -> str:
    """Return what is wrong with a file that cannot be read."""
    if not path.exists():
        return "is missing"
    return (
        "is empty" if path.is_file() and not path.stat().st_size else f"cannot be read ({str(error).splitlines()[0]})"
    )


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
        # Arrow takes no paths that are not Unicode, so that it is given a file.
        with _whole(path) as temporary, temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)


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
