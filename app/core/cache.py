"""The cache on disk, which builds slow results once per machine, by one process at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from app.core.files import locked

log = logging.getLogger(__name__)
T = TypeVar("T")
_ABANDONED_SECONDS = 7 * 24 * 3600
Kind = Literal["tables", "rewards", "references"]


def cache_root(kind: Kind) -> Path:
    """Return the folder of all entries of a kind, in $BETA_DPO_CACHE or ~/.cache/beta-dpo."""
    return Path(os.environ.get("BETA_DPO_CACHE") or "~/.cache/beta-dpo").expanduser() / kind


def fingerprint(description: object) -> str:
    """Return the cache key: a hash of the JSON values on which the content of an entry depends."""
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).hexdigest()


class DamagedEntry(Exception):
    """The error for an entry whose content is incomplete or altered."""


def cached(kind: Kind, key: str, read: Callable[[Path], T], build: Callable[[Path], None]) -> T:
    """Return what `read` finds in the folder of an entry, which one process builds if it is missing or damaged."""
    folder = cache_root(kind) / key
    with suppress(DamagedEntry):  # an entry appears when it is complete, so a cache may be read-only
        if folder.exists():
            return read(folder)
    with locked(*lock_of(kind, key)):
        if folder.exists():
            try:
                return read(folder)
            except DamagedEntry as damage:
                log.warning("A damaged entry of the cache of %s is rebuilt: %s", kind, damage)
                shutil.rmtree(folder)
        for left in [*folder.parent.glob("*.parts"), *folder.parent.glob(".*.part")]:
            with suppress(FileNotFoundError):  # another process finishes its entry
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    log.info("removing %s, which a killed process left more than a week ago", left)
                    shutil.rmtree(left)
        build(folder)
        return read(folder)


def lock_of(kind: Kind, key: str) -> tuple[Path, str, str]:
    """Return the lock file of an entry, the name of the entry for messages, and how to choose another place."""
    root = cache_root(kind)
    return root / f"{key}.lock", f"The cache entry {root / key}", "set BETA_DPO_CACHE to another folder"
