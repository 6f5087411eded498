"""The record of a run in its log folder and in checkpoints, and the rules by which `--ckpt_path` resumes one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from app.core.errors import UserError, refused
from app.core.files import atomic_file, folder_hash, naming, refuse_place
from app.core.log_folder import continue_curves, flattened, log_folder
from callbacks import PairAudit
from callbacks.base import loss_of
from datamodules.base import PairDataModule
from lightning_modules.checkpoint import check_checkpoint

COMMANDS_FILE = "commands.txt"
RECORD = "config.yaml"  # of a training; an evaluation writes config-COMMAND.yaml
UNSET = "none"  # also for null
START = "give the old value, or start a run of its own from the checkpoint's model (`beta-dpo export`)"
# patterns of keys, as `flattened` names them, whose change cannot be applied to a checkpoint; for a key in no table
# the new value applies, and the change is listed
REFUSED = (
    *("model", "model.architecture*", "model.loss*", "model.sft_weight", "model.lora*", "model.optimizer"),
    *("model.quantize*", "model.reference_name"),
    # M0 and σ are in the units of M
    *("reward", "reward.*", "data.reward_model", "data.reward_model.name", "statistics*"),
    "data.order*",  # a place in one order is none in another
    "control*",  # its state is that of one control, with the β of its run
)
# the settings under which a state is in the units of β0, so that model.beta0 is refused as well
IN_UNITS_OF_BETA0 = {"statistics.gap_scale": "beta0", "schedule": "EpsilonBeta", "margin": "GammaPOMargin"}
# keys whose old value still applies, because it is part of the state
KEPT = {
    **dict.fromkeys(("seed_everything", "data.seed"), "the order of the pairs stays that of the checkpoint"),
    "filter.seed": "the draws stay those of the checkpoint",
    **dict.fromkeys(("confidence.column", "confidence.initial"), "annotators of the checkpoint keep their rates"),
}
IGNORED = ("ckpt_path", "scores*", "config")
# what is compared by the hash of its content → patterns of its keys, and the fault
CONTENTS = {
    "model": (["model.name"], "another model than the run started from"),
    "reference": (["model.reference_name"], "another reference than the run had"),
    "data": (["data*", "seed_everything"], "other training pairs"),
}


class RunRecord(SaveConfigCallback):
    """A callback that writes config.yaml and appends the command to `commands.txt`, after the first step of a fit.

    A resumed run with other settings keeps the earlier file as `config.until-step-N.yaml`. Every checkpoint gets
    configuration, hashes of model and data, and the newest metrics, for a resume and the card of `export`.
    """

    def __init__(self, *settings: Any, command: Sequence[str], **more: Any):
        super().__init__(*settings, **more)
        self.command = command
        self.content: dict[str, str | None] = {}  # of `models_of`, and a hash of the training pairs as tokens
        self._resumed: Mapping[str, Any] = {}  # what the checkpoint recorded
        self._differences: dict[str, tuple[Any, Any]] = {}
        self._start = 0

    def compare(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        """Compare with the run that wrote `checkpoint`. Raises UserError if these settings cannot resume it."""
        self._resumed = checkpoint
        if fitting and "config" in checkpoint:
            self._differences = compared(yaml.safe_load(checkpoint["config"]), yaml.safe_load(self.text))

    def refuse_moved(self, folder: Path) -> None:
        """Raise UserError if the run in the log folder `folder` has its checkpoints in another place than now."""
        if (file := folder / RECORD).is_file():
            recorded = yaml.safe_load(file.read_text(encoding="utf-8"))
            for key, (old, new) in differences(recorded, yaml.safe_load(self.text)).items():
                if key.endswith(".dirpath") or (key == "checkpoint" and new == UNSET):
                    cure = f"give the {key} of {file}, or the path of a checkpoint instead of last"
                    raise UserError(f"--ckpt_path last: {key} is {new}, but the run had {old}: {cure}.")

    @cached_property
    def text(self) -> str:
        """Return the configuration of the run as YAML. Raises UserError for an option that cannot be written so."""
        try:
            return str(self.parser.dump(self.config, skip_none=False))
        except Exception as error:  # of any type, raised by the parser for a value that it built itself
            given, cure = str(error).rpartition("Given value: ")[2], "give its options as text and numbers"
            raise UserError(f"{given:.300} cannot be written to config.yaml: {cure}.") from error

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # on every rank, because the folder is broadcast
        self.folder = log_folder(trainer)
        if stage != "fit":
            super().setup(trainer, pl_module, stage)
            before = (self._resumed.get("content") or {}).get("model")
            refers = before and trainer.is_global_zero and getattr(pl_module, "reference_name", "") is None
            if refers and models_of(pl_module)["model"] not in (before, None):
                told = "the run started from another model than model.name, which is the reference here"
                rank_zero_warn(f"--ckpt_path: {told}: gaps and rewards are not those of the run.")
            return
        file = self.folder / self.config_filename
        new = self.config["ckpt_path"] is None and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if new and file.is_file():
            option = "log folder (trainer.logger, or trainer.default_root_dir)"
            refuse_place(option, str(file), (".yaml",), *self.command)
        data = getattr(trainer, "datamodule", None)
        tokens = data.content("train") if isinstance(data, PairDataModule) else None
        models = models_of(pl_module) if trainer.is_global_zero else {}
        first, self.content = trainer.strategy.broadcast((self.text, {**models, "data": tokens}))
        rank = trainer.global_rank
        for key, (old, new) in differences(yaml.safe_load(first), yaml.safe_load(self.text)).items():
            raise UserError(f"{key} is {new} on rank {rank}, but {old} on rank 0: start all ranks by one command.")
        if tokens != self.content["data"]:
            raise UserError(f"data: rank {rank} has other training pairs than rank 0: give all nodes one file.")
        self._compare_content()
        if self._differences:
            lines = ["--ckpt_path: other settings than in the run of the checkpoint; those of now apply:"]
            for key, (old, new) in self._differences.items():
                if any(key.startswith(f"{whole}.") for whole in self._differences):
                    continue  # an option of an object whose class is another
                kept = f" ({KEPT[key]})" if key in KEPT and old != UNSET else ""
                lines.append(f"  {key}: {old} → {new}{kept}")
            rank_zero_info("\n".join(lines))

    def _compare_content(self) -> None:
        for kind, before in (self._resumed.get("content") or {}).items():
            if before is None or self.content.get(kind) in (before, None):
                continue
            patterns, what = CONTENTS[kind]
            changes = {key: f"{key} was {old} and is {new}" for key, (old, new) in self._differences.items()}
            because = ", ".join(told for key, told in changes.items() if matches(key, patterns))
            because = because or f"the files that {patterns[0].rstrip('*')} names have changed"
            raise UserError(f"--ckpt_path: the current settings give {what} ({because}): {START}.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.already_saved or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.already_saved = True
        file = self.folder / self.config_filename
        text = self.text
        self.folder.mkdir(parents=True, exist_ok=True)
        if file.is_file() and self._resumed and file.read_text(encoding="utf-8") != text:
            file.replace(file.with_name(f"config.until-step-{self._start}.yaml"))
        with atomic_file(file) as temporary:  # else a resume keeps half a file as the earlier one
            temporary.write_text(text, encoding="utf-8")
        self.save_config(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = trainer.global_step
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            continue_curves(trainer, resumes=self.config["ckpt_path"] is not None)
            rank_zero_info(f"log folder: {self.folder}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.already_saved:
            at = f"step {trainer.global_step}, where trainer.max_steps, max_epochs or max_time ends the run"
            rank_zero_info(f"--ckpt_path: nothing was left to train: the checkpoint is of {at}.")
            return
        if trainer.should_stop:  # of which Lightning says nothing
            rank_zero_info(f"the run ends after step {trainer.global_step}: a callback or max_time stops it")
        audited = any(isinstance(one, PairAudit) for one in trainer.callbacks)  # type: ignore[attr-defined]
        folder = shlex.quote(str(self.folder))
        following = f"next: beta-dpo report {folder}; beta-dpo audit {folder}"
        rank_zero_info(following if audited and loss_of(pl_module) else f"log folder: {self.folder}")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Append the command to `commands.txt`; called on rank 0 after config.yaml is written."""
        commands = self.folder / COMMANDS_FILE
        with naming(commands), open(commands, "a", encoding="utf-8") as file:
            file.write(shlex.join(["beta-dpo", *self.command]) + "\n")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text
        checkpoint["content"] = self.content
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}


