"""Runs of the quickstart's own configurations, cut down to a few steps of a tiny model."""

from __future__ import annotations

from pathlib import Path

from command_runs import ROOT, command

STEPS = 24


def quickstart_run(folder: Path, model: str, arm: str, *options: str) -> Path:
    """Train `arm` (a file of configs/method) by `beta-dpo fit`, as the quickstart does; returns its log folder."""
    done = command(
        folder,
        "fit",
        *("--config", str(ROOT / "configs/quickstart.yaml"), "--config", str(ROOT / f"configs/method/{arm}.yaml")),
        *("--model.name", model, "--model.optimizer.init_args.lr", "0.003"),
        *("--data.pairs", str(STEPS * 20), "--data.batch_size", "20", "--data.validation_pairs", "40"),
        *("--trainer.logger.init_args.save_dir", "runs", "--trainer.logger.init_args.name", arm),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *options,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / arm
