"""Readers of the rows of .csv and .tsv files, whose first line holds the column names."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from app.errors import UserError
from datamodules.sources.json_files import whole_text
from datamodules.sources.report import BadRow
from datamodules.sources.values import Cell

_MISSING = {"", "nan", "NaN", "<NA>", "#N/A"}  # an empty cell, as written by pandas and spreadsheets


def tsv_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, object]]:
    """Yield the rows of a file with tabs between the cells; see `csv_rows`."""
    csv.field_size_limit(sys.maxsize)
    return table_rows(whole_text(file, path), path, "\t")


def csv_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, object]]:
    """Yield (first line of the row, its cells by column name, or a BadRow if their number is wrong).

    The delimiter is the comma, semicolon or tab, whichever gives the first line most cells. A cell without a value
    is None. Raises UserError for an unclosed quotation mark, after which rows cannot be separated, and for repeated
    column names.
    """
    text = whole_text(file, path)
    csv.field_size_limit(sys.maxsize)
    delimiter = max(
        ",;\t", key=lambda mark: len(next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), []))
    )
    return table_rows(text, path, delimiter)


def table_rows(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, object]]:
    """Yield the rows of a table; see `csv_rows`."""
    lines = _CountedLines(text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            begin, lines.quotes, quotes = reader.line_num + 1, 0, lines.quotes
            first = lines.first
            lines.first = begin
            if quotes % 2:
                raise UserError(
                    f'{path}, line {first}: a quotation mark lacks its partner: mend it, by "" for one in a text.'
                )
            if not cells:  # a blank line is no row
                continue
            if names is None:
                names = _names(cells, path)
            elif len(cells) != len(names):
                yield first, BadRow("wrong number of cells", f"{len(cells)} instead of {len(names)}")
            else:
                yield first, {n: None if c in _MISSING else Cell(c) for n, c in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise UserError(
            f"{path}, in the row that begins in line {begin}: {error}; mend its quotation marks."
        ) from error


def _names(cells: list[str], path: Path) -> list[str]:
    names = [name.strip() or f"column {number}" for number, name in enumerate(cells, 1)]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name; rename one.")
    return names


class _CountedLines:
    """An iterator over the lines of a text that counts quotation marks since `quotes` was last set to 0."""

    def __init__(self, text: str) -> None:
        self._lines = io.StringIO(text, newline="")
        self.quotes = 0
        self.first = 1  # first line of the row that is being read

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.quotes += line.count('"')
            yield line
