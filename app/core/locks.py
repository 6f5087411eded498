"""The lock between processes for log folders, cache entries, verdicts and tables of results."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from app.core.errors import UserError

log = logging.getLogger(__name__)
_GRACE_SECONDS = 1.0  # for a holder that is about to release it
_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Lock:
    """A lock on `what` in `file`; `elsewhere` tells, in a message, how to choose another place.

    The kernel releases it when the process ends for any reason, and the file stays. Network file systems share it
    between nodes (NFS with lockd or version 4, Lustre with the option flock). Without kernel locks the file itself
    is the lock: that of a dead process on this machine is taken over, on another machine it is removed by hand.
    """

    def __init__(self, file: Path, what: str, elsewhere: str) -> None:
        self.file, self.what, self.elsewhere = file, what, elsewhere
        self._lock: FileLock | SoftFileLock | None = None

    def acquire(self, seconds: float) -> bool:
        """Return whether the lock is held within `seconds`, negative for no limit. Raises UserError."""
        try:
            if self._lock is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._lock = (FileLock if has_kernel_locks(self.file.parent) else SoftFileLock)(self.file)
            self._lock.acquire(timeout=seconds)
            if not isinstance(self._lock, SoftFileLock):  # which writes these two lines itself
                self.file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        except Timeout:
            return False
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.what} cannot be written ({reason}): {self.elsewhere}.") from error
        return True

    @property
    def held(self) -> bool:
        """Return whether this object holds the lock."""
        return self._lock is not None and self._lock.is_locked

    def holder(self) -> str:
        """Return which process holds the lock, according to the file."""
        try:
            process, host = self.file.read_text(encoding="utf-8").splitlines()[:2]
        except (OSError, ValueError):
            return "another process"
        by_hand = f" (if it is gone, remove {self.file})" if isinstance(self._lock, SoftFileLock) else ""
        return f"process {process} on {host}{by_hand}"

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._lock is not None:
            self._lock.release()


def has_kernel_locks(folder: Path) -> bool:
    """Return whether the kernel can lock files in `folder`; on some network file systems it cannot."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_KERNEL_LOCKS:
                return False
            raise
    return True


@contextmanager
def locked(file: Path, what: str, elsewhere: str, waits: bool = True) -> Iterator[None]:
    """Hold the lock in `file` for the block. If another process holds it, log that and wait, or raise UserError."""
    lock = Lock(file, what, elsewhere)
    if not lock.acquire(_GRACE_SECONDS):
        if not waits:
            raise UserError(f"{what} is in use by {lock.holder()}: wait until it has ended, or {elsewhere}.")
        log.info("%s is in use by %s: waiting for it", what, lock.holder())
        lock.acquire(-1)
    try:
        yield
    finally:
        lock.release()
