"""The cache on disk: what took long is made once per machine, and by one process only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from app.locks import locked

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
    with locked(*lock_of(kind, key)):
        yield cache_root(kind) / key


def lock_of(kind: Kind, key: str) -> tuple[Path, str, str]:
    """Return the file of an entry's lock, what is locked, and how to name another place."""
    root = cache_root(kind)
    return root / f"{key}.lock", f"The cache entry {root / key}", "set BETA_DPO_CACHE to another folder"
