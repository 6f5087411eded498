"""Checks that refuse unsuitable options, callbacks, optimizers and schedules before data and model are loaded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from shutil import which
from typing import Any

import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from app.core.errors import UserError, first_line
from lightning_modules.lora import Lora
from lightning_modules.private import start_method
from lightning_modules.refused_models import refuse_path
from lightning_modules.sharding import ShardedStrategy

PAIRS_PER_STEP = "data.batch_size is the number of pairs per optimizer step, and data.micro_batch_tokens splits it"
# options of the trainer: the value that asks for nothing, and why any other is refused
UNUSABLE: dict[str, tuple[object, str]] = {
    "accumulate_grad_batches": (1, f"has no place here: {PAIRS_PER_STEP} to fit memory"),
    "gradient_clip_val": (None, "has no effect here: set model.max_grad_norm instead"),
    "gradient_clip_algorithm": (None, "has no effect here: model.max_grad_norm clips by the norm; take it out"),
    "overfit_batches": (0.0, "has no effect here: set data.path to a file of as few pairs"),
    "_model_registry": (None, "has no effect here: checkpoints stay in the log folder; take it out"),
    "reload_dataloaders_every_n_epochs": (0, "would repeat the order of the first epoch: take it out"),
}
MOST_TRIED = 100_000  # steps whose learning rates are computed at the start
UNSUITABLE: dict[type, str] = {
    lightning_callbacks.GradientAccumulationScheduler: PAIRS_PER_STEP,
    lightning_callbacks.StochasticWeightAveraging: "the stages update the weights by themselves",
    lightning_callbacks.WeightAveraging: "the stages update the weights by themselves",
    lightning_callbacks.LearningRateFinder: "set the lr of model.optimizer",
    lightning_callbacks.BatchSizeFinder: "`beta-dpo plan` says which data.micro_batch_tokens fits",
    lightning_callbacks.OnExceptionCheckpoint: "a step that failed half-way cannot be resumed",
    lightning_callbacks.ModelPruning: "a checkpoint of pruned weights cannot be exported",
    lightning_callbacks.BaseFinetuning: "model.lora trains a part of the weights",
}


def refuse_strategy(strategy: str | Strategy) -> None:
    """Raise UserError for a strategy, or the name of one, that the stages do not support."""
    if isinstance(strategy, str):
        name, launched = strategy, any(word in strategy for word in ("spawn", "fork", "notebook"))
        suits = strategy.startswith(("auto", "ddp", "single_device"))
    else:
        name, launched = type(strategy).__name__, start_method(strategy) not in (None, "popen")
        suits = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ShardedStrategy))
    if launched:
        raise UserError(f"trainer.strategy: {name} spawns or forks processes, which lose checkpoints: take ddp.")
    if not suits:
        cure = "take auto, ddp, or {class_path: lightning_modules.ShardedStrategy} (configs/strategy/fsdp.yaml)"
        raise UserError(f"trainer.strategy: {name} is not one that the stages train with: {cure}.")


def refuse_precision(precision: Any) -> None:
    """Raise UserError for a precision that the stages do not support, as asked for or as settled."""
    if str(precision) not in ("None", "32", "32-true", "64", "64-true", "bf16", "bf16-mixed"):
        cure = "use 32-true, 64-true or bf16-mixed, or ShardedStrategy, which computes in bfloat16"
        raise UserError(f"trainer.precision {precision} loses log-probabilities (overflow, rounding): {cure}.")


def check_start(trainer: Any) -> None:
    """Raise UserError for settings that cannot work, before data and model are loaded."""
    strategy, precision, module = trainer.strategy, str(trainer.precision), trainer.lightning_module
    sharded = isinstance(strategy, ShardedStrategy)
    for callback, (unsuitable, reason) in product(trainer.callbacks, UNSUITABLE.items()):
        if isinstance(callback, unsuitable):
            trainer.callbacks.remove(callback)  # one that acts on exceptions would act on this one
            name = type(callback).__name__
            raise UserError(f"trainer.callbacks: {name} does not work here: {reason}; take it out.")
    refuse_strategy(strategy)
    if (device := strategy.root_device.type) not in ("cpu", "cuda"):
        raise UserError(f"trainer.accelerator: {device} is no device with float64, which sums need: set it to cpu.")
    for option, (unused, cure) in UNUSABLE.items():
        if getattr(trainer, option) != unused:
            raise UserError(f"trainer.{option.lstrip('_')} {cure}.")
    stage, kind = trainer.state.fn.value.replace("validate", "val"), type(module).__name__
    if stage in ("test", "predict") and not is_overridden(f"{stage}_step", module):
        raise UserError(f"model: {kind} does not {stage}: take `validate`, or model PreferenceOptimization.")
    if stage != "fit" and not getattr(trainer, f"limit_{stage}_batches"):
        raise UserError(f"trainer.limit_{stage}_batches is 0, which leaves out every pair: raise it.")
    refuse_precision(precision)
    if sharded and precision != "32-true":
        raise UserError(f"trainer.precision {precision}: set 32-true with ShardedStrategy; see its compute_dtype.")
    if module.lora is not None and getattr(strategy, "tensor_parallel_size", 1) > 1:
        raise UserError("model.lora does not go with trainer.strategy's tensor_parallel_size above 1: set it to 1.")
    if module.quantize is not None:
        check_quantized(module.quantize, module.lora, sharded, precision)
    if module.compile_layers is True and not which(os.environ.get("CXX", "g++")):
        raise UserError("model.compile_layers needs a C++ compiler: install g++, or name one by CXX.")
    if module.name is not None:
        refuse_path(module.name)  # before the data is read with its tokenizer
    if trainer.state.fn == TrainerFn.FITTING:
        try_optimizer(trainer, module)


def check_quantized(quantize: dict[str, Any], lora: Lora | None, sharded: bool, precision: str) -> None:
    """Raise UserError where a quantised base cannot be trained on."""
    moved, dora = lora is not None and lora.moves_base, lora is not None and lora.use_dora
    eight = quantize.get("load_in_8bit")
    wrong = {
        "does not train by itself: add model.lora (configs/model/lora.yaml), whose adapters do": lora is None,
        "does not go with model.lora.init_lora_weights pissa or olora, which change the base: take true": moved,
        "does not go with ShardedStrategy, which cannot shard it: take one device or ddp, or leave it out": sharded,
        "does not go with trainer.precision 64-true: take 32-true or bf16-mixed": precision == "64-true",
        "in 8 bits computes in 16: set trainer.precision bf16-mixed": eight and precision != "bf16-mixed",
        "in 8 bits does not go with model.lora.use_dora: set it to false, or load_in_4bit": eight and dora,
    }
    for said, applies in wrong.items():
        if applies:
            raise UserError(f"model.quantize {said}.")


@contextmanager
def trial(option: str, example: str) -> Iterator[None]:
    """Turn any error of a trial step into a UserError about the class that `option` gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the step may be past the end of a schedule
        try:
            yield
        except Exception as error:
            reason = first_line(error).rstrip(".")
            raise UserError(f"{option} cannot take a step here: {reason}; take another, {example}.") from error


