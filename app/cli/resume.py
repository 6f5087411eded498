"""Resolution of `--ckpt_path` to a checkpoint, which is checked before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from app.cli.run_record import RunRecord
from app.core.errors import UserError
from callbacks import PairAudit
from lightning_modules.checkpoint import check_checkpoint


def settle_checkpoint(trainer: Trainer, asked: str | None, fitting: bool) -> str | None:
    """Return the checkpoint to load for `--ckpt_path`, or None to start a new run.

    `last` is the newest checkpoint in the log folder of the configuration. If the logger numbers its folders, this
    is the folder with the highest number, and the run continues in it. Without a checkpoint, `fitting` starts a new
    run. Raises UserError if the checkpoint is missing, damaged, foreign or cannot be resumed with these settings.
    """
    if asked is None:
        return None
    if asked != "last":
        compare(trainer, check_checkpoint(Path(asked)), fitting)
        return asked
    found = [path for path in last_checkpoints(trainer) if path.exists()]
    if not found and not fitting:
        raise UserError("--ckpt_path last: the log folder holds no checkpoint; give the path of one.")
    if not found:
        rank_zero_info("--ckpt_path last: there is no checkpoint yet, so the run starts afresh.")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PairAudit):
                callback.replaces_steps = True
        return None
    newest = max(found, key=os.path.getmtime)
    compare(trainer, check_checkpoint(newest), fitting)
    return str(newest)


def compare(trainer: Trainer, checkpoint: dict[str, Any], fitting: bool) -> None:
    """Compare the run that wrote `checkpoint` with the run that resumes it (see `RunRecord.compare`)."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if fitting and isinstance(callback, RunRecord):
            callback.compare({name: checkpoint[name] for name in ("config", "content") if name in checkpoint})


def continue_newest_version(trainer: Trainer) -> None:
    """Make loggers that number their folders continue in the newest one instead of a new one."""
    for logger in trainer.loggers:
        # Lightning's loggers with numbered folders have `_version`, which is None until `version` is read
        if getattr(logger, "_version", "") is None and isinstance(logger.version, int):
            logger._version = max(logger.version - 1, 0)  # type: ignore[attr-defined]


def last_checkpoints(trainer: Trainer) -> list[Path]:
    """Return the `last.ckpt` of every checkpoint callback, including links without a target."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return [Path(path) for callback in callbacks for path in callback._find_last_checkpoints(trainer)]
