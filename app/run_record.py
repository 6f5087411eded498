"""What a run leaves behind about itself: configuration and commands beside its log, and within every checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

COMMANDS_FILE = "commands.txt"


class RunRecord(SaveConfigCallback):
    """Writes config.yaml, and adds the command to `commands.txt`, one line per start: a resumed run has several.

    Configuration and newest metrics also go into every checkpoint, for the model card of `beta-dpo export`.
    """

    def __init__(self, *settings: Any, command: Sequence[str], **more: Any):
        super().__init__(*settings, **more)
        self.command = command

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # on every rank: Lightning asks the others for the folder, and `save_config` is called on the first alone
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning on the first rank, once config.yaml is written."""
        with open(self.folder / COMMANDS_FILE, "a", encoding="utf-8") as file:
            file.write(shlex.join(["beta-dpo", *self.command]) + "\n")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.parser.dump(self.config, skip_none=False)
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
