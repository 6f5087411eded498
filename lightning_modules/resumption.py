"""What a resumed run takes from its own settings and not from the checkpoint: optimizer, schedule, batch size."""

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
    """Give restored `optimizer` and `schedule` the settings that are asked for, as they would be after `steps`.

    A restored state brings the learning rate and every other hyperparameter of the earlier run with it, silently.
    Here a new optimizer and its schedule take `steps` steps of the schedule alone, so that the same settings give
    the same values to the bit, and others apply from here on with the schedule at its position.
    """
    fresh = make_optimizer([parameter for group in optimizer.param_groups for parameter in group["params"]])
    replayed = None if make_schedule is None else make_schedule(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's own steps
        for _ in range(steps if replayed is not None else 0):
            replayed.step()  # type: ignore[union-attr]
    for group, asked in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in asked.items() if name != "params"})
    if schedule is not None and replayed is not None:
        schedule.load_state_dict(replayed.state_dict())


def count_batches_of(fit_loop: dict[str, Any], batch_size: int) -> None:
    """Make `fit_loop`, as a checkpoint has it, count the batches of its epoch as if each had `batch_size` pairs.

    Lightning ends an epoch when it has counted as many batches as the loader has; the loader itself counts pairs.
    """
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        if loader.get("batch_size", batch_size) == batch_size:
            continue
        left = -(-(loader["pairs"] - loader["pairs_served"]) // batch_size)
        done = -(-loader["pairs"] // batch_size) - left
        counters = fit_loop["epoch_loop.batch_progress"]["current"]
        more = done - counters["ready"]  # the others may be one behind it: Lightning reads from that where it was
        counters.update({name: count + more for name, count in counters.items()})
