"""Label columns: those whose values fit one Arrow column keep their types, the others are kept as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def label_kind(value: object) -> str:
    """Return the name of a value's type; an integer beyond 64 bits is a "big integer"."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "big integer"
    return type(value).__name__


def kept_as_text(kinds: Iterable[str]) -> bool:
    """Return whether values of these kinds do not fit one Arrow column and are kept as text."""
    present = set(kinds) - {"NoneType"}
    return not (present <= {"int", "float"} or (len(present) == 1 and "big integer" not in present))


def as_text(value: object) -> object:
    """Return a value for a column that is kept as text: None stays None."""
    return None if value is None else str(value)


def make_room(labels: Mapping[str, T], added: Iterable[str]) -> dict[str, T]:
    """Return `labels` with every name that is also in `added` changed to `<name>_in_data`."""
    names = set(added)
    return {f"{name}_in_data" if name in names else name: values for name, values in labels.items()}
