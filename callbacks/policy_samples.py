"""Answers sampled from the policy at every validation, as text files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import GenerationConfig

from app.core.errors import UserError
from app.core.files import atomic_file
from app.core.log_folder import log_folder
from app.core.samples import sample_line
from app.method.ranges import PositiveInt, Seed, checked


@checked
@dataclass(eq=False)
class PolicySamples(Callback):
    """A callback that writes answers to the first validation prompts to `<log dir>/samples/step-*.jsonl`.

    Rank 0 samples from its copy of the policy, one prompt at a time, while the other ranks wait. Sharded policies
    (FSDP2) have no whole copy and are refused: use `beta-dpo generate` on an exported checkpoint. Sampling changes
    neither the weights nor the random state of training.

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
            raise UserError(
                "PolicySamples cannot sample from a sharded policy: set --samples null, and use "
                "`beta-dpo generate` on an exported checkpoint."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not sum(trainer.num_val_batches):
            raise UserError(
                "PolicySamples answers validation prompts, and this run has none: give data.validation_path or "
                "data.validation_share (and trainer.limit_val_batches), or set --samples null."
            )

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
        answers = self.sample(pl_module, tokenizer.eos_token_id)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which leaves no file
            return
        with atomic_file(folder / f"step-{trainer.global_step:08d}.jsonl") as temporary:
            lines = [
                sample_line(
                    str(number),
                    tokenizer.decode(prompt),
                    tokenizer.decode(answer[:-1] if finished else answer, skip_special_tokens=True),
                    finished,
                    tokens=len(answer),
                    prompt_ids=list(map(int, prompt)),
                    response_ids=answer.tolist(),
                )
                for number, (prompt, (answer, finished)) in enumerate(zip(self._prompts, answers, strict=True))
            ]
            temporary.write_text("".join(lines), encoding="utf-8")

    @torch.no_grad()
    def sample(self, pl_module: LightningModule, pad: int) -> list[tuple[Tensor, bool]]:
        """Return one answer [n] to each prompt, sampled at temperature 1, and whether it is finished.

        An answer ends at the stop tokens of the policy's generation config: end-of-turn or end-of-text.
        """
        policy: Any = pl_module.policy
        model, training, own = policy.model, policy.training, policy.model.generation_config
        stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        policy.eval()  # in train mode, gradient checkpointing switches the key-value cache off
        answers = []
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        precision = pl_module.trainer.precision_plugin.forward_context()  # Lightning's steps alone run in it
        try:
            # the forward pass of the training step takes packed rows only
            with policy.as_loaded(), torch.random.fork_rng(devices), precision:
                torch.manual_seed(self.seed)
                model.generation_config = GenerationConfig()  # its own has a temperature, a nucleus or penalties
                for prompt in self._prompts:
                    ids = torch.as_tensor(prompt, device=pl_module.device)[None]
                    output = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=True,
                        top_k=0,
                        max_new_tokens=self.max_new_tokens,
                        eos_token_id=stops,
                        pad_token_id=pad,
                    )
                    answer = output[0, ids.shape[1] :].cpu()
                    answers.append((answer, int(answer[-1]) in stops))
        finally:
            model.generation_config = own
            policy.train(training)
        return answers
