"""The LightningCLI of this project: any stage as model, any source as data, safe checkpoints, a known seed."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from jsonargparse import get_loader
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from transformers.utils.logging import disable_progress_bar

from app.cli.mistakes import refusing
from app.cli.options import check_values, reason, settled_seed, yaml_fault
from app.cli.run_record import RECORD, RunRecord, continue_newest_version, settle_checkpoint
from app.cli.slurm import check_processes, check_slurm
from app.core.errors import UserError
from app.core.files import shipped
from app.core.log_folder import claimed_log_folder
from callbacks import BY_NAME, SLOTS, TextProgress, in_order, refuse_listed
from lightning_modules.checkpoint import SafeCheckpointIO
from lightning_modules.private import leave_signals
from lightning_modules.start_checks import refuse_precision, refuse_strategy

# options of the Trainer that switch a slot, and the kind of callback in it
ENABLED = {"enable_checkpointing": ("checkpoint", Checkpoint), "enable_progress_bar": ("progress", ProgressBar)}
OwnOptions = dict[str, tuple[Any, Any, str]]  # of a command beside those of `fit`: name → type, default and help


class BetaDPOCLI(LightningCLI):
    """A LightningCLI with any stage as model and any source as data, chosen by `class_path`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for slot in SLOTS:
            parser.add_argument(f"--{slot.name}", type=slot.accepted, default=slot.default, help=slot.text)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        text = "Seed of the run; null has one picked, which the log and config.yaml record."
        parser.add_argument("--seed_everything", type=bool | int | None, default=None, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        command = self.config["subcommand"]
        options = self.config[command]
        check_values(options)
        refuse_listed([resolve_name(entry["class_path"]) for entry in as_list(options["trainer"]["callbacks"])])
        resumes, nodes = command == "fit" and options["ckpt_path"] is not None, options["trainer"]["num_nodes"]
        options["seed_everything"] = settled_seed(options["seed_everything"], resumes=resumes, nodes=nodes)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # checkpoints are never loaded in a way that runs their code, so the option has no use
        return {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Set up only the given command, because setting up the other three takes most of the start-up time."""
        given = {name: skipped for name, skipped in self.subcommands().items() if name in kwargs}
        self.subcommands = lambda: given  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def _add_instantiators(self) -> None:
        """Do nothing: Lightning would dump the configuration for hyperparameters that no stage saves."""

    _parse_ckpt_path = _add_instantiators  # hyperparameters in a checkpoint would override the command line

    def instantiate_classes(self) -> None:
        with refusing("The configuration"):
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        with refusing("Setting up the run", unless=self.trainer_has_begun), ExitStack() as self._claims:
            try:
                super()._run_subcommand(subcommand)
            except SystemExit:  # a signal's, which a scheduler may send to the first rank alone
                if self.trainer.strategy.launcher is not None:
                    self.trainer.strategy.launcher.kill(signal.SIGTERM)
                raise

    def trainer_has_begun(self) -> bool:
        """Return whether a batch has been taken; a later error is no mistake in the configuration."""
        run = self.trainer
        loops = (run.fit_loop.epoch_loop, run.validate_loop, run.test_loop, run.predict_loop)
        return any(loop.batch_progress.total.ready for loop in loops)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self._get(self.config_init, "trainer")
        refuse_strategy(options.get("strategy"))  # before Lightning starts processes
        refuse_precision(options.get("precision"))  # before Lightning replaces 16-mixed on a CPU
        if options.get("barebones"):
            raise UserError("trainer.barebones has no place here: it forbids logs and checkpoints; take it out.")
        if options.get("use_distributed_sampler") is False:
            raise UserError("trainer.use_distributed_sampler has no effect, ranks share every batch: take it out.")
        plugins = as_list(options.get("plugins"))
        if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            raise UserError("trainer.plugins: a CheckpointIO has no place here: writes are atomic; take it out.")
        plugins.append(SafeCheckpointIO())
        check_slurm()
        callbacks = self.callbacks(options)
        # if a slot is empty, Lightning would add its own callback
        for option, (_, kind) in ENABLED.items():
            if options[option] is None:
                kwargs[option] = any(isinstance(one, kind) for one in callbacks)
        if options.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False  # it reports 0 FLOPs; the stage logs the trained parameters
        try:
            trainer = super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)
        except Exception as error:
            if "gpu backend" in str(error):
                found = f"torch {torch.__version__} finds no GPU on this machine"
                cure = "use --trainer.accelerator cpu, or install the build of torch for your GPU"
                raise UserError(f"trainer.accelerator: {found}: {cure}.") from error
            raise UserError(f"trainer: {reason(error)} See `beta-dpo {self.subcommand} --help`.") from error
        check_processes(trainer)
        leave_signals(trainer)
        return trainer

    def callbacks(self, trainer: Any) -> list[Callback]:
        """Return the callbacks of the Trainer in their order, from the slots and the user's own list."""
        filled = {slot.name: self._get(self.config_init, slot.name) for slot in SLOTS}
        filled |= {slot: None for option, (slot, _) in ENABLED.items() if trainer[option] is False}
        if self.subcommand == "predict" and filled["scores"] is None and not trainer["callbacks"]:
            raise UserError("scores: predict would keep none of its scores: leave out --scores null.")
        progress = filled["progress"]
        if isinstance(progress, TextProgress) and progress.every_n_steps is None and sys.stdout.isatty():
            filled["progress"] = RichProgressBar()
        return in_order(filled, as_list(trainer["callbacks"]))

    def before_fit(self) -> None:
        options = self.config_init[self.subcommand]
        if options.ckpt_path == "last":
            continue_newest_version(self.trainer)
        if self.subcommand == "fit" or self.trainer.loggers:
            self._claims.enter_context(claimed_log_folder(self.trainer))
        options.ckpt_path = settle_checkpoint(self.trainer, options.ckpt_path, self.subcommand == "fit")

    before_validate = before_test = before_predict = before_fit


class PartsCLI(BetaDPOCLI):
    """A CLI that parses the options of `fit` and its `own`, and builds stage and data, but no Trainer."""

    def __init__(self, arguments: list[str], own: OwnOptions) -> None:
        self.own = own
        super().__init__(LightningModule, LightningDataModule, **lightning_options(["fit", *arguments[1:]]))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name, (kind, default, text) in self.own.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config)

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing: the command that parses the options has its own way with them."""


def as_list(given: Any) -> list[Any]:
    """Return as a list what Lightning accepts as one object, several or none."""
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def shipped_configs(arguments: list[str]) -> list[str]:
    """Return `arguments` with every configuration as `--config PATH` right after the command."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="?", action="append", default=[])
    given, options = parser.parse_known_args(arguments[1:])
    files: list[str] = []
    for name in given.config:
        files += ["--config"] if name is None else ["--config", shipped(name)]
    return [*arguments[:1], *files, *options]


def slots_as_wholes(arguments: list[str]) -> list[str]:
    """Return `arguments` of `shipped_configs` so that a slot in a later file replaces the whole slot."""
    found: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == "--config":
            is_file = os.path.isfile(word)
            try:
                given = get_loader("yaml")(Path(word).read_text(encoding="utf-8") if is_file else word)
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise UserError(f"{word} cannot be read as YAML: {yaml_fault(error)}.") from error
            if (is_file or not word) and not isinstance(given, dict):
                raise UserError(f"--config {word!r} holds no options: write a line `name: value` for each.")
            # jsonargparse would merge the options of both, so the slots are emptied before such a file
            slots = [name for name in BY_NAME if isinstance(given, dict) and given.get(name) is not None]
            found += [json.dumps(dict.fromkeys(slots)), "--config"] if slots else []
        found.append(word)
    return found


def lightning_options(arguments: list[str]) -> dict[str, Any]:
    """Return the settings of LightningCLI to parse `arguments`, the first of which is the subcommand."""
    command, arguments = arguments[0], shipped_configs(arguments)
    # one file name per command, so that `test` does not overwrite the record of the training
    record = RECORD if command == "fit" else f"config-{command}.yaml"
    return {
        "subclass_mode_model": True,
        "subclass_mode_data": True,
        "save_config_kwargs": {"overwrite": True, "config_filename": record, "command": arguments},
        "save_config_callback": RunRecord,
        "auto_configure_optimizers": False,
        "parser_kwargs": {"exit_on_error": False, command: {"exit_on_error": False}},
        "args": slots_as_wholes(arguments),
    }


def run_trainer_command(arguments: list[str]) -> None:
    """Parse `arguments` and run the command, their first word: `fit`, `validate`, `test` or `predict`."""
    BetaDPOCLI(LightningModule, LightningDataModule, **lightning_options(arguments))


def be_quiet() -> None:
    """Silence warnings that the user cannot act on, and set the format of the log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("app", "lightning_modules", "datamodules", "callbacks"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).handlers = [handler]  # set, not appended: a process may run several commands
    warnings.formatwarning = lambda message, *_, **__: f"WARNING: {message}\n"  # a user needs no line of the source
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' bars would fill a log file
    for message in (
        "LightningCLI's args parameter",  # `main` passes the command line as arguments on purpose
        "isinstance.treespec, LeafSpec",
        "ModelCheckpoint with manual optimization",  # which has the weights after the step, as intended
        "It is recommended to use `self.log.*sync_dist=True",  # every logged metric is that of the global batch
        "Checkpoint directory .* exists and is not empty",  # at every resume; `RunCheckpoint` refuses another run's
        "Total length of `list` across ranks is zero",  # in a run without validation pairs
        "does not have many workers",  # the loaders are ours and need none
        "is smaller than the logging interval",  # ours counts the steps of the run
        "`srun` command is available",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    # Lightning advertises a logging service in every run
    advertiser = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertiser.addFilter(lambda record: "litlogger" not in record.getMessage())
