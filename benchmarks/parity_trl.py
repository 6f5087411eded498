"""Comparison with TRL's `DPOTrainer` at a fixed β: same weights, pairs, order, AdamW, clipping and precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.parity_runs import BETA0, LEARNING_RATE, MAX_GRAD_NORM, Bench, Run, fit, token_ids

STEPS, BATCH_SIZE, SMOOTHING = 10, 8, 0.1


class Case(NamedTuple):
    """A loss: its options in this project, and the options that make TRL compute it."""

    name: str
    ours: list[str]
    theirs: dict[str, Any]
    beta: float = BETA0


SMOOTHED = f"--model.loss.label_smoothing={SMOOTHING}"
# TRL 1.16 ignores label_smoothing in `sigmoid`: cDPO = 2(1 − ε)·DPO − (1 − 2ε)·robust
CDPO = {"loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - SMOOTHING), 2 * SMOOTHING - 1]}
CASES = [
    Case("DPO", ["SigmoidLoss"], {"loss_type": ["sigmoid"]}),
    Case("cDPO", ["SigmoidLoss", SMOOTHED], {**CDPO, "label_smoothing": SMOOTHING}),
    Case("robust DPO", ["RobustLoss", SMOOTHED], {"loss_type": ["robust"], "label_smoothing": SMOOTHING}),
    # β = 0.5 puts some pairs beyond the kink, where the gradient is zero
    Case("hinge, β = 0.5", ["HingeLoss"], {"loss_type": ["hinge"]}, beta=0.5),
    Case("IPO, per token", ["LengthNormalisedIPOLoss"], {"loss_type": ["ipo"]}),
    Case("SPPO, hard", ["SPPOHardLoss"], {"loss_type": ["sppo_hard"]}),
]


class RecordingDPOTrainer(DPOTrainer):
    """A TRL trainer that records every loss as computed, because TRL's log rounds or averages losses."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        result = super().compute_loss(*arguments, **options)
        self.losses = [*getattr(self, "losses", []), float(result.detach())]
        return result


def compare(bench: Bench) -> Iterator[tuple[str, Run, list[float], dict[str, Tensor]]]:
    """Train every case with both; yield its name, this project's run, and TRL's losses per step and parameters."""
    disable_progress_bars()
    for number, case in enumerate(CASES):
        loss = f"--model.loss=app.method.losses.{case.ours[0]}"
        options = [loss, *case.ours[1:], f"--model.beta0={case.beta}"]
        run = fit(bench, f"loss-{number}", "dpo", STEPS, BATCH_SIZE, *options)
        order = [pair_id for step in run.steps for pair_id in step.pair_ids]
        yield case.name, run, *train_trl(bench, order, case, bench.folder / f"trl-{number}")


def trl_settings(folder: str | Path, **options: Any) -> DPOConfig:
    """Return the options that make TRL do what `parity_runs.fit` does; `options` are added or override them."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DPOConfig(output_dir=str(folder), **(settings | options))


def train_trl(bench: Bench, order: list[str], case: Case, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Train TRL on the pairs in this order; return losses per step and final parameters."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    rows = [bench.rows[pair_id] for pair_id in order]
    trainer = RecordingDPOTrainer(
        AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32),
        args=trl_settings(folder, beta=case.beta, **case.theirs),
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.train_dataset, Dataset)
    for row, seen in zip(rows, trainer.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            assert token_ids(row, side, tokenizer) == (seen["prompt_ids"], seen[f"{side}_ids"]), row["pair_id"]
    trainer.train()
    assert trainer.model is not None
    return trainer.losses, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
