"""The cache on disk: what took long is made once per machine, and by one process only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock

from app.errors import UserError

Kind = Literal["tables", "rewards", "references"]


def cache_root(kind: Kind) -> Path:
    """The folder of all entries of a kind: in the environment variable BETA_DPO_CACHE, or ~/.cache/beta-dpo."""
    return Path(os.environ.get("BETA_DPO_CACHE") or "~/.cache/beta-dpo").expanduser() / kind


def fingerprint(description: object) -> str:
    """A hash of JSON values that tell all that decides what is in an entry."""
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def locked_entry(kind: Kind, key: str) -> Iterator[Path]:
    """Yield the folder of an entry, which may not exist yet, while every other process that wants it waits.

    Raises UserError when the cache folder cannot be written.
    """
    root = cache_root(kind)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{key}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"The cache folder {root} cannot be written ({error.strerror or error}): set BETA_DPO_CACHE."
        ) from error
    try:
        yield root / key
    finally:
        lock.release()