def models_of(module: LightningModule) -> dict[str, str | None]:
    """Return hashes of the folders of the start model and of a reference of its own, or their Hub ids."""
    names = {"model": getattr(module, "name", None), "reference": getattr(module, "reference_name", None)}
    return {kind: folder_hash(name) if name and Path(name).is_dir() else name for kind, name in names.items()}


def settle_checkpoint(trainer: Trainer, asked: str | None, fitting: bool) -> str | None:
    """Return the checkpoint for `--ckpt_path` (`last`: the newest in the log folder); None starts a new run."""
    if asked is None:
        return None
    path = Path(asked)
    records = [one for one in trainer.callbacks if isinstance(one, RunRecord)]  # type: ignore[attr-defined]
    if asked == "last":
        for record in records:
            record.refuse_moved(log_folder(trainer))
        kept = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        last = [Path(path) for one in kept for path in one._find_last_checkpoints(trainer)]
        found = [path for path in last if path.exists()]  # not a link without its target
        if not found and not fitting:
            raise UserError(f"--ckpt_path last: {log_folder(trainer)} holds no checkpoint; give the path of one.")
        if not found:
            dry = trainer.fast_dev_run  # type: ignore[attr-defined]
            why = "trainer.fast_dev_run has no log folder" if dry else "there is no checkpoint yet"
            rank_zero_info(f"--ckpt_path last: {why}, so the run starts from the beginning.")
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, PairAudit):
                    callback.replaces_steps = True
            return None
        path = max(found, key=os.path.getmtime)
    with refused("--ckpt_path"):
        checkpoint = check_checkpoint(path, trainer.global_rank, trainer.world_size)
    if fitting and -1 != (most := trainer.max_epochs or -1) < (epoch := checkpoint["epoch"]):
        cure = f"raise trainer.max_epochs, which is {most}"
        raise UserError(f"--ckpt_path: the checkpoint is of epoch {epoch}: {cure}.")
    for record in records:
        record.compare({k: checkpoint[k] for k in ("config", "content") if k in checkpoint}, fitting)
    if asked == "last":
        rank_zero_info(f"--ckpt_path last: {path}, saved after step {checkpoint['global_step']}")
    return str(path)


