"""The exceptions for a user's mistake, the reason that any other gives, and how the command ends with either."""

import os
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from textwrap import shorten
from types import MappingProxyType
from typing import NoReturn

RESUME = "With --ckpt_path last, the command resumes from the last checkpoint in its log folder, if there is one."


class UserError(Exception):
    """A mistake that the user can correct; its text is one sentence with the file, line or field and the cure."""


class StepRefused(UserError):
    """The exception for a step refused, on every rank, before it changed weights, optimizer or callbacks."""


def leave(sentence: str, status: int = 2) -> NoReturn:
    """End the command with `sentence`; BETA_DPO_TRACEBACK=1 shows the traceback of a mistake, status 2."""
    if status == 2 and os.environ.get("BETA_DPO_TRACEBACK"):
        traceback.print_exc()
    print(f"beta-dpo: {sentence}", file=sys.stderr)
    sys.exit(status)


def suggestion(word: str, known: Collection[str], dashes: str = "") -> str:
    """Return ` Did you mean …?` with the nearest known word, or an empty text."""
    # trainer.num_nodes, which holds the whole word `nodes`, is nearer than a name of similar letters
    near = [one for one in known if (last := one.rpartition(".")[2]) == word or word in last.split("_")]
    near = near or get_close_matches(word, known, 1, 0.6)
    near = near or [one for one in known if one.startswith(word) or word.startswith(one)]
    return f" Did you mean {dashes}{near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Raise the block's UserError with other names of options (ours → those of the command that the user runs)."""
    try:
        yield
    except UserError as error:
        said = str(error)
        for ours, theirs in names.items():
            said = said.replace(ours, theirs)
        raise UserError(said) from error


@contextmanager
def refused(what: str, known: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Raise UserError with the reason for any exception in the block, because damaged files may raise anything.

    `known`: a word in the text of an exception → the reason to give for it.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        text = str(error)
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        said = shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300)
        said = said if " " in said else f"{type(error).__name__} {said}"
        said = next((reason for word, reason in known.items() if word in text), said)
        raise UserError(f"{what}: {said}") from error
