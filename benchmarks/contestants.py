"""The contestants of the benchmarks; `python -m benchmarks.contestants NAME SETTING` prints the result of one."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.setting import BETA, LEARNING_RATE, MAX_LENGTH, SPLIT_BATCHES, Setting, pairs_of
from callbacks import BetaScheduler, PairFilter, RewardGapStatistics
from datamodules import PreferenceData
from datamodules.loader import OptimizerBatchLoader
from lightning_modules import PreferenceOptimization

SPLIT_TOKENS = 1536  # the smallest budget for any pair with max_length 512


def result(setting: Setting, seconds: float, how: str) -> dict[str, Any]:
    """Return a contestant's result; `how` names attention, layout of the rows, and compiled or eager layers."""
    peak = (
        torch.cuda.max_memory_allocated() / 1e9
        if setting.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    return {
        "pairs_per_second": setting.steps * setting.batch_size / seconds,
        "peak_gb": peak,
        "seconds": seconds,
        "how": f"{setting.device}, {how}",
    }


def now(setting: Setting) -> float:
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class FileOrder(PreferenceData):
    """A data module that serves training pairs in the order of the file."""

    def train_dataloader(self) -> OptimizerBatchLoader | list:
        loader = super().train_dataloader()
        assert isinstance(loader, OptimizerBatchLoader)
        loader.shuffle = False
        return loader


class Clock(Callback):
    """A callback that times all steps except the first."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.started = self.stopped = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            self.started = now(self.setting)
        if trainer.global_step == trainer.max_steps:
            self.stopped = now(self.setting)


def train_ours(
    setting: Setting,
    beta_dpo: bool = False,
    reference: str = "frozen",
    compiled: bool = False,
    attention: str = "auto",
) -> dict[str, Any]:
    """Measure `PreferenceOptimization` in a Lightning Trainer, as a user runs it."""
    clock = Clock(setting)
    method = [RewardGapStatistics(), PairFilter(keep_ratio=0.8), BetaScheduler()] if beta_dpo else []
    trainer = Trainer(
        max_steps=setting.steps + 1,
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        precision="bf16-mixed" if setting.device == "cuda" else "32-true",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*method, clock],
    )
    module = PreferenceOptimization(
        setting.model,
        beta0=BETA,
        reference=reference,  # type: ignore[arg-type]
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        max_grad_norm=1.0,
        attention=attention,  # type: ignore[arg-type]
        compile_layers=compiled,
    )
    data = FileOrder(
        setting.data,
        batch_size=setting.batch_size,
        micro_batch_tokens=setting.micro_batch_tokens,
        max_length=MAX_LENGTH,
        seed=0,
    )
    trainer.fit(module, datamodule=data)
    layers = "compiled layers" if module.policy.compiled else "eager"
    return result(setting, clock.stopped - clock.started, f"{module.policy.attention}, {module.layout}, {layers}")


def train_plain(setting: Setting) -> dict[str, Any]:
    """Measure a plain transformers step: two padded rows per pair, logits of response positions only."""
    pairs = pairs_of(setting)
    policy = AutoModelForCausalLM.from_pretrained(setting.model).train().to(setting.device)
    reference = AutoModelForCausalLM.from_pretrained(setting.model).eval().requires_grad_(False)
    reference = reference.to(setting.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def logps(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        wanted = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, (prompt, response) in enumerate(rows):
            both = torch.cat([prompt, response])
            ids[row, : len(both)] = both
            mask[row, : len(both)] = 1
            wanted[row, len(prompt) : len(both)] = True
        ids, mask, wanted = (each.to(setting.device) for each in (ids, mask, wanted))
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        wanted, targets = wanted[:, 1:], ids[:, 1:]
        tokens = []
        for chunk, target in zip(hidden[wanted].split(1024), targets[wanted].split(1024), strict=True):
            tokens.append(-F.cross_entropy(model.lm_head(chunk).float(), target, reduction="none"))
        owner = wanted.nonzero()[:, 0]
        return torch.zeros(len(rows), device=setting.device).index_add(0, owner, torch.cat(tokens))

    def steps() -> Iterator[None]:
        for start in range(0, len(pairs), setting.batch_size):
            batch = pairs[start : start + setting.batch_size]
            rows = [(p.prompt, p.chosen) for p in batch] + [(p.prompt, p.rejected) for p in batch]
            tensors = [(torch.from_numpy(prompt), torch.from_numpy(response)) for prompt, response in rows]
            with torch.autocast(setting.device, torch.bfloat16, enabled=setting.device == "cuda"):
                with torch.no_grad():
                    fixed = logps(reference, tensors)
                ratio = logps(policy, tensors) - fixed
            gap = ratio[: len(batch)] - ratio[len(batch) :]
            (-F.logsigmoid(BETA * gap)).mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield

    run = steps()
    next(run)
    started = now(setting)
    for _ in range(setting.steps):
        next(run)
    seconds = now(setting) - started
    return result(setting, seconds, f"{policy.config._attn_implementation}, padded, eager")


def train_trl(setting: Setting) -> dict[str, Any]:
    """Measure TRL's `DPOTrainer` with its defaults, on the same token ids decoded to text, in the same order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def text(ids: Any) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    data = Dataset.from_list(
        [
            {"prompt": text(p.prompt), "chosen": text(p.chosen), "rejected": text(p.rejected)}
            for p in pairs_of(setting)
        ]
    )

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Watch(TrainerCallback):
        started = stopped = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                self.started = now(setting)
            if state.global_step == setting.steps + 1:
                self.stopped = now(setting)

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=AutoModelForCausalLM.from_pretrained(setting.model),
            args=DPOConfig(
                output_dir=folder,
                # padded rows of a large batch do not fit a GPU at once
                per_device_train_batch_size=min(setting.batch_size, 8),
                gradient_accumulation_steps=max(setting.batch_size // 8, 1),
                max_steps=setting.steps + 1,
                max_length=MAX_LENGTH,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                beta=BETA,
                max_grad_norm=1.0,
                use_cpu=setting.device == "cpu",
                bf16=setting.device == "cuda",
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.train()
    how = f"{trainer.model.config._attn_implementation}, padded, eager"
    return result(setting, watch.stopped - watch.started, how)


def matrix_products(setting: Setting) -> dict[str, Any]:
    """Measure this machine's matrix products in the model's shapes, in operations per second.

    Returns the faster of two: the feed-forward network on one batch's tokens, and the head on a slice of the
    vocabulary.
    """
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    tokens = 215 * setting.batch_size
    rates = []
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


def split(setting: Setting) -> Setting:
    """Return the setting with a larger batch in several micro-batches."""
    return replace(setting, micro_batch_tokens=SPLIT_TOKENS, batch_size=SPLIT_BATCHES * setting.batch_size)


CONTESTANTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "ours": train_ours,
    "ours-compiled": lambda setting: train_ours(setting, compiled=True),
    "ours-flex": lambda setting: train_ours(setting, compiled=True, attention="flex"),
    "ours-varlen": lambda setting: train_ours(setting, compiled=True, attention="varlen"),
    "ours-cached": lambda setting: train_ours(setting, True, "cached"),
    "ours-split": lambda setting: train_ours(split(setting)),
    "ours-split-cached": lambda setting: train_ours(split(setting), True, "cached"),
    "plain": train_plain,
    "trl": train_trl,
    "gemm": matrix_products,
}


def profile(name: str, setting: Setting) -> None:
    """Print the time per torch operation over all steps."""
    with torch.profiler.profile() as recorded:
        CONTESTANTS[name](setting)
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


if __name__ == "__main__":
    name, setting = sys.argv[1], Setting.read(sys.argv[2])
    if sys.argv[3:] == ["--profile"]:
        profile(name, setting)
    else:
        print(json.dumps(CONTESTANTS[name](setting)))
