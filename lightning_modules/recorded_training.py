"""What a stage logs without waiting for the device, what its checkpoints hold, and the settings after a resume."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import LRScheduler

from app.core.errors import UserError
from lightning_modules.flops import numbers, parameter_count
from lightning_modules.lora import Lora
from lightning_modules.private import load_state_of_loader
from lightning_modules.scorer import ResponseScorer
from lightning_modules.start_checks import try_state


class RecordedTraining(LightningModule):
    """A LightningModule that logs without waiting for its device, measures the time of a step, and resumes."""

    _step_ended = 0.0  # from time.perf_counter, like `_validation_started`
    _validation_started = 0.0
    name: str | None
    lora: Lora | None
    quantize: dict[str, Any] | None
    policy: ResponseScorer
    make_optimizer: Any
    make_lr_scheduler: Any
    base_identity: Any = None  # of the model that a checkpoint of adapters alone needs (`model_identity`)

    @property
    def data(self) -> Any:
        """Return the DataModule of the run (`PairDataModule`); None if the loaders came by themselves."""
        return getattr(self.trainer, "datamodule", None)

    def log(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        """Log `value`, a number as a CPU tensor; Lightning would copy it to the device and wait for the copy."""
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        super().log(name, value, *args, **settings)

    def on_fit_start(self) -> None:
        """Number logged values by completed steps, as checkpoints do; Lightning's own number is one less."""
        connector, trainer = self.trainer._logger_connector, self.trainer
        write = connector.log_metrics

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            if metrics and step is None and "step" not in metrics:
                metrics, step = {"epoch": trainer.current_epoch, **metrics}, trainer.global_step
            write(metrics, step)

        connector.log_metrics = log_metrics  # type: ignore[method-assign]

    def on_validation_start(self) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_end(self) -> None:
        self._step_ended += time.perf_counter() - self._validation_started

    def on_train_end(self) -> None:
        timed = getattr(self.trainer, "_val_check_time_interval", None)  # in seconds, not steps
        validated = any(name.startswith("val/") for name in self.trainer.callback_metrics)
        if timed and not validated and self.trainer.enable_validation and self.data and self.data.val_dataloader():
            rank_zero_warn(f"nothing was validated: the run ended before trainer.val_check_interval, {timed} s.")

    def step_seconds(self) -> float:
        """Return the seconds since the last step or the start, with loader and callbacks but without validation."""
        before, self._step_ended = self._step_ended, time.perf_counter()
        return self._step_ended - before

    @property
    def adapters_alone(self) -> bool:
        """Return whether checkpoints hold the adapters alone, because `name` still gives the rest."""
        return self.lora is not None and not self.lora.moves_base and self.name is not None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        lora = checkpoint.get("lora") or {}
        if lora.get("identity") is not None and (self.lora is None or lora["identity"] != self.base_identity):
            cure = f"give model.lora as its config.yaml has it, and that very model by model.name (now {self.name})"
            raise UserError(f"--ckpt_path: the checkpoint holds adapters of {lora['base']}: {cure}.")
        fits = self.trainer.state.fn == TrainerFn.FITTING and self.data is not None
        # an endless loader's epochs have as many batches of any size
        if fits and not self.data.train_dataloader().endless:
            count_batches_of(checkpoint["loops"]["fit_loop"], self.data.batch_size)

    def on_train_start(self) -> None:
        """Replace the restored settings of optimizer and schedule, such as the lr, by those of this run.

        The schedule of a new optimizer takes the steps that were done: the same settings give the same values bit
        for bit, and changed settings apply from now on with the schedule at its position.
        """
        self._step_ended = time.perf_counter()
        trained = sum(numbers(weight) for weight in self.policy.parameters() if weight.requires_grad)
        rank_zero_info(f"{trained:,} of {parameter_count(self.policy):,} parameters are trained")
        if not trained:
            raise UserError("trainer.callbacks: a callback has frozen all weights, so nothing is left to train.")
        if self.trainer.ckpt_path is None:
            if self.data is not None:
                self.data.tell_pairs_seen()
            return
        load_state_of_loader(self.trainer)
        groups, restored = self.trainer.optimizers[0].param_groups, self.lr_schedulers()
        fresh = self.make_optimizer([parameter for group in groups for parameter in group["params"]])
        try_state(self.make_optimizer, self.trainer.optimizers[0])
        if isinstance(restored, LRScheduler):
            replayed = self.make_lr_scheduler(fresh)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the optimizer took no steps
                for _ in range(self.trainer.global_step):
                    replayed.step()
            restored.load_state_dict(replayed.state_dict())
        for group, asked in zip(groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in asked.items() if name != "params"})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # `beta-dpo export` rebuilds the model from these, without the run's configuration
        model, about = self.policy.model, {"base": self.name, "identity": self.base_identity}
        checkpoint["model_config"] = model.config.to_json_string(use_diff=False)
        checkpoint["lora"] = None if self.lora is None else about | asdict(self.lora)
        checkpoint["quantize"] = self.quantize
        checkpoint["base_dtype"] = model.base_dtype and str(model.base_dtype).removeprefix("torch.")
        checkpoint["generation_config"] = model.generation_config.to_json_string()


def count_batches_of(fit_loop: dict[str, Any], batch_size: int) -> None:
    """Change a checkpoint's counters, by which Lightning ends an epoch, to batches of `batch_size` pairs."""
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        if loader.get("batch_size", batch_size) == batch_size:
            continue
        left = -(-(loader["pairs"] - loader["pairs_served"]) // batch_size)
        done = -(-loader["pairs"] // batch_size) - left
        counters = fit_loop["epoch_loop.batch_progress"]["current"]
        # the counters may differ by one, which tells Lightning where it stopped: shift them all alike
        more = done - counters["ready"]
        counters.update({name: count + more for name, count in counters.items()})


def warn_of_nonfinite(stage: str, left_out: int, counted: int) -> None:
    """Warn if the means of an evaluation leave out pairs that are not finite."""
    if left_out:
        rest = f"the means are those of the other {counted}" if counted else "so there is no mean to report"
        rank_zero_warn(f"{stage}: {left_out} of {left_out + counted} pairs have no finite log-probability: {rest}.")