def continue_newest_version(trainer: Trainer) -> None:
    """Make loggers that number their folders continue in the newest one of a training, if there is one."""
    for logger in trainer.loggers:
        # Lightning's loggers with numbered folders have `_version`, which is None until `version` is read
        if getattr(logger, "_version", "") is None and isinstance(new := logger.version, int):
            for logger._version in range(new - 1, -1, -1):  # type: ignore[attr-defined]
                folder = Path(str(logger.log_dir))
                if folder.exists() and ((folder / RECORD).exists() or not any(folder.glob("config-*.yaml"))):
                    break
            else:
                logger._version = new  # type: ignore[attr-defined]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ between two configurations, with old and new value; UNSET if absent or null."""
    old, new = ({k: one for k, one in flattened(each).items() if one is not None} for each in (before, now))
    found = {key: (old.get(key, UNSET), new.get(key, UNSET)) for key in old | new if not matches(key, IGNORED)}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the `differences` to the checkpoint's configuration. Raises UserError if one forbids to resume it."""
    if "checkpoint" not in before:
        cure = "finish that run with version 0.1, or start a new run from its exported model (`beta-dpo export`)"
        raise UserError(f"--ckpt_path: the checkpoint is of version 0.1, which had no named slots: {cure}.")
    found, settings = differences(before, now), flattened(now)
    scaled = any(settings.get(key) == value for key, value in IN_UNITS_OF_BETA0.items())
    for key, (old, new) in found.items():
        if matches(key, REFUSED) or (scaled and key == "model.beta0"):
            raise UserError(f"--ckpt_path: {key} is {new}, but the run of the checkpoint had {old}: {START}.")
    return found
