"""The contestants of the benchmarks; `python -m benchmarks.contestants NAME SETTING` prints the result of one."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.parity_method import response_logps
from benchmarks.setting import BETA, LEARNING_RATE, MAX_LENGTH, SPLIT_BATCHES, Setting, decoded, pairs_of
from callbacks import BetaScheduler, PairFilter, RewardGapStatistics
from datamodules import PreferenceData
from datamodules.ranking import Ranking
from lightning_modules import PreferenceOptimization

SPLIT_TOKENS = 1536  # the smallest budget for any pair with max_length 512


class Clock(Callback):
    """A clock of all steps except the first; as a callback it is wound by Lightning, else by `after_step`."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.started = self.stopped = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.after_step(trainer.global_step)

    def after_step(self, done: int) -> None:
        """Note the time if the first or the last of the steps is `done`."""
        if done == 1:
            self.started = now(self.setting)
        if done == self.setting.steps + 1:
            self.stopped = now(self.setting)

    def result(self, how: str) -> dict[str, Any]:
        """Return a contestant's result; `how` names attention, layout of the rows, and compiled or eager layers."""
        seconds, peak = self.stopped - self.started, 1e3 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self.setting.device == "cuda":
            peak = float(torch.cuda.max_memory_allocated())
        return {
            "pairs_per_second": self.setting.steps * self.setting.batch_size / seconds,
            "peak_gb": peak / 1e9,
            "seconds": seconds,
            "how": f"{self.setting.device}, {how}",
        }


def now(setting: Setting) -> float:
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_ours(
    setting: Setting,
    beta_dpo: bool = False,
    reference: Any = "frozen",
    compiled: bool = False,
    attention: Any = "auto",
    split: bool = False,
) -> dict[str, Any]:
    """Measure `PreferenceOptimization` in a Lightning Trainer, as a user runs it."""
    if split:  # a larger batch in several micro-batches
        larger = SPLIT_BATCHES * setting.batch_size
        setting = replace(setting, micro_batch_tokens=SPLIT_TOKENS, batch_size=larger)
    clock = Clock(setting)
    method = [RewardGapStatistics(), PairFilter(keep_ratio=0.8), BetaScheduler()] if beta_dpo else []
    trainer = Trainer(
        max_steps=setting.steps + 1,
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        precision="bf16-mixed" if setting.device == "cuda" else "32-true",
        devices=1,
        callbacks=[*method, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PreferenceOptimization(
        setting.model,
        beta0=BETA,
        reference=reference,
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        max_grad_norm=1.0,
        attention=attention,
        compile_layers=compiled,
    )
    data = PreferenceData(
        setting.data,
        order=Ranking("place", first="smallest"),
        batch_size=setting.batch_size,
        micro_batch_tokens=setting.micro_batch_tokens,
        max_length=MAX_LENGTH,
        seed=0,
    )
    trainer.fit(module, datamodule=data)
    layers = "compiled layers" if module.policy.compiled else "eager"
    return clock.result(f"{module.policy.attention}, {module.policy.layout}, {layers}")


def train_plain(setting: Setting) -> dict[str, Any]:
    """Measure a plain transformers step: two padded rows per pair, logits of response positions only."""
    pairs, clock = pairs_of(setting), Clock(setting)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(setting.model) for _ in range(2)]
    policy, reference = (model.to(setting.device) for model in models)
    policy.train()
    reference.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    for step in range(setting.steps + 1):
        batch = pairs[step * setting.batch_size :][: setting.batch_size]
        rows = [(pair.prompt, getattr(pair, side)) for side in ("chosen", "rejected") for pair in batch]
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.device == "cuda"):
            with torch.no_grad():
                fixed = response_logps(reference, rows)
            chosen, rejected = (response_logps(policy, rows) - fixed).chunk(2)
        (-F.logsigmoid(BETA * (chosen - rejected))).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.after_step(step + 1)
    return clock.result(f"{policy.config._attn_implementation}, padded, eager")


def train_trl(setting: Setting) -> dict[str, Any]:
    """Measure TRL's `DPOTrainer` with its defaults, on the same token ids decoded to text, in the same order."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOTrainer

    from benchmarks.parity_trl import trl_settings

    tokenizer, clock = AutoTokenizer.from_pretrained(setting.model), Clock(setting)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [decoded(pair, tokenizer) for pair in pairs_of(setting)]

    class Wound(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.after_step(state.global_step)

    model: Any = AutoModelForCausalLM.from_pretrained(setting.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=model,
            args=trl_settings(
                folder,
                # padded rows of a large batch do not fit a GPU at once
                per_device_train_batch_size=min(setting.batch_size, 8),
                gradient_accumulation_steps=max(setting.batch_size // 8, 1),
                max_steps=setting.steps + 1,
                max_length=MAX_LENGTH,
                learning_rate=LEARNING_RATE,
                beta=BETA,
                max_grad_norm=1.0,
                use_cpu=setting.device == "cpu",
                bf16=setting.device == "cuda",
                optim="adamw_torch_fused",
                dataloader_pin_memory=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Wound()],
        )
        trainer.train()
    return clock.result(f"{model.config._attn_implementation}, padded, eager")


def matrix_products(setting: Setting) -> dict[str, Any]:
    """Measure this machine's matrix products in the model's shapes, in operations per second, the faster of two."""
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    tokens = 215 * setting.batch_size
    rates = []
    # the feed-forward network on one batch's tokens, and the head on a slice of the vocabulary
    for rows, inner, columns in ((tokens, setting.hidden, 4 * setting.hidden), (tokens // 2, setting.hidden, 8192)):
        left = torch.randn(rows, inner, dtype=dtype, device=setting.device)
        right = torch.randn(columns, inner, dtype=dtype, device=setting.device)
        F.linear(left, right)
        started, done = now(setting), 0
        while (seconds := now(setting) - started) < 1.0:
            for _ in range(20):
                F.linear(left, right)
            done += 20
        rates.append(done * 2.0 * rows * inner * columns / seconds)
    return {"operations_per_second": max(rates)}


CONTESTANTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "ours": train_ours,
    "ours-compiled": partial(train_ours, compiled=True),
    "ours-flex": partial(train_ours, compiled=True, attention="flex"),
    "ours-varlen": partial(train_ours, compiled=True, attention="varlen"),
    "ours-cached": partial(train_ours, beta_dpo=True, reference="cached"),
    "ours-split": partial(train_ours, split=True),
    "ours-split-cached": partial(train_ours, split=True, beta_dpo=True, reference="cached"),
    "plain": train_plain,
    "trl": train_trl,
    "gemm": matrix_products,
}


def main(name: str, setting: str, profiled: str = "") -> None:
    """Print a contestant's result as JSON, or its time per torch operation over all steps."""
    with torch.profiler.profile() if profiled else nullcontext() as recorded:
        result = CONTESTANTS[name](Setting(**json.loads(setting)))
    if recorded is None:
        print(json.dumps(result))
    else:
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


if __name__ == "__main__":
    main(*sys.argv[1:])
