"""Writing to disk so that a crash never leaves a partial file, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from app.core.errors import UserError

log = logging.getLogger(__name__)
_GRACE_SECONDS = 1.0  # for the holder of a lock that is about to release it
_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
CONFIGS = Path(__file__).parents[2] / "configs"  # in the clone, or where the wheel installed them


def shipped(name: str) -> str:
    """Return the path of the shipped configuration `name`, such as `method/dpo`; a file or another name stays."""
    inside = name.removeprefix("configs/")
    found = (path for path in (Path(name), CONFIGS / inside, CONFIGS / f"{inside}.yaml") if path.is_file())
    return str(next(found, name))


def shipped_names() -> list[str]:
    """Return the names that `shipped` knows: `quickstart`, `method/dpo` and so on."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def refuse_place(option: str, out: str, endings: tuple[str, ...], *read: str | None) -> str:
    """Return a remark if `out` will be replaced. Raises UserError if it cannot be written or is among `read`."""
    if not out.endswith(endings):
        raise UserError(f"{option} must end in {' or '.join(endings)}, not {out!r}.")
    if os.path.isdir(out):
        raise UserError(f"{option}: {out} is a folder: give a file.")
    place = next(parent for parent in Path(out).absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "may not be written" if place.is_dir() else "is no folder"
        raise UserError(f"{option}: {out} cannot be written ({place} {why}): name another file.")
    there = os.path.exists(out)
    if there and any(one and os.path.exists(one) and os.path.samefile(one, out) for one in read):
        raise UserError(f"{option}: {out} is read by this command, which would replace it: give another.")
    return " (replaces the one that was there)" if there else ""


def refuse_absent(option: str, kind: str, name: str) -> None:
    """Raise UserError if `name` has the form of a local path and leads nowhere; the Hub would be asked in vain."""
    local = name.startswith(("models/", "runs/", "/", ".", "~")) or name.count("/") > 1
    if local and not Path(name).exists():
        cure = "`make smollm2` makes it" if name == "models/smollm2" else "make it first, or correct the path"
        raise UserError(f"{option}: no {kind} at {name!r}, for there is no such folder: {cure}.")


def refuse_pointers(*paths: Path) -> None:
    """Raise UserError for a file that `git clone` without LFS left as a pointer to its content."""
    for path in paths:
        small = path.is_file() and path.stat().st_size < 1024
        if small and path.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself: fetch it by `git lfs pull`.")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which is made; rename it to `path` unless the block fails."""
    target = Path(path)
    with naming(target) as hidden:
        handle, name = tempfile.mkstemp(**hidden)
        os.close(handle)
        temporary = Path(name)
        obey_umask(temporary)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path`, which must not exist, unless the block fails."""
    target = Path(path)
    with naming(target) as hidden:
        temporary = Path(tempfile.mkdtemp(**hidden))
        try:
            yield temporary
            for written in (temporary, *temporary.rglob("*")):
                obey_umask(written)
            # renaming onto an existing folder works only if that folder is empty, as intended
            try:
                os.replace(temporary, target)
            except OSError as error:
                raise FileExistsError(errno.EEXIST, "exists already", str(target)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(target: Path) -> Iterator[dict[str, Any]]:
    """Yield how `tempfile` names a part beside `target`, and make an error of the disk name `target` itself."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield {"prefix": f".{target.name}.", "suffix": ".part", "dir": target.parent}
    except OSError as error:
        if error.errno is not None and f"/.{target.name}." in f"/{error.filename or f'.{target.name}.'}":
            error.filename = str(target)
        raise
    except Exception as error:  # libraries in Rust, such as safetensors, raise no OSError
        if hidden := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(hidden[1]), os.strerror(int(hidden[1])), str(target)) from error
        raise


def obey_umask(path: Path) -> None:
    """Give a file or folder the default mode, because mkstemp, mkdtemp and safetensors create private ones."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return a hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def folder_hash(folder: str | os.PathLike[str]) -> str:
    """Return a hash of the names and bytes of the files in a folder, without subfolders."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return _files_hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache  # a model of many gigabytes is read once a process, as long as size and time of its files stay
def _files_hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    hashes = [(path.name, file_hash(path)) for path, _, _ in files]
    return hashlib.blake2b(json.dumps(hashes).encode(), digest_size=16).hexdigest()


class Parts:
    """A folder of numbered parts of unfinished work, from which a killed process resumes.

    Parts are written in order, each by `atomic_file`, so that every existing part is complete. `job` has the
    settings on which their content depends, as JSON values. Raises UserError if the folder has another job's parts.
    """

    def __init__(self, folder: Path, job: Mapping[str, object]) -> None:
        self.folder = folder
        described = json.loads(json.dumps(job))
        record = folder / "job.json"
        try:
            before = dict(json.loads(record.read_bytes())) if record.exists() else {}
        except (ValueError, TypeError) as error:
            raise UserError(f"{record} is damaged: remove the folder {folder}.") from error
        other = sorted(name for name in before.keys() | job.keys() if before.get(name) != described.get(name))
        if other and len(self):
            cure = "finish that with its own settings, write to another place, or remove the folder"
            raise UserError(f"{folder} holds the beginning of other work ({', '.join(other)} differed): {cure}.")
        if before != described or not record.exists():
            with atomic_file(record) as temporary:
                temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")

    def __len__(self) -> int:
        """Return the number of finished parts."""
        done = 0
        while self.path(done).exists():
            done += 1
        return done

    def path(self, number: int) -> Path:
        """Return the file of part `number`, from 0."""
        return self.folder / f"{number:06d}"

    def __iter__(self) -> Iterator[Path]:
        return (self.path(number) for number in range(len(self)))

    def remove(self) -> None:
        """Delete the parts, after their content was written to its final place."""
        shutil.rmtree(self.folder)


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
