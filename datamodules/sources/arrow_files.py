"""Readers of the rows of .parquet and .arrow files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import UserError
from datamodules.sources.json_files import first_line
from datamodules.sources.report import BadRow

ROWS_PER_BATCH = 1024


def parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (row number from 1, row). Raises UserError for a damaged file or repeated column names."""
    try:
        file = pq.ParquetFile(path)
        _check_names(file.schema_arrow, path)
        yield from arrow_rows(file.iter_batches(ROWS_PER_BATCH))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)}): write it anew.") from error


def arrow_file_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (row number from 1, row) of an Arrow file or of an Arrow stream, which `datasets` writes.

    Raises UserError for a damaged file or repeated column names.
    """
    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                _check_names(file.schema, path)
                batches: Iterable[pa.RecordBatch] = (file.get_batch(n) for n in range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
                _check_names(batches.schema, path)  # type: ignore[attr-defined]
            yield from arrow_rows(batches)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Arrow ({first_line(error)}): write it anew.") from error


def arrow_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, object]]:
    """Yield (row number from 1, row) of Arrow batches; a row with invalid UTF-8 is a BadRow."""
    number = 0
    for batch in batches:
        try:
            values: list[object] = batch.to_pylist()
        except UnicodeDecodeError:  # find out which rows
            values = [_one_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
        for value in values:
            number += 1
            yield number, value


def _one_row(batch: pa.RecordBatch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("invalid UTF-8")


def _check_names(schema: pa.Schema, path: Path) -> None:
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{path}: two columns have the same name; rename one.")
