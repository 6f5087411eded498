"""The learning rate by step, beside transformers' own schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from app.core.errors import UserError
from lightning_modules.schedules import WarmupCosine


def rates(make: Callable[[Optimizer], LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = make(optimizer)
    found = []
    for _ in range(11):
        found.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0, 3])
def test_equals_the_schedule_of_transformers(warmup: int) -> None:
    expected = rates(lambda optimizer: get_cosine_schedule_with_warmup(optimizer, warmup, 10))
    assert rates(lambda optimizer: WarmupCosine(optimizer, warmup, 10)) == pytest.approx(expected)
    assert expected[warmup] == pytest.approx(0.3)


def test_a_warm_up_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"WarmupCosine: warmup_steps 10 must be below"):
        rates(lambda optimizer: WarmupCosine(optimizer, 10, 10))
