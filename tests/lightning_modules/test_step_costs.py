"""What a step leaves undone, and which time its speed is measured in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import controlled, preference, quiet_trainer
from torch.nn.utils import clip_grad_norm_

from lightning_modules import SupervisedFineTuning
from lightning_modules.sharding import clip_gradients


def with_gradients(gradients: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Parameters that hold these gradients, and no copies of them."""
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


@pytest.mark.parametrize("limit", [100.0, 13.0, 5.0, 0.1, float("inf")])
def test_clipping_multiplies_only_where_it_clips(limit: float) -> None:
    # norms 5 and 12: 13 together
    ours, theirs = ([torch.tensor([3.0, 4.0]), torch.tensor([12.0])] for _ in range(2))
    before = [gradient._version for gradient in ours]
    assert clip_gradients(with_gradients(ours), limit) == pytest.approx(13.0)
    clip_grad_norm_(with_gradients(theirs), limit)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    touched = [gradient._version > version for gradient, version in zip(ours, before, strict=True)]
    assert touched == [limit <= 13.0] * 2


def test_pairs_per_second_counts_what_lies_between_steps(tiny_llama: str, tmp_path: Path) -> None:
    seen: list[float] = []

    class Slow(Callback):
        def on_train_batch_end(self, trainer: Any, *_: object) -> None:
            seen.append(float(trainer.callback_metrics["train/pairs_per_second"]))
            time.sleep(0.5)

    quiet_trainer(tmp_path, [Slow()], max_steps=2).fit(preference(tiny_llama), controlled(20))
    assert seen[1] < 10 / 0.5


def test_validation_is_not_time_of_a_step(tmp_path: Path) -> None:
    training, trainer = SupervisedFineTuning(), quiet_trainer(tmp_path)
    training.trainer = trainer
    training.policy = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    training.on_train_start()
    training.on_validation_start()
    time.sleep(0.2)
    training.on_validation_end()
    assert training.step_seconds() < 0.2
    time.sleep(0.1)
    assert training.step_seconds() >= 0.1
