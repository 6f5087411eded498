"""The file of verdicts: each is one line, written as soon as it is given, so that no question is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from app.core.errors import UserError, refused
from app.core.files import locked, naming, refuse_place

BEGIN = b'{"key": '  # of every line


def verdict_key(*decisive: Any) -> str:
    """Return a hash of everything that determines a verdict: judge, settings and question."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class VerdictFile(dict[str, dict[str, Any]]):
    """An append-only .jsonl file of verdicts by key; use it within `opened`, which locks out other processes."""

    _file: TextIO

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._lock = Lock()
        self._read()

    @classmethod
    @contextmanager
    def opened(cls, path: str) -> Iterator[VerdictFile]:
        """Yield the file at `path`, created if missing. Raises UserError if it is damaged or in use."""
        refuse_place("verdicts", path, (".jsonl",))
        with locked(Path(f"{path}.lock"), f"The file of verdicts {path}", "name another file", waits=False):
            verdicts = cls(Path(path))
            with open(path, "a", encoding="utf-8") as verdicts._file:
                yield verdicts

    def add(self, key: str, **fields: Any) -> None:
        """Record a verdict and return once it is on disk. Safe to call from several threads."""
        with self._lock, naming(self.path):
            self[key] = fields
            self._file.write(json.dumps({"key": key, **fields}, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a kill may cut the last line; its question is asked again
        for number, line in enumerate(whole.splitlines(), 1):
            with refused(f"{self.path}:{number} is not a verdict, correct or remove the line"):
                fields = json.loads(line, parse_constant=int)  # which refuses NaN and Infinity
                self[fields.pop("key")] = fields
        if begun := content[len(whole) :]:
            if begun[: len(BEGIN)] != BEGIN[: len(begun)]:  # a whole file without a line break, but for the kill
                raise UserError(f"{self.path}: the last line is not a verdict: name another file, or remove it.")
            os.truncate(self.path, len(whole))
