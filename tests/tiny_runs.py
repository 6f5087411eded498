"""Runs small enough for a test: random models of many families, the controlled task, a silent Trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from app.method.losses import SigmoidLoss
from app.method.pair_loss import PairLogps
from app.method.step import StepDecision
from callbacks import BetaScheduler, PairFilter, RewardGapStatistics
from datamodules import ControlledTask
from datamodules.base import PairDataModule, Split
from datamodules.controlled_task import build_tokenizer
from datamodules.table import PairTable
from lightning_modules import PreferenceOptimization
from lightning_modules.base import LanguageModelTraining

VOCABULARY = 116  # of the controlled task
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_window": {"model_type": "mistral", "sliding_window": 6},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "phi3": {"model_type": "phi3"},
    "opt": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"model_type": "bloom"},
    "mpt": {"model_type": "mpt"},
    "gptj": {"model_type": "gptj", "rotary_dim": 4},
}


def tiny_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A random model in float32 whose weights are wide enough for every token to sway the outputs."""
    description = {**_COMMON, **FAMILIES[family], **settings}
    config = AutoConfig.for_model(description.pop("model_type"), **description)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 5
    return model.eval()


def save_tiny_model(family: str, folder: Path, **settings: Any) -> str:
    """The same on disk, with the controlled task's tokenizer beside it."""
    tiny_model(family, **settings).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, outputs: int = 1, template: str | None = None) -> str:
    """A random Llama with a classifier on it, and the controlled task's tokenizer with a chat template."""
    description = {**_COMMON, "num_labels": outputs, "max_position_embeddings": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **description))
    model.save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_logps(model: Any, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """log π of each response token [n], by one plain row and log_softmax: independent of the project's code."""
    ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
    logps = torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)[0, len(prompt) - 1 : -1]
    return logps.gather(-1, torch.from_numpy(response)[:, None]).squeeze(-1)


def controlled(pairs: int, batch_size: int = 10, micro_batch_tokens: int = 8192, **settings: Any) -> ControlledTask:
    """Pairs of the controlled task, some of them flipped."""
    defaults = {"validation_pairs": 7, "test_pairs": 7, "seed": 3, "flip_rate": 0.2}
    return ControlledTask(
        pairs=pairs, batch_size=batch_size, micro_batch_tokens=micro_batch_tokens, **(defaults | settings)
    )


def table_of(data: PairDataModule, split: Split = "train") -> tuple[PairTable, np.ndarray]:
    """The table and the rows of a split that the data has."""
    opened = data.open_table(split)
    assert opened is not None, split
    return opened


def rarest_token(pairs: int = 20) -> int:
    """A token that one of the `controlled` training pairs alone holds."""
    table, rows = table_of(controlled(pairs))
    holders: Counter[int] = Counter()
    for row in rows:
        holders.update({int(token) for ids in table[int(row)] if ids is not None for token in ids})
    return next(token for token, count in sorted(holders.items()) if count == 1)


def preference(name: str, lr: float = 0.5, **settings: Any) -> PreferenceOptimization:
    """A stage with plain SGD: rounding stays rounding, which Adam's division would blow up."""
    settings = {"optimizer": partial(torch.optim.SGD, lr=lr, momentum=0.5), "max_grad_norm": 0.5, **settings}
    return PreferenceOptimization(name, **settings)


def beta_dpo(keep_ratio: float = 0.6, alpha: float = 0.6) -> list[Callback]:
    """The callbacks of β-DPO in their order."""
    return [RewardGapStatistics(), PairFilter(keep_ratio, seed=11), BetaScheduler(alpha)]


class Recorder(Callback):
    """Keeps every decision as it stood when all callbacks had had their say."""

    def __init__(self) -> None:
        self.decisions: list[StepDecision] = []
        self._current: StepDecision | None = None

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        self._current = decision

    def on_train_batch_end(self, *_: object) -> None:
        if self._current is not None:
            self.decisions.append(self._current)
            self._current = None


def quiet_trainer(folder: Path, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """A Trainer on the CPU that shows and keeps nothing unless `settings` say so."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        **settings,
    }
    return Trainer(callbacks=list(callbacks), **settings)


def predicted(trainer: Trainer, module: PreferenceOptimization, data: PairDataModule, column: str) -> Tensor:
    """One column of what `predict` returns, a number for each pair."""
    parts: Any = trainer.predict(module, data)
    return torch.tensor([value for part in parts for value in part[column]])


def weights(module: LanguageModelTraining) -> dict[str, Tensor]:
    """A copy of the policy's parameters."""
    return {name: tensor.detach().clone() for name, tensor in module.policy.named_parameters()}


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def relative_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """‖left − right‖ / ‖left‖ over all parameters."""
    assert left.keys() == right.keys()
    apart = sum(float((left[name].double() - right[name].double()).square().sum()) for name in left)
    return (apart / sum(float(tensor.double().square().sum()) for tensor in left.values())) ** 0.5


def gaps_only(gaps: torch.Tensor) -> PairLogps:
    """Pairs of one-token responses whose gap, normalised or not, is `gaps` [G]."""
    zero, one = torch.zeros_like(gaps), torch.ones(gaps.shape, dtype=torch.int64)
    return PairLogps(gaps, zero, zero, zero, one, one)


def decision_on(
    gaps: Sequence[float], step: int = 0, beta0: float = 0.1, labels: Mapping[str, Sequence[object]] | None = None
) -> StepDecision:
    """Plain DPO on pairs with these gaps, before any callback."""
    logps = gaps_only(torch.tensor(gaps, dtype=torch.float64))
    return StepDecision(step, [f"pair-{i}" for i in range(len(gaps))], logps, SigmoidLoss(), beta0, labels or {})
