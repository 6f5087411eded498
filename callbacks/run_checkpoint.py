"""The checkpoints of a run, saved every n steps, at a signal and at the end; `last.ckpt` is the newest."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import stat
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.tensor import DTensor

from app.core.errors import StepRefused, UserError
from app.core.log_folder import refuse_another_run
from app.method.ranges import PositiveInt, checked


class Interrupted(Exception):
    """The exception for a run that a signal ended after `step`, which is saved in `checkpoint`."""

    def __init__(self, number: int, step: int, checkpoint: str):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, saved in {checkpoint}")
        self.exit_status = 128 + number  # the status a shell reports for a process ended by a signal


class SignalWatch:
    """A signal handler that only stores the number of a signal in `received`; a second SIGINT interrupts at once.

    SLURM can send SIGUSR1 some time before a job's time limit (`--signal`). Lightning's handler for SIGTERM calls a
    collective inside the handler, while each rank may be at a different point of the step. This class leaves the
    agreement between ranks to its owner, at the end of the step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def start(self) -> None:
        if self._previous or threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread handle signals
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self._previous[number] = signal.signal(number, self._note)

    def stop(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        hint = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
        for stream in (1, 2):
            with suppress(OSError):  # a stream may be closed
                if number == signal.SIGHUP and stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)  # printing to a closed terminal fails
        # not by print or logging, which may hold their locks when the signal arrives
        with suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: the step is finished and saved first.{hint}\n".encode())


