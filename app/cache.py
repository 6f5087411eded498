"""The cache on disk: what took long is made once per machine, and by one process only."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

Kind = Literal["tables", "rewards", "references"]


def cache_root(kind: Kind) -> Path:
    """The folder of all entries of a kind: in the environment variable BETA_DPO_CACHE, or ~/.cache/beta-dpo."""
    return Path(os.environ.get("BETA_DPO_CACHE") or "~/.cache/beta-dpo").expanduser() / kind


def fingerprint(description: object) -> str:
    """A hash of JSON values that tell all that decides what is in an entry."""
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).hexdigest()
