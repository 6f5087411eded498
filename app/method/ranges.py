"""The types of numeric options, for the command line and, in `checked` classes, for Python.

All exclude NaN and, but for `UpToInfinity`, infinity and numbers so large that they are typing errors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, wraps
from inspect import signature
from operator import index
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

LARGEST = {int: 10**12, float: 1e9}
LARGEST_SEED = 2**32 - 1  # NumPy's limit
C = TypeVar("C", bound=type)


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether `value` is a number that a float holds, so no truth value, NaN, infinity or larger integer."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class _Named(type):
    """A class that shows as its name alone, as in `--help`."""

    def __repr__(cls) -> str:
        return cls.__name__


class Number(metaclass=_Named):
    """The base of the types below, which read a number or raise ValueError."""

    base: type  # of the values
    allowed: str  # the range in words
    within: Callable[[Any], bool]  # whether a number of the type `base` lies in the range

    def __new__(cls, value: Any) -> Any:
        """Return `value` as a number of this type. Raises ValueError if that is not possible."""
        number = value
        try:
            if not isinstance(value, (bool, cls.base)):
                number = index(value) if cls.base is int and not isinstance(value, str) else cls.base(value)
        except (ValueError, TypeError, OverflowError):
            number = None
        if isinstance(number, bool) or not isinstance(number, cls.base) or not cls.within(number):
            raise ValueError(f"must be {cls.allowed}, not {value!r:.60}")
        return number

    @classmethod
    def holds(cls, value: Any) -> bool:
        return type(value) is cls.base and cls.within(value)


def _numbers(base: type, name: str, allowed: str, within: Callable[[Any], bool]) -> type[Number]:
    kind = f"a {'whole' if base is int else 'finite'} number"
    if not allowed.startswith("in"):
        allowed = f"{allowed}, up to {LARGEST[base]:g}".removeprefix(", ")
    bounded = staticmethod(lambda number: bool(abs(number) <= LARGEST[base] and within(number)))
    fields = {"base": base, "allowed": f"{kind} {allowed}", "within": bounded, "__doc__": kind}
    return type(name, (Number,), fields)


if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    AtLeastTwo: TypeAlias = int
    FromMinusOne: TypeAlias = int
    Seed: TypeAlias = int
    FiniteFloat: TypeAlias = float
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    FactorFromOne: TypeAlias = float
    UpToInfinity: TypeAlias = float
    Share: TypeAlias = float
    PositiveShare: TypeAlias = float
    ShareBelowOne: TypeAlias = float
    ProperShare: TypeAlias = float
    ShareBelowHalf: TypeAlias = float
else:
    PositiveInt = _numbers(int, "PositiveInt", "from 1", lambda n: n >= 1)
    NonNegativeInt = _numbers(int, "NonNegativeInt", "from 0", lambda n: n >= 0)
    AtLeastTwo = _numbers(int, "AtLeastTwo", "from 2", lambda n: n >= 2)
    FromMinusOne = _numbers(int, "FromMinusOne", "from -1", lambda n: n >= -1)
    Seed = _numbers(int, "Seed", f"in [0, {LARGEST_SEED}]", lambda n: 0 <= n <= LARGEST_SEED)
    FiniteFloat = _numbers(float, "FiniteFloat", "", lambda x: True)
    PositiveFloat = _numbers(float, "PositiveFloat", "above 0", lambda x: x > 0)
    NonNegativeFloat = _numbers(float, "NonNegativeFloat", "from 0", lambda x: x >= 0)
    FactorFromOne = _numbers(float, "FactorFromOne", "from 1", lambda x: x >= 1)
    Share = _numbers(float, "Share", "in [0, 1]", lambda x: 0 <= x <= 1)
    PositiveShare = _numbers(float, "PositiveShare", "in (0, 1]", lambda x: 0 < x <= 1)
    ShareBelowOne = _numbers(float, "ShareBelowOne", "in [0, 1)", lambda x: 0 <= x < 1)
    ProperShare = _numbers(float, "ProperShare", "in (0, 1)", lambda x: 0 < x < 1)
    ShareBelowHalf = _numbers(float, "ShareBelowHalf", "in [0, 0.5)", lambda x: 0 <= x < 0.5)

    class UpToInfinity(Number):
        """A number from 0, infinity included."""

        base, allowed = float, "a number from 0, or .inf"
        within = staticmethod(lambda number: 0 <= number <= 1e15 or number == math.inf)


def checked(cls: C) -> C:
    """Make `cls(…)` raise ValueError for numbers and words that the annotations of its `__init__` do not allow."""
    init = cls.__init__  # type: ignore[misc]
    parameters = signature(init)
    hints = cache(lambda: get_type_hints(init))  # evaluated later: a module may still be loading

    @wraps(init)
    def checking(self: Any, *args: Any, **settings: Any) -> None:
        for name, value in parameters.bind(self, *args, **settings).arguments.items():
            refuse(f"{type(self).__name__}: {name}", hints().get(name), value)
        init(self, *args, **settings)

    cls.__init__ = checking  # type: ignore[misc]
    return cls


def refuse(what: str, hint: Any, value: Any) -> None:
    """Raise ValueError for a number or a word that the annotation `hint` does not allow."""
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(f"{what} must be one of {', '.join(map(str, get_args(hint)))}, not {value!r:.60}")
    kind = next(_kinds(hint), None)
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if kind is None or number is None or isinstance(number, str):  # belongs to another member of a union
            continue
        try:
            kind(number)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from None


def _kinds(hint: Any) -> Iterator[type[Number]]:
    if isinstance(hint, type) and issubclass(hint, Number):
        yield hint
    for part in get_args(hint):
        yield from _kinds(part)