@checked
class RunCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` of Lightning that saves by steps and survives a kill at any moment.

    It writes the new checkpoint, then moves the link `last.ckpt` to it in one rename. It deletes the old one only
    when the next step or the run has ended without error, because only then are the new weights known to be good.
    At SIGTERM, SIGUSR1, SIGHUP or Ctrl-C it finishes and saves the step, and `Interrupted` ends the run. It saves
    the last step, and the one before a `StepRefused`. If a step fails otherwise it saves nothing: the statistics
    could be one batch ahead of the weights, or the weights half updated.

    Args:
        every_n_steps: optimizer steps between checkpoints; none saves only at the end.
        keep_all: keep every checkpoint instead of only the newest.
        dirpath: folder; none takes `checkpoints` in the log folder.
    """

    def __init__(
        self, every_n_steps: PositiveInt | None = None, keep_all: bool = False, dirpath: str | None = None
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{step}",
            every_n_train_steps=every_n_steps or 0,
            every_n_epochs=0,
            save_top_k=-1 if keep_all else 1,
            save_last="link",
            enable_version_counter=False,  # else a resumed run writes last-v1.ckpt and leaves last.ckpt stale
        )
        self._signals = SignalWatch()
        self._stopped_by: int | None = None
        self._progress: dict[str, Any] | None = None  # state of loops and sampler after the last step
        self._older: list[str] = []  # checkpoints to delete after the next good step
        self._within_epoch = False  # whether a save uses `_progress` instead of the current state

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint; Lightning's would be another for another `every_n_steps`."""
        return type(self).__name__

    @property
    def last(self) -> Path:
        """Return the link to the newest checkpoint."""
        assert self.dirpath is not None
        return Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._stopped_by, self._progress, self._within_epoch = None, None, False  # of an earlier fit
        taken = trainer.is_global_zero and os.path.lexists(self.last) and trainer.ckpt_path is None
        refuse_another_run(trainer, taken, f"{self.dirpath} already holds the checkpoints")
        resumed, folder = Path(trainer.ckpt_path or "").resolve(), self.last.parent
        here = resumed.parent == folder.resolve()
        if here:  # the state may name the place that the folder was moved from
            self.best_model_path = str(folder / resumed.name)
        self._older = [str(folder / Path(path).name) for path in self._older if here]
        if trainer.is_global_zero and folder.is_dir():
            for part in folder.glob(f".*{self.FILE_EXTENSION}.*.part"):  # of a run that was killed while it wrote
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            if here:  # a run resumed from an earlier checkpoint must not return to the later one after a kill
                move_link(self.last, resumed)
        self._signals.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._delete_older(trainer)
        # fetching the next batch advances the sampler before that step is known to be good
        self._progress = copy.deepcopy(trainer.fit_loop.state_dict())
        every = self._every_n_train_steps
        if self.stopped(trainer) or (every and trainer.global_step % every == 0):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopped(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the end of an epoch does not save."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.stop()
        # Lightning counts an epoch cut short by max_steps as complete: a resume would skip the rest of it
        complete = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._within_epoch = self._progress is not None and not complete
        self.save(trainer)
        self._delete_older(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.stop()
        if isinstance(exception, StepRefused) and self._progress is not None:
            self._within_epoch = True
            try:
                self.save(trainer)
            except UserError as error:
                rank_zero_warn(str(error))
                return
            kept = "".join(f"; {path} is kept, too" for path in self._older)
            rank_zero_info(f"step {trainer.global_step}, the last good one, is saved in {self.last}{kept}")

    # --- stopping, after everything of the finished step has been logged -------------------------------------

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if self._stopped_by is not None:
            raise Interrupted(self._stopped_by, trainer.global_step, str(self.last))

    on_validation_start = on_train_batch_start  # type: ignore[assignment]

    def stopped(self, trainer: Trainer) -> bool:
        """Return whether any rank received a signal; all take the largest, because scripts read the exit status."""
        self._stopped_by = largest(trainer, self._signals.received or 0) or None
        return self._stopped_by is not None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._within_epoch:
            assert self._progress is not None
            checkpoint["loops"]["fit_loop"] = self._progress
            checkpoint["epoch"] = self._progress["epoch_progress"]["current"]["processed"]

    # --- saving ------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of this step and point `last.ckpt` to it; UserError if weights are not finite."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        if not weights_are_finite(trainer):
            older = f"{self.best_model_path} is kept" if self.best_model_path else "no earlier checkpoint exists"
            step = trainer.global_step
            raise UserError(f"weights are not finite after {step} steps and were not saved; {older}.")
        path = self.format_checkpoint_name(self._monitor_candidates(trainer))
        # set before saving, because a resumed run reads from its checkpoint which files to delete
        previous, self.best_model_path, self.last_model_path = self.best_model_path, path, str(self.last)
        if self.save_top_k == 1 and previous and self._should_remove_checkpoint(trainer, previous, path):
            self._older.append(previous)
        self._save_checkpoint(trainer, path)
        if trainer.is_global_zero:
            move_link(self.last, Path(path))
            if not previous:
                size = sum(file.stat().st_size for file in (Path(path), *Path(path).rglob("*"))) / 1e6
                kept = "all are kept" if self.save_top_k < 0 else "the newest is kept, two while one is written"
                rank_zero_info(f"first checkpoint: {path}, {size:,.1f} MB; {kept}")
        trainer.strategy.barrier("last checkpoint")

    def _delete_older(self, trainer: Trainer) -> None:
        for path in self._older:
            self._remove_checkpoint(trainer, path)
        self._older.clear()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"older": list(self._older)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._older = list(state_dict.get("older", []))


def weights_are_finite(trainer: Trainer) -> bool:
    """Return whether every trainable weight is finite on every rank; all ranks must call it."""
    trained = (weight.detach() for weight in trainer.lightning_module.parameters() if weight.requires_grad)
    local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained)
    return not largest(trainer, not all(bool(weight.isfinite().all()) for weight in local))


def largest(trainer: Trainer, number: int) -> int:
    """Return the largest `number` of all ranks; all ranks must call it."""
    own = torch.tensor(int(number), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(own, reduce_op="max"))


def move_link(link: Path, target: Path) -> None:
    """Point `link` to `target` in its folder; a valid link exists at every moment."""
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name, target_is_directory=target.is_dir())
    os.replace(temporary, link)
