"""Translation of library exceptions to one sentence for the user, unless they show a defect of the program."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.cli import options
from app.core.errors import UserError
from app.method.ranges import Number, refuse

F = TypeVar("F", bound=Callable[..., Any])
# errors of the disk → the sentence for them, with the file and the system's reason
DISK = {
    "ENOSPC EDQUOT EFBIG": "{0} could not be written, there is no space left: free some, or write to another disk.",
    "EACCES EPERM EROFS": "{0} may not be read or written ({1}): choose another place or other permissions.",
    "ENOENT ENOTDIR EISDIR EEXIST": "{0}: {1}; check the paths that you gave.",
}
PARTS = {"datamodules": "data", "lightning_modules": "model", "callbacks": "a callback"}
# library code that raises errors about a user's options → the part of the configuration with these options
CONFIGURED = {
    "lightning/pytorch/callbacks/": "trainer.callbacks",
    "lightning/pytorch/loggers/": "trainer.logger",
    "lightning/pytorch/profilers/": "trainer.profiler",
    "torch/optim/lr_scheduler.py": "model.lr_scheduler",
}
TRACE = " (BETA_DPO_TRACEBACK=1 shows the traceback.)"


def plain_sentence(error: BaseException) -> str | None:
    """Return the user's mistake that caused `error` and its cure; None if a traceback helps more."""
    text = str(error)
    if "loading state_dict" in text or "loaded state dict" in text:
        return "--ckpt_path: the checkpoint is of another model or optimizer than the configuration names."
    for cause in causes(error):
        if isinstance(cause, UserError):  # raised while jsonargparse built an object, and wrapped by it
            return str(cause)
        if isinstance(cause, MisconfigurationException):
            return f"trainer: {options.reason(cause)}"
        if isinstance(cause, ModuleNotFoundError):
            return f"A package is missing, install it first: {options.reason(cause)}"
        for names, told in DISK.items():
            if isinstance(cause, OSError) and errno.errorcode.get(cause.errno or 0) in names.split():
                return told.format(cause.filename or "A file", cause.strerror)
    frames = traceback.extract_tb(error.__traceback__)
    if frames and isinstance(error, (ValueError, TypeError, RuntimeError)):
        for place, part in CONFIGURED.items():
            if place in frames[-1].filename and (frames[-1].line or "").startswith("raise"):  # on purpose
                return f"{part}: {options.reason(error)}{TRACE}"
    return None


@contextmanager
def refusing(doing: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn any exception in the block, as a mistake in the configuration, into a UserError.

    Exceptions with a `plain_sentence` pass unchanged, and so does any while `unless()` is true.
    `BETA_DPO_TRACEBACK=1` shows where an exception came from.
    """
    options.refusals.clear()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if unless() or plain_sentence(error) is not None:
            raise
        if options.refusals:
            raise options.refusals[-1] from error
        raise UserError(f"{doing} failed in {part_of(error)}: {options.reason(error)}{TRACE}") from error


def part_of(error: BaseException) -> str:
    """Return the part of the configuration that an exception came from, by the innermost frame in our packages."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for package, part in PARTS.items():
            if f"/{package}/" in frame.filename and "site-packages" not in frame.filename:
                return part
    return "the Trainer"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error`, its cause, the cause of that, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def checked_command(function: F) -> F:
    """Return the command with the checks of the command line, for calls from Python, which may give a `Path`."""
    parameters, hints = signature(function), cache(lambda: get_type_hints(function))

    @wraps(function)
    def checking(*words: Any, **options: Any) -> Any:
        given = parameters.bind(*words, **options)
        for name, value in given.arguments.items():
            value = [_as_text(one) for one in value] if isinstance(value, list) else _as_text(value)
            try:
                refuse(name, hints()[name], value)
            except ValueError as error:
                raise UserError(f"{error}.") from None
            if value == "" or value == [""]:
                raise UserError(f"{name} is empty: give a value.")
            if not _fits(hints()[name], value):
                wanted = parameters.parameters[name].annotation
                raise UserError(f"{name} must be {wanted}, not {value!r:.60}.")
            given.arguments[name] = value
        return function(*given.args, **given.kwargs)

    return checking  # type: ignore[return-value]


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value has the type of an annotation; `refuse` has looked at numbers and words."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_fits(parts[0], one) for one in value)
    if kind is Literal:
        return value in parts
    return isinstance(value, (int, float) if issubclass(kind, Number) else kind)
