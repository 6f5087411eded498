"""One rank of a two-process run on gloo, started by test_distributed.

`python distributed_run.py MODEL EXACT_MODEL FOLDER`: the second model is trained in float64 (see EXACT).

For every strategy and scenario it leaves the audit in FOLDER/<strategy>-<scenario> and, beside it, the whole final
weights and validation metrics in a file of this name with the suffix .pt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer, weights  # noqa: E402
from torch import Tensor  # noqa: E402

from callbacks import AnnotatorReliability, GammaPOMargin, LossWeights, PairAudit  # noqa: E402
from lightning_modules import ShardedStrategy, SupervisedFineTuning  # noqa: E402
from lightning_modules.lora import Lora  # noqa: E402

# pairs, micro_batch_tokens: the last batch holds two pairs, of which one rank keeps none, in a single pass; or
# one pair, of which one rank has none at all, in several micro-batches
SCENARIOS = {"single_pass": (22, 8192), "many_passes": (21, 115)}
# micro_batch_tokens by the number of micro-batches that one process makes of ten pairs. In float64, for a family
# that computes nothing in float32 (Llama's norms do): what is left of a difference is no rounding.
EXACT = {1: 8192, 2: 300, 5: 130}
STRATEGIES = ("ddp", "fsdp2")
# meta: read in shards, never whole
PLACES: dict[str, tuple[str, ...]] = {"adapters": (*STRATEGIES, "hsdp", "meta")}
PLACES |= {"quantized": ("ddp",)} if find_spec("bitsandbytes") else {}
ADAPTERS = Lora(r=4, lora_alpha=8.0)


class RankOwnRandomness(Callback):
    """Sets the global generators of the ranks apart before every step."""

    def on_train_batch_start(self, trainer: Any, *_: object) -> None:
        torch.manual_seed(1000 * trainer.global_rank + trainer.global_step)
        torch.rand(trainer.global_rank + 1)


def train(
    model: str,
    folder: Path,
    pairs: int,
    tokens: int,
    kind: str = "frozen",
    parts: Sequence[Callback] = (),
    **trainer: Any,
) -> dict[str, Tensor]:
    """Train with β-DPO and further `parts`, keeping half; returns the whole final weights, on every rank.

    `kind` is that of the reference: `frozen`, `cached`, `adapters` (the policy without them), `quantized`
    (the same on a base in 4 bits), or another model.
    """
    torch.manual_seed(0)  # of the adapters' start
    settings: dict[str, Any] = {"lora": ADAPTERS} if kind == "adapters" else {"reference": kind}
    if kind == "quantized":
        settings = {"lora": ADAPTERS, "quantize": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    if Path(kind).is_dir():
        settings = {"reference_name": kind}
    module = preference(model, **settings)
    callbacks = [*beta_dpo(keep_ratio=0.5), *parts, PairAudit(), RankOwnRandomness()]
    # validation with an odd number of pairs: ranks hold unequal shares
    run = quiet_trainer(folder, callbacks, **{"limit_val_batches": 1.0, **trainer})
    run.fit(module, controlled(pairs, micro_batch_tokens=tokens))
    if kind == "adapters":
        run.save_checkpoint(folder / "run.ckpt")
    # of adapters alone, whose difference the weights of the base would hide
    held = {n: t for n, t in weights(module).items() if "lora" not in settings or "lora_" in n}
    final = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in held.items()}
    return final | {f"val/{n}": v for n, v in run.callback_metrics.items() if n.startswith("val/")}


def train_exactly(model: str, folder: Path, tokens: int, **trainer: Any) -> dict[str, Tensor]:
    """`train` on 22 pairs in float64, with parts that look at the whole batch and keep a state."""
    parts = [GammaPOMargin(0.2, 1.0, window=15), AnnotatorReliability("kind"), LossWeights("dr_dpo", 0.5)]
    return train(model, folder, 22, tokens, parts=parts, precision="64-true", **trainer)


def fine_tune(model: str, folder: Path, **trainer: Any) -> dict[str, Tensor]:
    """Fine-tuning, unclipped so that the scale of the gradient counts; returns the whole final weights."""
    module = SupervisedFineTuning(model, optimizer=partial(torch.optim.SGD, lr=0.05), max_grad_norm=None)
    run = quiet_trainer(folder, limit_val_batches=1.0, **trainer)
    run.fit(module, controlled(13, stage="demonstrations", micro_batch_tokens=115))
    final = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in weights(module).items()}
    return final | {"val/loss": run.callback_metrics["val/loss"]}


def strategy(name: str) -> DDPStrategy | ShardedStrategy:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    settings = {"replicas": 2} if name == "hsdp" else {"meta_init_above": 0.0} if name == "meta" else {}
    return ShardedStrategy(process_group_backend="gloo", **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, exact_model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    for name in STRATEGIES:
        final = fine_tune(model, folder, devices=2, strategy=strategy(name))
        if torch.distributed.get_rank() == 0:
            torch.save(final, folder / f"{name}-sft.pt")
    runs = [(scenario, *numbers, "frozen") for scenario, numbers in SCENARIOS.items()]
    runs += [(kind, *SCENARIOS["many_passes"], kind) for kind in ("cached", *PLACES)]
    runs.append(("other", *SCENARIOS["many_passes"], exact_model))
    for scenario, pairs, tokens, kind in runs:
        for name in PLACES.get(kind, STRATEGIES):
            label = f"{name}-{scenario}"
            final = train(model, folder / label, pairs, tokens, kind, devices=2, strategy=strategy(name))
            if torch.distributed.get_rank() == 0:
                torch.save(final, folder / f"{label}.pt")
    for micro_batches, tokens in EXACT.items():
        label = f"ddp-exact-{micro_batches}"  # Lightning has no float64 for FSDP2
        final = train_exactly(exact_model, folder / label, tokens, devices=2, strategy=strategy("ddp"))
        if torch.distributed.get_rank() == 0:
            torch.save(final, folder / f"{label}.pt")
