"""Checks and conversions of the values of a row's fields."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping

from datamodules.sources.report import BadRow

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_CONSTANTS: dict[str, object] = {"true": True, "false": False}


class Cell(str):
    """The text of a cell in an untyped file (.csv, .tsv); as a label or a choice it may be a number."""


def typed(value: object) -> object:
    """Return a cell as a number or truth value if it spells one, else as text; return other values unchanged."""
    if not isinstance(value, Cell):
        return value
    if _NUMBER.fullmatch(value):
        return float(value) if set(value) & set(".eE") else int(value)
    return _CONSTANTS.get(value.lower(), str(value))


def decoded(value: str) -> object:
    """Return the value of a text in JSON or in Python's syntax. Raises ValueError."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(str(error)) from error


def missing(value: object) -> bool:
    """Return whether a value is missing: null, or NaN, which means null in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def kind(value: object) -> str:
    """Return the name of a value's type, for a message."""
    return "null" if value is None else "text" if isinstance(value, str) else type(value).__name__


def text(value: object, name: str) -> str:
    """Return `value`, which must be valid text. `name` is its field. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer accepts
        raise BadRow("text is not valid Unicode", name) from None
    return str(value)


def field_of(row: Mapping[str, object], name: str) -> object:
    """Return the field `name`. Raises BadRow if the row lacks it."""
    if name not in row:
        raise BadRow("missing field", name)
    return row[name]


def number(row: Mapping[str, object], name: str) -> float:
    """Return the field `name`, which must be a finite number. Raises BadRow."""
    value = typed(field_of(row, name))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not a finite number")
    return value


def zero_or_one(row: Mapping[str, object], name: str) -> int:
    """Return the field `name`, which must be the integer 0 or 1. Raises BadRow."""
    value = typed(field_of(row, name))
    if isinstance(value, bool) or value not in (0, 1):
        raise BadRow("choice is neither 0 nor 1", f"{name} is {str(value)[:30]}")
    assert isinstance(value, (int, float))
    return int(value)


def spaced(value: object, name: str) -> str:
    """Return a response after exactly one space, which separates it from a prompt that ends with a colon."""
    return " " + text(value, name).lstrip()
