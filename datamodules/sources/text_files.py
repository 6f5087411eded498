"""Readers of text files of rows: JSON (one object per line, or an array of objects) and tables of cells."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from app.core.errors import UserError
from datamodules.sources.rows import BadRow, Cell

_NO_VALUE = {"", "nan", "NaN", "<NA>", "#N/A"}  # an empty cell, as pandas and spreadsheets write it


def jsonl_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number from 1, value of the line, or a BadRow if it cannot be read).

    Raises UserError for damaged gzip.
    """
    number = 0
    try:
        for number, line in enumerate(file, 1):
            if line.strip():  # a blank line is no row
                yield number, _json_value(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except EOFError:
        yield number + 1, BadRow("truncated gzip", "the compressed file ends early")
    except (gzip.BadGzipFile, zlib.error) as error:
        raise damaged_gzip(path, error) from error


def json_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, object]]:
    """Yield (number from 1, value) of each element of an array, or of each line of a file with an object per line.

    Raises UserError for a broken array, because the rows after the fault cannot be separated.
    """
    text = whole_text(file, path)
    rows: object = None
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        start = text.lstrip()[:1]
        if start == "{":  # reading line by line shows which lines are bad
            yield from (
                (number, _json_value(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()
            )
            return
        if start == "[":
            raise UserError(f"{path} is bad JSON ({first_line(error)}): mend it there.") from error
    if isinstance(rows, dict) and not (len(rows) == 1 and isinstance(next(iter(rows.values())), list)):
        rows = [rows]  # {"data": [{…}, …]} is a wrapper, not a row
    if not isinstance(rows, list):
        raise UserError(
            f"{path} is neither an array of rows ([{{…}}, {{…}}]) nor one row a line: write it as one of these."
        )
    yield from enumerate(rows, 1)


def csv_rows(file: IO[bytes], path: Path, delimiters: str = ",;\t") -> Iterator[tuple[int, object]]:
    """Yield (first line of the row, its cells by column name, or a BadRow if their number is wrong).

    The first line has the column names, and the delimiter that gives it most cells is taken. A cell without a value
    is None. Raises UserError for an unclosed quotation mark, after which rows cannot be separated, and for repeated
    column names.
    """
    text = whole_text(file, path)
    csv.field_size_limit(sys.maxsize)

    def width(mark: str) -> int:
        return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), []))

    quotes, begin = 0, 1  # quotation marks in the row that is being read, and its first line

    def lines() -> Iterator[str]:
        nonlocal quotes
        for line in io.StringIO(text, newline=""):
            quotes += line.count('"')
            yield line

    reader = csv.reader(lines(), delimiter=max(delimiters, key=width), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            first, begin = begin, reader.line_num + 1
            odd, quotes = quotes % 2, 0
            if odd:
                raise UserError(
                    f'{path}, line {first}: a quotation mark lacks its partner: mend it, by "" for one in a text.'
                )
            if cells and not names:
                names = [name.strip() or f"column {number}" for number, name in enumerate(cells, 1)]
                refuse_same_names(names, path)
            elif len(cells) == len(names):
                yield first, {n: None if c in _NO_VALUE else Cell(c) for n, c in zip(names, cells, strict=True)}
            elif cells:  # a blank line is no row
                yield first, BadRow("wrong number of cells", f"{len(cells)} instead of {len(names)}")
    except csv.Error as error:
        raise UserError(
            f"{path}, in the row that begins in line {begin}: {error}; mend its quotation marks."
        ) from error


def refuse_same_names(names: list[str], path: Path) -> None:
    """Raise UserError if two columns have the same name."""
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name; rename one.")


def whole_text(file: IO[bytes], path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 if it begins with that byte order mark, without the mark.

    Raises UserError with the line of invalid text, or for damaged gzip.
    """
    try:
        data = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged_gzip(path, error) from error
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}, is not UTF-8: save the file in UTF-8.") from error


def damaged_gzip(path: Path, error: Exception) -> UserError:
    """Return the error for damaged gzip: after a failed checksum, no row can be trusted."""
    return UserError(f"{path} is damaged gzip ({error}): its rows cannot be trusted; fetch it again.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _json_value(line: bytes | str) -> object:
    try:
        return json.loads(line if isinstance(line, str) else line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return BadRow("invalid UTF-8")
    except (ValueError, RecursionError) as error:  # a number that is too long raises another ValueError
        return BadRow("bad JSON", first_line(error))


def _object(fields: list[tuple[str, object]]) -> dict[str, object] | BadRow:
    """Return an object, or a BadRow if it or one within it repeats a name, because either value may be meant."""
    row = dict(fields)
    inner = [one for value in row.values() for one in (value if isinstance(value, list) else [value])]
    bad = next((one for one in inner if isinstance(one, BadRow)), None)
    return BadRow("repeated field") if len(row) < len(fields) else bad or row
