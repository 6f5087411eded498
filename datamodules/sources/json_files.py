"""Rows of JSON: one object a line, or an array of objects."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from app.errors import UserError
from datamodules.sources.report import BadRow

_BLANK = " \t\r\n"


def jsonl_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number from 1, the value of the line, a BadRow where it cannot be read)."""
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
    """Yield (number of the element from 1, its value) of an array; a file of objects line by line is read as such.

    Raises UserError where the array is broken: what follows cannot be told apart any more.
    """
    text = whole_text(file, path)
    at = _after_blank(text, 0)
    if text[at : at + 1] == "{" and _is_lines(text[at:]):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _json_value(line.encode("utf-8", "surrogatepass"))
        return
    if text[at : at + 1] != "[":
        raise UserError(
            f"{path} is neither an array of rows ([{{…}}, {{…}}]) nor one row a line: write it as one of these."
        )
    at, number = _after_blank(text, at + 1), 0
    strict, lenient = json.JSONDecoder(object_pairs_hook=_unique_fields), json.JSONDecoder()
    while text[at : at + 1] != "]":
        number += 1
        try:
            value: object
            try:
                value, end = strict.raw_decode(text, at)
            except BadRow as bad:
                value, end = bad, lenient.raw_decode(text, at)[1]
            after = _after_blank(text, end)
            if text[after : after + 1] not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
            at = _after_blank(text, after + 1) if text[after] == "," else after
            if text[after] == "," and text[at : at + 1] == "]":
                raise json.JSONDecodeError("Nothing after the last ','", text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: row {number} is bad JSON ({first_line(error)}): mend the file from there on."
            ) from error
        yield number, value
    if _after_blank(text, at + 1) < len(text):
        raise UserError(f"{path} goes on after the end of its array: write one array, or one row a line.")


def whole_text(file: IO[bytes], path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 where it begins with that mark, without the mark.

    Raises UserError, naming the line.
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
    """Return what to say: a failed checksum means that earlier rows may be wrong too, not which."""
    return UserError(f"{path} is damaged gzip ({error}): its rows cannot be trusted; fetch it again.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_lines(text: str) -> bool:
    """Whether a text that begins with an object is one row, or rows line by line."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return True  # line by line it can be told which are bad
    # {"data": [{…}, …]}: a wrapper and no row
    wraps = len(value) == 1 and isinstance(next(iter(value.values())), list)
    return not wraps or _after_blank(text, end) < len(text)


def _after_blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANK:
        at += 1
    return at


def _json_value(line: bytes) -> object:
    try:
        return json.loads(line.decode(), object_pairs_hook=_unique_fields)
    except UnicodeDecodeError:
        return BadRow("invalid UTF-8")
    except BadRow as bad:
        return bad
    except (ValueError, RecursionError) as error:  # too long a number is a ValueError of its own
        return BadRow("bad JSON", first_line(error))


def _unique_fields(fields: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose names differ: which of two values was meant cannot be known."""
    row = dict(fields)
    if len(row) < len(fields):
        raise BadRow("repeated field")
    return row
