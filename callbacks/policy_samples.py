"""Answers sampled from the policy at every validation, as text files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import GenerationConfig

from app.core.errors import UserError
from app.core.files import atomic_file
from app.core.log_folder import log_folder
from app.core.samples import as_sample, sample, sample_line
from app.method.ranges import PositiveInt, Seed, checked


@checked
@dataclass(eq=False)
class PolicySamples(Callback):
    """A callback that writes answers to the first validation prompts to `<log dir>/samples/step-*.jsonl`.

    Rank 0 samples from its copy of the policy, which a sharded one is not, one prompt at a time, while the other
    ranks wait. Sampling changes neither the weights nor the random state of training.

    Args:
        prompts: number of prompts.
        max_new_tokens: length limit of an answer, in tokens.
        seed: seed of the sampling, the same at every validation, so that differences come from the policy.
    """

    prompts: PositiveInt = 4
    max_new_tokens: PositiveInt = 64
    seed: Seed = 0

    def __post_init__(self) -> None:
        self._prompts: list[Any] = []  # token ids, the first of the validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            cure = "set --samples null, and use `beta-dpo generate` on an exported checkpoint"
            raise UserError(f"PolicySamples cannot sample from a sharded policy: {cure}.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not sum(trainer.num_val_batches):
            cure = "give data.validation_path or data.validation_share, or set --samples null"
            raise UserError(f"PolicySamples answers validation prompts, and this run has none: {cure}.")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: object
    ) -> None:
        if batch_idx == 0:
            self._prompts = []
        self._prompts += [pair.prompt for pair in batch.share[: self.prompts - len(self._prompts)]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # every rank must call log_folder, because Lightning broadcasts it
        folder = log_folder(trainer) / "samples"
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        answers = self.sample(pl_module, tokenizer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which leaves no file
            return
        with atomic_file(folder / f"step-{trainer.global_step:08d}.jsonl") as temporary:
            asked = enumerate(zip(self._prompts, answers, strict=True))
            lines = [sample_line(str(number), tokenizer.decode(prompt), **own) for number, (prompt, own) in asked]
            temporary.write_text("".join(lines), encoding="utf-8")

    def sample(self, pl_module: LightningModule, tokenizer: Any) -> list[dict[str, Any]]:
        """Return an answer to each prompt at temperature 1, up to a stop id of the policy's generation config."""
        policy: Any = pl_module.policy
        model, training, own = policy.model, policy.training, policy.model.generation_config
        stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        policy.eval()  # in train mode, gradient checkpointing switches the key-value cache off
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        precision = pl_module.trainer.precision_plugin.forward_context()  # Lightning's steps alone run in it
        sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": self.max_new_tokens}
        try:
            # the forward pass of the training step takes packed rows only
            with policy.as_loaded(), torch.random.fork_rng(devices), precision:
                torch.manual_seed(self.seed)
                model.generation_config = GenerationConfig()  # its own has a temperature, a nucleus or penalties
                answers = [sample(model, [prompt], stops, sampling)[0] for prompt in self._prompts]
        finally:
            model.generation_config = own
            policy.train(training)
        asked = zip(self._prompts, answers, strict=True)
        return [as_sample(tokenizer, prompt, answer, stops) for prompt, answer in asked]
