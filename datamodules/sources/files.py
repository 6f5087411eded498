"""Rows of local files: JSON (an object per line, or an array of objects), tables of cells, text, parquet, Arrow."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, tee
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from app.core.cache import fingerprint
from app.core.errors import UserError, first_line
from app.core.files import file_hash, refuse_pointers
from datamodules.records import BadRow, Cell

log = logging.getLogger(__name__)

Rows = Iterator[tuple[int, object]]
_LARGE = 2**28  # characters
_DELIMITER_NAMED = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_NO_VALUE = {"", "nan", "NaN", "<NA>", "#N/A"}  # an empty cell, as pandas and spreadsheets write it
ROWS_PER_BATCH = 1024


def jsonl_rows(file: IO[bytes], path: Path) -> Rows:
    """Yield (line number from 1, value of the line, or a BadRow if it cannot be read)."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if number == 1 and (line.startswith(b"[") or line.strip() == b"{"):
            yield number, BadRow("no object in one line", "if the whole file is JSON, name it .json")
        elif line.strip():  # a blank line is no row
            yield number, _json_value(line)


def txt_rows(file: IO[bytes], path: Path) -> Rows:
    """Return (line number from 1, a row whose `text` is the line); a blank line is no row."""
    lines = enumerate(text_lines(file, path), 1)
    return ((number, {"text": line.rstrip("\r\n")}) for number, line in lines if line.strip())


def json_rows(file: IO[bytes], path: Path) -> Rows:
    """Return (number from 1, value) of the elements of an array (UserError if it is broken), or of the lines."""
    text = "".join(text_lines(file, path))
    if len(text) > _LARGE:
        log.warning("%s takes about four times its size of memory: .jsonl, an object per line, takes none", path)
    rows: object = None
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):  # reading line by line shows which lines are bad
            lines = enumerate(text.split("\n"), 1)
            return ((number, _json_value(line)) for number, line in lines if line.strip())
        if text.lstrip().startswith("["):
            raise UserError(f"{path} is bad JSON ({first_line(error)}): correct it there.") from error
    if isinstance(rows, BadRow) or (isinstance(rows, dict) and any(map(_is_of_a_row, rows.values()))):
        rows = [rows]
    if not isinstance(rows, list):
        raise UserError(
            f"{path} is neither an array of rows ([{{…}}, {{…}}]) nor one row a line: write it as one of these "
            '(pandas does with orient="records").'
        )
    return enumerate(rows, 1)


def _is_of_a_row(field: object) -> bool:
    """Return whether a field tells a row from a wrapper or a table by columns: it is a value, or holds messages."""
    first = field[0] if isinstance(field, list) and field else field
    if isinstance(first, dict):
        return "role" in first or "from" in first
    return not isinstance(field, list)


def csv_rows(file: IO[bytes], path: Path, delimiters: str = ",;\t") -> Rows:
    """Yield (first line of the row, its cells by column name, or a BadRow if they are wrong).

    The delimiter that gives the first row, the column names, most cells is taken; Excel may name one in a line
    before (`sep=;`). Raises UserError for faults after which rows cannot be separated.
    """
    csv.field_size_limit(sys.maxsize)
    named, text, *ahead = tee(text_lines(file, path), 2 + len(delimiters))
    excel = _DELIMITER_NAMED.fullmatch(next(named, ""))
    delimiters = excel[1] if excel else delimiters
    readers = [csv.reader(one, delimiter=mark) for one, mark in zip(ahead, delimiters, strict=False)]
    widths = [len(next(filter(None, reader), [])) for reader in readers]
    del named, ahead, readers  # or they would keep the lines
    raw: list[str] = []  # the lines of the row that is being read
    begin = 1  # its first line

    def lines() -> Iterator[str]:
        for line in text:
            raw.append(line)
            yield line

    delimiter = delimiters[widths.index(max(widths))]
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            first, begin = begin, reader.line_num + 1
            written = "".join(raw)
            raw.clear()
            if written.count('"') % 2:
                raise UserError(
                    f'{path}, line {first}: a quotation mark is not closed: close it, or write "" for one in text.'
                )
            if not cells or (excel and first == 1):  # a blank line is no row
                continue
            if not names:
                names = [name.strip() or f"column {number}" for number, name in enumerate(cells, 1)]
                _refuse_same_names(names, path)
            elif any(
                c[:1].isspace() and c.lstrip()[:1] == '"' and delimiter + c in delimiter + written for c in cells
            ):
                # the format reads such marks as text, and a delimiter between them as the end of the cell
                yield first, BadRow("a space before a quotation mark", "begin the cell with the mark")
            elif len(cells) == len(names):
                yield first, {n: None if c in _NO_VALUE else Cell(c) for n, c in zip(names, cells, strict=True)}
            else:
                yield first, BadRow("wrong number of cells", f"{len(cells)} instead of {len(names)}")
    except csv.Error as error:
        raise UserError(
            f"{path}, in the row that begins in line {begin}: {error}; correct its quotation marks."
        ) from error


def _refuse_same_names(names: list[str], path: Path) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name; rename one.")


def text_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    """Yield the lines, with their ends, of a text in UTF-8, or UTF-16 with its mark. UserError names a bad line."""
    number = 1
    try:
        start = file.peek(2)  # type: ignore[attr-defined]  # files of gzip and of the disk are buffered
        encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        if b"\0" in start and (encoding == "utf-8-sig" or start.startswith(b"\xff\xfe\0\0")):
            raise UserError(f"{path} holds zero bytes, as UTF-16 without its mark and UTF-32 do: save it in UTF-8.")
        for line in io.TextIOWrapper(file, encoding, newline=""):
            yield line
            number += 1
    except UnicodeDecodeError as error:
        number += error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {number}, is not UTF-8: save the file in UTF-8.") from error


def _json_value(line: bytes | str) -> object:
    try:
        return json.loads((line if isinstance(line, str) else line.decode()).rstrip(), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return BadRow("invalid UTF-8", "save the file in UTF-8")
    except (ValueError, RecursionError) as error:  # a number that is too long raises another ValueError
        return BadRow("bad JSON", first_line(error).replace("line 1 ", ""))


def _object(fields: list[tuple[str, object]]) -> dict[str, object] | BadRow:
    """Return an object, or a BadRow if it or one within it repeats a name, because either value may be meant."""
    row = dict(fields)
    inner = [one for value in row.values() for one in (value if isinstance(value, list) else [value])]
    repeated = len(row) < len(fields) or any(isinstance(one, BadRow) for one in inner)
    return BadRow("repeated field") if repeated else row


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
        why = error.strerror or error
        raise UserError(f"{path} cannot be read ({why}): check the path that you gave.") from error


def _binary_rows(path: Path) -> Rows:
    """Yield the rows of a parquet file, an Arrow file, or an Arrow stream (which `datasets` writes)."""
    kind = "parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    batches: Iterable[pa.RecordBatch]
    try:
        if kind == "parquet":
            file = pq.ParquetFile(path)
            batches = file.iter_batches(ROWS_PER_BATCH)
        else:
            source = pa.OSFile(str(path))  # in a map, a read past the end of a cut file ends the process
            try:
                file = pa.ipc.open_file(source)
                batches = map(file.get_batch, range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = file = pa.ipc.open_stream(source)
        schema = file.schema_arrow if kind == "parquet" else file.schema
        _refuse_same_names(schema.names, path)
        yield from arrow_rows(batches)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as {kind} ({first_line(error)}): write it again.") from error


def arrow_rows(batches: Iterable[pa.RecordBatch]) -> Rows:
    """Yield (row number from 1, row) of Arrow batches; a row with invalid UTF-8 is a BadRow."""
    return enumerate(chain.from_iterable(map(_values, batches)), 1)


def _values(batch: pa.RecordBatch) -> list[object]:
    for column in batch.columns:  # damaged offsets would end the process, invalid UTF-8 not
        column.view(_as_bytes(column.type)).validate(full=True)
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [BadRow("invalid UTF-8")]
        return [value for index in range(len(batch)) for value in _values(batch.slice(index, 1))]


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type with texts as bytes, in lists and structs too: Arrow validates the texts of all rows."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(_as_bytes(kind.value_type))
    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)
