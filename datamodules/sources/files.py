"""Local files as a source of rows; the suffix of a name decides how a file is read."""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from app.cache import fingerprint
from app.errors import UserError
from app.files import file_hash
from datamodules.sources.arrow_files import arrow_file_rows, parquet_rows
from datamodules.sources.json_files import json_rows, jsonl_rows
from datamodules.sources.tables import csv_rows, tsv_rows

log = logging.getLogger(__name__)

Rows = Iterator[tuple[int, object]]
_TEXT: dict[str, Callable[[IO[bytes], Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}
_BINARY: dict[str, Callable[[Path], Rows]] = {".parquet": parquet_rows, ".arrow": arrow_file_rows}
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), *_BINARY)


def readable(path: str | Path) -> bool:
    """Return whether a file's name has the suffix of a known kind."""
    return str(path).lower().endswith(SUFFIXES)


class LocalFiles:
    """A source of rows that reads one or several files in order.

    Raises UserError for a file that does not exist or is of no known kind.
    """

    def __init__(self, paths: Sequence[Path], name: str | None = None) -> None:
        self.name = name or paths[0].name
        front = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        prefix = f"{self.name}/" if name else ""
        self.places = {path: prefix + path.absolute().relative_to(front).as_posix() for path in paths}
        for path in paths:
            if not path.is_file():
                raise UserError(f"There is no file {path}: check the path that you gave.")
            if not readable(path):
                raise UserError(f"{path} is of no known kind: data.path takes {', '.join(SUFFIXES)}, or a Hub id.")

    def fingerprint(self) -> str:
        """Return a hash of the bytes of a single file, or of the names and bytes of several."""
        hashes = [file_hash(path) for path in self.places]
        places = list(self.places.values())
        return hashes[0] if places == [self.name] else fingerprint([places, hashes])

    def rows(self) -> Iterator[tuple[str, object]]:
        """Yield (file and line or row number from 1, value of the row, or a BadRow if it cannot be read)."""
        for path, place in self.places.items():
            for number, row in _rows(path):
                yield f"{place}:{number}", row


def _rows(path: Path) -> Rows:
    name = path.name.lower()
    packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    try:
        if suffix in _BINARY:
            yield from _BINARY[suffix](path)
        else:
            with gzip.open(path, "rb") if packed else open(path, "rb") as file:
                yield from _TEXT[suffix](file, path)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): check the path that you gave."
        ) from error
