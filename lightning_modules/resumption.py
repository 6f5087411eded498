"""What a stage's checkpoints hold, and a resumed run's own settings instead of the checkpoint's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from app.core.errors import UserError
from lightning_modules.logged_training import LoggedTraining
from lightning_modules.lora import Lora
from lightning_modules.scorer import ResponseScorer


class ResumedTraining(LoggedTraining):
    """A LightningModule whose checkpoints `beta-dpo export` reads, and whose own settings replace restored ones."""

    name: str | None
    lora: Lora | None
    quantize: dict[str, Any] | None
    policy: ResponseScorer
    data: Any
    make_optimizer: Any
    make_lr_scheduler: Any
    base_identity: Any = None  # of the model that a checkpoint of adapters alone needs (`model_identity`)

    @property
    def adapters_alone(self) -> bool:
        """Return whether checkpoints hold the adapters alone, because `name` still gives the rest."""
        return self.lora is not None and not self.lora.moves_base and self.name is not None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        identity = (checkpoint.get("lora") or {}).get("identity")
        if identity is not None and identity != self.base_identity:
            raise UserError(
                f"--ckpt_path: the checkpoint holds adapters of {checkpoint['lora']['base']}, and model.name "
                f"{self.name} is another model, or its files have changed: give the model that they belong to."
            )
        if self.trainer.state.fn == TrainerFn.FITTING and self.data is not None:
            count_batches_of(checkpoint["loops"]["fit_loop"], self.data.batch_size)

    def on_train_start(self) -> None:
        """Replace the restored settings of optimizer and schedule by those of this run's configuration."""
        super().on_train_start()
        if self.trainer.ckpt_path is None:
            return
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        apply_settings(
            optimizer.optimizer,
            schedule if isinstance(schedule, LRScheduler) else None,
            self.make_optimizer,
            self.make_lr_scheduler,
            self.trainer.global_step,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # `beta-dpo export` rebuilds the model from these, without the run's configuration
        checkpoint["model_config"] = self.policy.model.config.to_json_string(use_diff=False)
        about = {"base": self.name, "identity": self.base_identity}
        checkpoint["lora"] = None if self.lora is None else {**about, **asdict(self.lora)}
        checkpoint["quantize"] = self.quantize
        named = self.policy.model.base_dtype
        checkpoint["base_dtype"] = None if named is None else str(named).removeprefix("torch.")
        checkpoint["generation_config"] = self.policy.model.generation_config.to_json_string()


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
