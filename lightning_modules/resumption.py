"""Applying a resumed run's own settings of optimizer, schedule and batch size instead of the checkpoint's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def apply_settings(
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    make_optimizer: Callable[[list[Any]], Optimizer],
    make_schedule: Callable[[Optimizer], Any] | None,
    steps: int,
) -> None:
    """Give the restored `optimizer` and `schedule` the current settings, as they would be after `steps` steps.

    A restored state silently contains the learning rate and all other hyperparameters of the earlier run. Here the
    schedule of a new optimizer takes `steps` steps: the same settings give the same values bit for bit, and changed
    settings apply from now on with the schedule at its position.
    """
    fresh = make_optimizer([parameter for group in optimizer.param_groups for parameter in group["params"]])
    replayed = None if make_schedule is None else make_schedule(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer took no steps
        for _ in range(steps if replayed is not None else 0):
            replayed.step()  # type: ignore[union-attr]
    for group, asked in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in asked.items() if name != "params"})
    if schedule is not None and replayed is not None:
        schedule.load_state_dict(replayed.state_dict())


def count_batches_of(fit_loop: dict[str, Any], batch_size: int) -> None:
    """Change the batch counters of a checkpoint's `fit_loop` to batches of `batch_size` pairs.

    Lightning ends an epoch after as many batches as the loader has, while the loader itself counts pairs.
    """
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        if loader.get("batch_size", batch_size) == batch_size:
            continue
        left = -(-(loader["pairs"] - loader["pairs_served"]) // batch_size)
        done = -(-loader["pairs"] // batch_size) - left
        counters = fit_loop["epoch_loop.batch_progress"]["current"]
        # the counters may differ by one, which tells Lightning where it stopped: shift them all alike
        more = done - counters["ready"]
        counters.update({name: count + more for name, count in counters.items()})
