"""The cache on disk, which builds slow results once per machine, by one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from app.core.locks import locked

Kind = Literal["tables", "rewards", "references"]


def cache_root(kind: Kind) -> Path:
    """Return the folder of all entries of a kind, in $BETA_DPO_CACHE or ~/.cache/beta-dpo."""
    return Path(os.environ.get("BETA_DPO_CACHE") or "~/.cache/beta-dpo").expanduser() / kind


def fingerprint(description: object) -> str:
    """Return the cache key: a hash of the JSON values on which the content of an entry depends."""
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def locked_entry(kind: Kind, key: str) -> Iterator[Path]:
    """Yield the folder of an entry, which may not exist yet; other processes that want it wait meanwhile.

    Raises UserError if the cache folder cannot be written.
    """
    with locked(*lock_of(kind, key)):
        yield cache_root(kind) / key


def lock_of(kind: Kind, key: str) -> tuple[Path, str, str]:
    """Return the lock file of an entry, the name of the entry for messages, and how to choose another place."""
    root = cache_root(kind)
    return root / f"{key}.lock", f"The cache entry {root / key}", "set BETA_DPO_CACHE to another folder"
