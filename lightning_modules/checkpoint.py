"""Writing checkpoint files atomically and reading them without running code that they may hold."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from app.core.errors import UserError
from app.core.files import atomic_file

# what the index of a sharded checkpoint may hold, besides torch's dtypes and the classes of one module
_INDEX_MODULE = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "WindowsPath")),
}


class SafeCheckpointIO(TorchCheckpointIO):
    """A checkpoint plugin that writes to a temporary file in the same folder, renames it, and reads weights only.

    Lightning's own copies from the system's temporary folder, so that a kill may leave half a checkpoint, and holds
    it twice in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_file(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # torch's writer hides the operating system's reason
                raise unwritable(path) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the contents on the CPU; the other arguments have no effect."""
        return read_checkpoint(Path(path), mmap=False)


def unwritable(path: Any) -> UserError:
    """Return the error for a checkpoint that cannot be written."""
    before = (last := Path(path).with_name("last.ckpt")).exists()
    then = f"resumes from {last.resolve().name}" if before else "starts again, for there is no earlier checkpoint"
    cure = f"free space; the same command with --ckpt_path last {then}"
    return UserError(f"{path} could not be written, probably because the disk is full: {cure}.")


def read_checkpoint(path: Path, mmap: bool = True) -> dict[str, Any]:
    """Return a file's contents on the CPU, read when used with `mmap`. Raises UserError if it is not ours."""
    if path.is_dir():
        raise UserError(f"--ckpt_path: only ShardedStrategy (strategy/fsdp.yaml) reads {path}, a folder of shards.")
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}: give the path of one that `beta-dpo fit` wrote.")
    return _load(path, path, {"model_config", "state_dict", "loops"}, mmap)


def check_checkpoint(path: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Return the contents of a file, or of a folder of shards but for its tensors, or raise UserError.

    Of several `ranks`, each compares the checksums of a share of the tensors.
    """
    if not path.is_dir():
        return read_checkpoint(path)
    for place, kind in ((path / "checkpoints", "log folder"), (path, "folder of the checkpoints")):
        if (last := place / "last.ckpt").exists():
            raise UserError(f"{path} is the {kind} of a run: give its checkpoint, such as {last}.")
    state = _load(path, path / "meta.pt", {"model_config"})  # Lightning's file beside the shards
    with _refusing(path):
        _check_shards(path, rank, ranks)
    return state


def read_for_export(path: Path) -> dict[str, Any]:
    """Return the contents of `path`, a memory-mapped file or a folder of shards but for its optimizers."""
    state = check_checkpoint(path)
    if not path.is_dir():
        return state
    reader, prefix = FileSystemReader(path), "state_dict."
    weights = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
    with _refusing(path):
        dcp.load(weights, storage_reader=reader, no_dist=True)
    return state | {"state_dict": {name.removeprefix(prefix): tensor for name, tensor in weights.items()}}


def _check_shards(folder: Path, rank: int, ranks: int) -> None:
    """Raise an error for damaged shards, and unsafe ones, because torch unpickles the index and other values."""
    with open(folder / ".metadata", "rb") as file:
        index = _IndexUnpickler(file).load()
    for number, (item, place) in enumerate(index.storage_data.items()):
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"{place.relative_path} is no shard in this folder")
        is_tensor = isinstance(index.state_dict_metadata.get(item.fqn), TensorStorageMetadata)
        if is_tensor and number % ranks != rank:
            continue
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            part = io.BytesIO(file.read(place.length))
        if not is_tensor:  # torch itself reads tensors so
            torch.load(part, map_location="cpu", weights_only=True)
        _check_sums(part)


def _check_sums(file: Path | io.BytesIO) -> None:
    """Raise ValueError if a part of what `torch.save` wrote does not match its checksum, which torch ignores."""
    with ZipFile(file) as parts:
        if damaged := parts.testzip():
            raise ValueError(f"{damaged} does not match its checksum")


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that builds only the plain records of a checkpoint's index."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module in (_INDEX_MODULE, "torch") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, torch.dtype) or getattr(found, "__module__", "") == _INDEX_MODULE:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")


def _load(checkpoint: Path, file: Path, keys: set[str], mmap: bool = True) -> dict[str, Any]:
    """Return the contents of a `file` of `checkpoint`, which must have the `keys`."""
    with _refusing(checkpoint):
        _check_sums(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(state, dict) or not keys <= state.keys():
        raise UserError(f"{checkpoint} was not written by beta-dpo: it holds no {' or no '.join(sorted(keys))}.")
    return state


@contextmanager
def _refusing(checkpoint: Path) -> Iterator[None]:
    """Turn any error of the block into a UserError, because a damaged or hostile file may raise anything."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except (Exception, CheckpointException) as error:  # CheckpointException is no subclass of Exception
        raise UserError(f"{checkpoint} is damaged or not a checkpoint of beta-dpo, and was not loaded.") from error
