"""Label columns: which of them hold values that fit one Arrow column, and which are kept as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def label_kind(value: object) -> str:
    """The name of a value's type, as far as it matters for a column."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "big integer"
    return type(value).__name__


def kept_as_text(kinds: Iterable[str]) -> bool:
    """Whether values of these kinds fit no one Arrow column."""
    present = set(kinds) - {"NoneType"}
    return not (present <= {"int", "float"} or (len(present) == 1 and "big integer" not in present))


def as_text(value: object) -> object:
    """The value of a column that is kept as text."""
    return None if value is None else str(value)


def make_room(labels: Mapping[str, T], added: Iterable[str]) -> dict[str, T]:
    """`labels`, where a column of the data that has the name of an `added` one is called `<name>_in_data`."""
    names = set(added)
    return {f"{name}_in_data" if name in names else name: values for name, values in labels.items()}