def stepped(make_optimizer: OptimizerCallable, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer that has taken a step on `weights`, with ones as gradients."""
    optimizer = make_optimizer(weights)
    if hasattr(optimizer, "eval"):
        reason = "is schedule-free: the stages do not switch its weights before validations and checkpoints"
        raise TypeError(f"{type(optimizer).__name__} {reason}")
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def try_optimizer(trainer: Any, module: Any) -> None:
    """Try a step of optimizer and schedule on a matrix and, unless LoRA trains only those, a vector."""
    shapes = [(4, 4), (4,)] if module.lora is None or module.lora.use_dora else [(4, 4)]
    weights = [nn.Parameter(torch.zeros(shape, device=trainer.strategy.root_device)) for shape in shapes]
    with trial("model.optimizer", "for example torch.optim.AdamW, and with it model.lr_scheduler WarmupCosine"):
        optimizer = stepped(module.make_optimizer, weights)
    if module.make_lr_scheduler is None:
        return
    with trial("model.lr_scheduler", "for example WarmupCosine or torch's LinearLR"):
        schedule = module.make_lr_scheduler(optimizer)
        name = type(schedule).__name__
        if isinstance(schedule, ReduceLROnPlateau):
            raise TypeError(f"{name} waits for a metric, and a schedule is stepped once a step")
        if not isinstance(schedule, LRScheduler):
            raise TypeError(f"{name} is no schedule of torch")
        schedule.step()


def try_rates(module: Any, steps: float) -> None:
    """Raise UserError for a schedule that fails within a run of so many `steps`; warn of an end at the rate 0."""
    if steps > MOST_TRIED:
        return
    optimizer, last = module.make_optimizer([nn.Parameter(torch.zeros(4, 4))]), 0
    with trial("model.lr_scheduler", "or one for as many steps as the run takes"):
        schedule = module.make_lr_scheduler(optimizer) if module.make_lr_scheduler else None
        for step in range(1, int(steps) + 1):
            last = step if any(group["lr"] for group in optimizer.param_groups) else last
            if schedule:
                schedule.step()
    if last < steps:
        kind = f"model.lr_scheduler: {type(schedule).__name__}" if schedule else "model.optimizer: its lr"
        rank_zero_warn(f"{kind} gives the rate 0 from step {last + 1} to {steps}, the last: no weight changes.")


def try_state(make_optimizer: OptimizerCallable, restored: torch.optim.Optimizer) -> None:
    """Raise UserError if the optimizer needs more state of each weight than `restored` has from its checkpoint."""
    weight = nn.Parameter(torch.zeros(4, 4, device=restored.param_groups[0]["params"][0].device))
    optimizer = stepped(make_optimizer, [weight])
    held = {name for state in restored.state.values() for name in state}
    for name in optimizer.state[weight].keys() - held:
        del optimizer.state[weight][name]
    try:
        optimizer.step()
    except KeyError as error:
        said = f"needs {error}, which the checkpoint lacks: give its options as config.yaml has them"
        raise UserError(f"--ckpt_path: model.optimizer {said}.") from error


def try_sharded_step(make_optimizer: OptimizerCallable, weights: list[nn.Parameter]) -> None:
    """Raise UserError if the optimizer fails on zeros sharded as the smallest matrix; all ranks must call it."""
    sharded = [nn.Parameter(torch.zeros_like(min((one for one in weights if one.ndim == 2), key=torch.numel)))]
    try:
        stepped(make_optimizer, sharded)
    except Exception as error:
        said = f"{type(make_optimizer(sharded)).__name__} knows no sharded weights of ShardedStrategy"
        raise UserError(f"model.optimizer: {said}: take torch.optim.AdamW, or one device or ddp.") from error


def check_steps(trainer: Any) -> float:
    """Return the number of steps, or infinity; refuse wrong bounds, and warn if nothing is logged or validated."""
    for one in trainer.callbacks:
        left = one.time_remaining() if isinstance(one, lightning_callbacks.Timer) else None
        if left is not None and left <= 0:
            raise UserError("trainer.max_time leaves no time for a step: raise it.")
    if trainer.datamodule is None or not (loader := trainer.datamodule.train_dataloader()):
        return math.inf
    limit = trainer.limit_train_batches
    batches = min(limit, len(loader)) if isinstance(limit, int) else int(len(loader) * limit)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = min(epochs * batches, math.inf if trainer.max_steps == -1 else trainer.max_steps)
    if not (batches and steps):
        raise UserError("The run takes no step: raise trainer.max_steps, max_epochs or limit_train_batches.")
    least, bound = trainer.min_steps, "min_steps"
    if least is None:  # else Lightning asks for an epoch
        least, bound = (trainer.min_epochs or 0) * batches, "min_epochs"
    if steps < least:
        cure = "lower it, or raise trainer.max_steps or max_epochs"
        raise UserError(f"trainer.{bound} asks for {least} steps, but the run ends after {steps}: {cure}.")
    the_run = f"the run takes {steps} steps"
    if steps < (every := trainer.log_every_n_steps) and trainer.loggers:
        rank_zero_warn(f"no curve of training will be logged: trainer.log_every_n_steps is {every}, and {the_run}.")
    interval: Any = getattr(trainer, "val_check_interval", None)  # Lightning sets none for a time
    if not isinstance(interval, (int, float)) or not trainer.limit_val_batches or trainer.fast_dev_run:
        return steps
    epoch, counts = trainer.check_val_every_n_epoch, isinstance(interval, int)
    if epoch is not None and counts and interval > batches:
        cure = "set trainer.check_val_every_n_epoch: null, which counts the batches of all epochs, or lower it"
        raise UserError(f"trainer.val_check_interval is {interval}, but an epoch has {batches} batches: {cure}.")
    within = interval if counts else max(1, int(batches * interval))
    first = within if epoch is None else (epoch - 1) * batches + within
    if first > steps and trainer.datamodule.val_dataloader():
        asked = "trainer.val_check_interval and check_val_every_n_epoch ask for it"
        rank_zero_warn(f"nothing will be validated: {asked} after step {first}, and {the_run}.")
    return steps
