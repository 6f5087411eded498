"""Writing checkpoint files atomically and reading them without running code that they may hold."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from app.core.errors import UserError
from app.core.files import atomic_file

# the classes that the index of a sharded checkpoint may hold, besides torch's dtypes; all others are refused
_INDEX_MODULE = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "WindowsPath")),
}
_LIGHTNING_METADATA = "meta.pt"  # Lightning's file beside the shards


class SafeCheckpointIO(TorchCheckpointIO):
    """A checkpoint plugin that writes to a temporary file in the same folder, renames it, and reads weights only.

    Lightning's own plugin writes through the system's temporary folder. On another file system it copies instead
    of renaming, and a kill during the copy leaves half a checkpoint under the final name. It also holds the
    checkpoint twice in memory; this plugin streams to the file.
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
        """Return the contents on the CPU, whatever the arguments say. Raises UserError like `read_checkpoint`."""
        return read_checkpoint(Path(path), mmap=False)


def unwritable(path: Any) -> UserError:
    """Return the error for a checkpoint that cannot be written."""
    return UserError(
        f"{path} could not be written, probably because the disk is full: free space and repeat the command with "
        "--ckpt_path last; an earlier one is untouched."
    )


def read_checkpoint(path: Path, mmap: bool = True) -> dict[str, Any]:
    """Return the contents of the checkpoint file `path` on the CPU; with `mmap`, tensors are read when used.

    Raises UserError if the file is missing, damaged, holds code, or was not written by this project.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder of shards: only ShardedStrategy (configs/strategy/fsdp.yaml) resumes it."
        )
    if not path.is_file():
        raise UserError(f"{path} is not a checkpoint file: give the path of a .ckpt that `beta-dpo fit` wrote.")
    state = _load(path, path, mmap=mmap)
    if not isinstance(state, dict) or not {"model_config", "state_dict", "loops"} <= state.keys():
        raise UserError(f"{path} was not written by beta-dpo: it holds no model configuration or no weights.")
    return state


def read_for_export(path: Path) -> dict[str, Any]:
    """Return the contents of `path`, a file or a folder of shards, for export.

    From a folder, `state_dict` is read into memory and the state of the optimizers is not read; a file is
    memory-mapped. Raises UserError like `read_checkpoint`.
    """
    if not path.is_dir():
        return read_checkpoint(path)
    state = check_checkpoint(path)
    reader = FileSystemReader(path)
    weights = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(stored, TensorStorageMetadata)
    }
    try:
        dcp.load(weights, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # CheckpointException is no subclass of Exception
        raise _refusal(path) from error
    return state | {"state_dict": {name.removeprefix("state_dict."): tensor for name, tensor in weights.items()}}


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint file, or of a folder of shards without its tensors.

    Raises UserError for anything that `fit` could not have written.
    """
    if not path.exists():
        raise UserError(f"--ckpt_path: there is no checkpoint {path}; give the path of one, or `last`.")
    if not path.is_dir():
        return read_checkpoint(path)
    if not (path / ".metadata").is_file() or not (path / _LIGHTNING_METADATA).is_file():
        raise UserError(f"{path} is damaged or not a checkpoint of beta-dpo: its index is missing.")
    state = _load(path, path / _LIGHTNING_METADATA)
    if "model_config" not in state:
        raise UserError(f"{path} was not written by beta-dpo: it holds no model configuration.")
    _check_shards(path)
    return state


def _check_shards(folder: Path) -> None:
    """Raise UserError for shards with unsafe contents, because torch unpickles the index and non-tensor values."""
    try:
        with open(folder / ".metadata", "rb") as file:
            index = _IndexUnpickler(file).load()
        for item, place in index.storage_data.items():
            if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
                raise ValueError(f"{place.relative_path} is no shard in this folder")
            if isinstance(index.state_dict_metadata.get(item.fqn), TensorStorageMetadata):
                continue  # torch reads tensors with weights_only
            with open(folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        raise _refusal(folder) from error


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


def _load(checkpoint: Path, file: Path, mmap: bool = True) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged or hostile file may raise anything
        raise _refusal(checkpoint) from error


def _refusal(path: Path) -> UserError:
    return UserError(f"{path} is damaged or not a checkpoint of beta-dpo, and was not loaded.")
