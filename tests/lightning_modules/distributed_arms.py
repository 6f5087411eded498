"""One rank of two on gloo: `python distributed_arms.py MODEL FOLDER`, started by test_distributed_arms.

Trains the arm whose parts look at the whole batch (KTO-pair, ε-DPO, a filter by gradient scale) under every
strategy and scenario of `distributed_run`; leaves audit and whole final weights in FOLDER/<strategy>-<scenario>.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from distributed_run import SCENARIOS, STRATEGIES, strategy  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from tiny_runs import controlled, preference, quiet_trainer, weights  # noqa: E402
from torch import Tensor  # noqa: E402

from app.method.losses import KTOPairLoss  # noqa: E402
from app.method.step import StepDecision  # noqa: E402
from callbacks import EpsilonBeta, PairAudit, PairFilter  # noqa: E402


class LastKL(Callback):
    """The KL to the reference of every pair at the last step."""

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        assert decision.measure_kl is not None
        self.kl = decision.measure_kl()


def train_arm(model: str, folder: Path, pairs: int, tokens: int, **trainer: Any) -> dict[str, Tensor]:
    """Train, keeping half; returns the whole final weights and metrics of validation, on every rank."""
    module = preference(model, lr=0.1, loss=KTOPairLoss(), sft_weight=0.1)
    parts = [PairFilter(0.5, seed=3, by="both"), EpsilonBeta(0.2), PairAudit(), last := LastKL()]
    run = quiet_trainer(folder, parts, limit_val_batches=1.0, **trainer)
    run.fit(module, controlled(pairs, micro_batch_tokens=tokens))
    final = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in weights(module).items()}
    return final | {"val/loss": run.callback_metrics["val/loss"], "kl": last.kl}


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder = sys.argv[1], Path(sys.argv[2])
    for scenario, (pairs, tokens) in SCENARIOS.items():
        for name in STRATEGIES:
            place = folder / f"{name}-{scenario}"
            final = train_arm(model, place, pairs, tokens, devices=2, strategy=strategy(name))
            if torch.distributed.get_rank() == 0:
                torch.save(final, place / "final.pt")
