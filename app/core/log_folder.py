"""The log folder of a run: its path, its lock, its configuration by keys, its curves, which a resume continues."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from app.core.errors import UserError
from app.core.files import atomic_file, locked

log = logging.getLogger(__name__)

OF_AN_OBJECT = ("class_path", "init_args", "dict_kwargs")
LOCK = ".beta-dpo.lock"
ELSEWHERE = "choose another log folder (trainer.logger)"
# files that loggers write before the first step
LEFTOVERS = (LOCK, "hparams.yaml", "events.out.tfevents.*")
WITH_FOLDERS = (TensorBoardLogger, CSVLogger)
NOT_IN_IDS = "/\\:;,#?'"  # Weights & Biases refuses these in a run id, and they make folder names hard to type


def log_folder(trainer: Trainer) -> Path:
    """Return the run's own folder; every rank must call it, because rank 0 broadcasts it."""
    logger = trainer.logger
    if logger is None or isinstance(logger, WITH_FOLDERS):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # runs with another logger, such as Weights & Biases, share `log_dir`; ModelCheckpoint saves in this folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    own = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return Path(trainer.strategy.broadcast(own))


def refuse_another_run(trainer: Trainer, taken: bool, what: str) -> None:
    """Raise UserError on every rank if rank 0 found what another run left; every rank must call it."""
    # broadcast, or the other ranks would wait for the one that stopped
    if trainer.strategy.broadcast(taken):
        raise UserError(f"{what} of another run: {ELSEWHERE}, or resume that run with --ckpt_path last.")


@contextmanager
def claimed_log_folder(trainer: Trainer) -> Iterator[None]:
    """Lock the log folder for the block, and keep what earlier starts logged in it. Raises UserError."""
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        yield
        return
    for logger in trainer.loggers:
        if not isinstance(logger, WITH_FOLDERS):
            if logger.version is None:
                _ = logger.experiment  # type: ignore[attr-defined]  # which draws an id
            name = str(logger.version)
            if wrong := "".join(sorted(set(name) & set(NOT_IN_IDS))):
                cure = "give one of letters, digits, '-', '_', '.' and '='"
                raise UserError(f"trainer.logger: {name!r} is no run id, because it holds {wrong}: {cure}.")
    folder = log_folder(trainer)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with locked(folder / LOCK, f"The log folder {folder}", ELSEWHERE, waits=False):
        try:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger._experiment = ContinuedTable(logger.log_dir)
            yield
        finally:
            # a start that ends before the first step leaves no folder
            files = [path for path in folder.rglob("*") if path.is_file()] if created else []
            if created and all(any(path.match(pattern) for pattern in LEFTOVERS) for path in files):
                shutil.rmtree(folder)
                with suppress(OSError):  # a parent may have files of another run by now
                    for parent in created[1:]:
                        parent.rmdir()


def continue_curves(trainer: Trainer, resumes: bool) -> None:
    """Make the loggers continue at the step that training resumes from; every rank must call it."""
    step = trainer.global_step + 1
    writers = [getattr(logger, "_experiment", None) for logger in trainer.loggers]
    tables = [writer for writer in writers if isinstance(writer, ContinuedTable)]
    taken = any(table.read()[1] for table in tables) and not resumes
    refuse_another_run(trainer, taken, f"{log_folder(trainer)} already holds the curves")
    for table in tables:
        if dropped := table.drop_from(step):
            rank_zero_info(f"{table.path}: {dropped} rows from step {step} on are dropped")
    for logger in trainer.loggers:
        if resumes and isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            # after this event TensorBoard and its reader ignore steps from here on in earlier files
            start = Event(session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(start, step)


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a configuration by name, as `model.optimizer.lr`; an object's own value is its class."""
    return {name.removeprefix("."): value for name, value in _leaves("", config) if name}


def _leaves(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, list) and node and all(map(_class_of, node)):
        found = [_class_of(one) for one in node]
        node = {kind + "'" * found[:place].count(kind): node[place] for place, kind in enumerate(found)}
    elif kind := _class_of(node):
        yield name, kind
        inner = (node, node.get("init_args") or {}, node.get("dict_kwargs") or {})
        node = {key: value for part in inner for key, value in part.items() if key not in OF_AN_OBJECT}
    elif not isinstance(node, Mapping) or not node:
        yield name, node
        return
    for key, value in node.items():
        yield from _leaves(f"{name}.{key}", value)


def _class_of(node: Any) -> str:
    return str(node["class_path"]).rpartition(".")[2] if isinstance(node, Mapping) and "class_path" in node else ""


def whole_lines(file: Path) -> str:
    """Return the text of a file that grows by lines, without a last one that a kill cut short, which is logged."""
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        log.warning("%s: the last line is cut and left out", file)
    return whole


class ContinuedTable(ExperimentWriter):
    """A writer of metrics.csv that keeps the rows of earlier starts of the run; Lightning's writer deletes them."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir)
        self.path = Path(self.metrics_file_path)
        self.metrics_keys = self.read()[0]

    def _check_log_dir_exists(self) -> None:
        """Do nothing: Lightning's method deletes the file."""

    def drop_from(self, step: int) -> int:
        """Drop the rows of `step` and later, and return their number."""
        rows = self.read()[1]
        kept = [row for row in rows if int(row["step"]) < step]
        if self.path.exists():
            self._rewrite_with_new_header(self.metrics_keys, kept)
        return len(rows) - len(kept)

    def read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Return the columns and the rows on disk, without a last line that a kill cut short."""
        if not self.path.exists():
            return [], []
        reader = csv.DictReader(whole_lines(self.path).splitlines())
        rows = list(reader)
        columns = list(reader.fieldnames or [])
        if columns and ("step" not in columns or not all(str(row["step"]).isdigit() for row in rows)):
            raise UserError(f"{self.path} is not what CSVLogger writes: {ELSEWHERE}, or move the file away.")
        return columns, rows

    def _rewrite_with_new_header(self, fieldnames: Sequence[str], rows: list[dict[str, str]] | None = None) -> None:
        rows = self.read()[1] if rows is None else rows
        with atomic_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)
