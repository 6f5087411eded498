"""Rows of local files: text, parquet and Arrow."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from app.core.cache import fingerprint
from app.core.errors import UserError, first_line
from app.core.files import file_hash, refuse_pointers
from datamodules.sources.rows import BadRow
from datamodules.sources.text_files import Rows, csv_rows, json_rows, jsonl_rows, refuse_same_names, txt_rows

ROWS_PER_BATCH = 1024

_TEXT: dict[str, Callable[[IO[bytes], Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiters="\t"),
    ".txt": txt_rows,
}
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet", ".arrow")


def readable(path: str | Path) -> bool:
    """Return whether a file's name has the suffix of a known kind."""
    return str(path).lower().endswith(SUFFIXES)


class LocalFiles:
    """A source of rows that reads one or several files in order. Raises UserError for a file of no known kind."""

    def __init__(self, paths: Sequence[Path], name: str | None = None) -> None:
        self.name = name or paths[0].name
        front = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        prefix = f"{self.name}/" if name else ""
        self.places = {path: prefix + path.absolute().relative_to(front).as_posix() for path in paths}
        for path in paths:
            if not readable(path):
                raise UserError(f"{path} is of no known kind: data.path takes {', '.join(SUFFIXES)}, or a Hub id.")
        refuse_pointers(*paths)

    def fingerprint(self) -> str:
        """Return a hash of the bytes of a single file, or of the names and bytes of several."""
        hashes = [file_hash(path) for path in self.places]
        places = list(self.places.values())
        return hashes[0] if places == [self.name] else fingerprint([places, hashes])

    def count(self) -> int | None:
        """Return the number of rows of parquet, or of lines; None if other kinds of files are among them."""
        count = 0
        try:
            for path in self.places:
                if path.suffix.lower() == ".parquet":
                    count += pq.read_metadata(path).num_rows
                elif path.suffix.lower() == ".jsonl":
                    with open(path, "rb") as file:
                        count += sum(1 for _ in file)
                else:
                    return None
        except (pa.ArrowException, OSError):
            return None  # reading the rows says what is wrong with the file
        return count or None

    def rows(self) -> Iterator[tuple[str, object]]:
        """Yield (file and line or row number from 1, value of the row, or a BadRow if it cannot be read)."""
        for path, place in self.places.items():
            for number, row in _rows(path):
                yield f"{place}:{number}", row


def _rows(path: Path) -> Rows:
    name = path.name.lower()
    try:
        if name.endswith((".parquet", ".arrow")):
            yield from _binary_rows(path)
            return
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
            yield from _TEXT[Path(name.removesuffix(".gz")).suffix](file, path)  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged gzip ({error}): its rows cannot be trusted; fetch it again.") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): check the path that you gave."
        ) from error


def _binary_rows(path: Path) -> Rows:
    """Yield the rows of a parquet file, an Arrow file, or an Arrow stream (which `datasets` writes)."""
    kind = "parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    batches: Iterable[pa.RecordBatch]
    try:
        if kind == "parquet":
            file = pq.ParquetFile(path)
            batches = file.iter_batches(ROWS_PER_BATCH)
        else:
            source = pa.memory_map(str(path))
            try:
                file = pa.ipc.open_file(source)
                batches = map(file.get_batch, range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = file = pa.ipc.open_stream(source)
        schema = file.schema_arrow if kind == "parquet" else file.schema
        refuse_same_names(schema.names, path)
        yield from arrow_rows(batches)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as {kind} ({first_line(error)}): write it again.") from error


def arrow_rows(batches: Iterable[pa.RecordBatch]) -> Rows:
    """Yield (row number from 1, row) of Arrow batches; a row with invalid UTF-8 is a BadRow."""
    return enumerate(chain.from_iterable(map(_values, batches)), 1)


def _values(batch: pa.RecordBatch) -> list[object]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [BadRow("invalid UTF-8")]
        return [value for index in range(len(batch)) for value in _values(batch.slice(index, 1))]
