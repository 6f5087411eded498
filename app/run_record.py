"""What a run was, kept where it is needed later: beside its log, and within every checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml`, and puts configuration and newest metrics into checkpoints for `beta-dpo export`."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.parser.dump(self.config, skip_none=False)
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
