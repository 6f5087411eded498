"""Rows of a local file: JSON lines (plain or gzip) and parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import UserError
from app.files import file_hash
from datamodules.sources.report import BadRow

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_ROWS_PER_BATCH = 1024


class LocalFile:
    """A .jsonl, .jsonl.gz or .parquet file as a source of rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        if not path.is_file():
            raise UserError(f"There is no file {path}: check the path that you gave.")

    def fingerprint(self) -> str:
        """A hash of the file's bytes."""
        return file_hash(self.path)

    def rows(self) -> Iterator[tuple[int, object]]:
        """Pairs (line or row number from 1, the row's value), the value a BadRow where it cannot be read."""
        return _parquet_rows(self.path) if self.name.endswith(".parquet") else _jsonl_rows(self.path)


def arrow_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, object]]:
    """Rows of Arrow batches, numbered from 1; one that holds broken text is a BadRow."""
    number = 0
    for batch in batches:
        try:
            values: list[object] = batch.to_pylist()
        except UnicodeDecodeError:  # find out which rows
            values = [_one_arrow_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
        for value in values:
            number += 1
            yield number, value


def _one_arrow_row(batch: pa.RecordBatch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("invalid UTF-8")


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns have the same name; rename one.")
        yield from arrow_rows(file.iter_batches(_ROWS_PER_BATCH))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({_first_line(error)}): write it anew.") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    number = 0
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():  # a blank line is no row
                    yield number, _json_value(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except EOFError:
        yield number + 1, BadRow("truncated gzip", "the compressed file ends early")
    except (gzip.BadGzipFile, zlib.error) as error:
        # no choice to skip: a failed checksum says that earlier rows may be wrong too, not which
        raise UserError(f"{path} is damaged gzip ({error}): its rows cannot be trusted; fetch it again.") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): check the path that you gave."
        ) from error


def _open_bytes(path: Path) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def _json_value(line: bytes) -> object:
    try:
        return json.loads(line.decode(), object_pairs_hook=_unique_fields)
    except UnicodeDecodeError:
        return BadRow("invalid UTF-8")
    except BadRow as bad:
        return bad
    except (ValueError, RecursionError) as error:  # too long a number is a ValueError of its own
        return BadRow("bad JSON", _first_line(error))


def _unique_fields(fields: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose names differ: which of two values was meant cannot be known."""
    row = dict(fields)
    if len(row) < len(fields):
        raise BadRow("repeated field")
    return row


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
