"""Inputs that both sides of a comparison share (a tiny random Llama, a file of pairs), and `beta-dpo fit` runs."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from app.main import main
from benchmarks.setting import save_llama
from datamodules.controlled_task import build_tokenizer, preference_pairs

BETA0, ALPHA, KEEP_RATIO = 0.1, 0.6, 0.8
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 0.5  # the gradient norm is larger, so that clipping is active


@dataclass
class Bench:
    """A folder with `model/` (weights and tokenizer) and `pairs.jsonl`, the only inputs of both sides."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, pairs: int) -> Bench:
        """Write a Llama of two layers and `pairs` controlled pairs; large weights soon make the gaps differ."""
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
        save_llama(folder / "model", build_tokenizer(), 5.0, **sizes, num_attention_heads=4, num_key_value_heads=2)
        made = pd.DataFrame(preference_pairs(pairs, seed=7, flip_rate=0.2))[
            ["pair_id", "prompt", "chosen", "rejected"]
        ]
        made.to_json(folder / "pairs.jsonl", orient="records", lines=True)
        return cls(folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def rows(self) -> dict[str, dict[str, str]]:
        """Return the rows of the file by `pair_id`."""
        lines = (self.folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["pair_id"]: row for row in map(json.loads, lines)}

    def parameters(self) -> dict[str, Tensor]:
        """Return the weights from which training starts."""
        return dict(AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).named_parameters())


@dataclass
class Step:
    """One optimizer step of a run, read from its audit and log; arrays are [n] in the order of the batch."""

    pair_ids: list[str]
    gaps: NDArray[np.float64]
    log_weights: NDArray[np.float64]  # NaN without a filter
    kept: NDArray[np.bool_]
    beta: float
    mean: float  # M0; NaN without statistics
    std: float
    loss: float


@dataclass
class Run:
    steps: list[Step]
    parameters: dict[str, Tensor]  # of the policy, after the last step


def fit(bench: Bench, name: str, method: str, steps: int, batch_size: int, *options: str) -> Run:
    """Run `beta-dpo fit` with the overlay configs/method/`method`.yaml, as on the command line; return the run."""
    quoted, model = shlex.quote(str(bench.folder)), shlex.quote(str(bench.model))
    # micro_batch_tokens is small enough for several micro-batches per step
    settings = f"""
        --seed_everything 5
        --model lightning_modules.PreferenceOptimization --model.name {model} --model.beta0 {BETA0}
        --model.optimizer torch.optim.AdamW --model.optimizer.lr {LEARNING_RATE} --model.optimizer.weight_decay 0.0
        --model.max_grad_norm {MAX_GRAD_NORM}
        --data datamodules.PreferenceData --data.path {quoted}/pairs.jsonl --data.batch_size {batch_size}
        --data.micro_batch_tokens 600
        --trainer.accelerator cpu --trainer.max_steps {steps} --trainer.log_every_n_steps 1
        --trainer.enable_progress_bar false --trainer.enable_model_summary false
        --trainer.logger CSVLogger --trainer.logger.save_dir {quoted} --trainer.logger.name {name}
        --trainer.logger.version ''
    """
    main(["fit", *shlex.split(settings), "--config", f"configs/method/{method}.yaml", *options])
    return read_run(bench.folder / name)


def read_run(folder: Path) -> Run:
    """Read a finished run from its log folder: audit, logged loss and last checkpoint."""
    losses = pd.read_csv(folder / "metrics.csv", float_precision="round_trip")["train/loss"].dropna().to_numpy()
    audit = pq.read_table(folder / "audit").to_pandas()
    steps = []
    for (_, rows), loss in zip(audit.groupby("step"), losses, strict=True):
        arrays = (rows.gap.to_numpy(), rows.log_weight.to_numpy(dtype=np.float64), rows.kept.to_numpy())
        beta, mean, std = (float(rows[name].iloc[0]) for name in ("beta", "running_mean", "running_std"))
        steps.append(Step(rows.pair_id.tolist(), *arrays, beta, mean, std, float(loss)))
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return Run(steps, {name.removeprefix("policy.model."): value for name, value in state.items()})


def token_ids(row: dict[str, str], side: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return prompt and response of a row as tokens, with the end-of-turn token after the response."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    response = tokenizer(row[side], add_special_tokens=False)["input_ids"]
    return prompt, [*response, tokenizer.eos_token_id]


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return ‖left − right‖ over all parameters of `right`."""
    return norm({name: left[name].double() - value.double() for name, value in right.items()})


def norm(parameters: dict[str, Tensor]) -> float:
    return float(torch.cat([value.detach().double().flatten() for value in parameters.values()]).norm())
