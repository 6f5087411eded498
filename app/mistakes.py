"""What a library's exception means to a user: one sentence, or nothing where it is a defect of the program."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
MISPLACED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def plain_sentence(error: BaseException) -> str | None:
    """The mistake behind `error` and its cure, or None: then a traceback is what helps."""
    text = str(error)
    if "loading state_dict" in text or "loaded state dict" in text:
        return "--ckpt_path: the checkpoint is of another model or optimizer than the configuration names."
    for cause in causes(error):
        if isinstance(cause, UserError):  # raised while jsonargparse built an object, and wrapped by it
            return str(cause)
        if isinstance(cause, MisconfigurationException):
            return first_line(cause)
        if isinstance(cause, ModuleNotFoundError):
            return f"A package is missing, install it first: {first_line(cause)}"
        if isinstance(cause, OSError) and cause.errno in FULL | FORBIDDEN | MISPLACED:
            return _about_the_disk(cause)
    return None


def first_line(error: BaseException) -> str:
    """The first line of its text, or its type where it has none."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith((".", "!", "`")) else f"{line}."


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it was raised from, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _about_the_disk(error: OSError) -> str:
    place = str(error.filename or "A file")
    if error.errno in FULL:
        return f"{place} could not be written, there is no space left: free some, or write to another disk."
    if error.errno in MISPLACED:
        return f"{place}: {error.strerror}; check the paths that you gave."
    return (
        f"{place} may not be read or written here ({error.strerror}): choose another place or mend its permissions."
    )
