"""The base class of both training stages: policy, micro-batches, update, log, and checks of a resume."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from app.core.errors import UserError
from app.method.batch import OptimizerBatch, PackedRows
from app.method.ranges import PositiveFloat, checked
from lightning_modules.attention import OURS
from lightning_modules.layout_check import StartCheck
from lightning_modules.lora import Lora, add_lora, save_adapters_alone
from lightning_modules.measuring import Ranks, numbers, parameter_count
from lightning_modules.pretrained import (
    freeze_unread,
    load_model,
    model_identity,
    quantization,
    stand_ins_for_meta,
    stop_at,
    store_linear_weights,
)
from lightning_modules.private import keep_freed_memory, load_state_of_loader
from lightning_modules.refused_models import check_tokens, refuse_beyond
from lightning_modules.scorer import ResponseScorer
from lightning_modules.sharding import ShardedStrategy, clip_gradients, gradient_sync, leave_gathered
from lightning_modules.start_checks import check_start, check_steps, try_rates, try_sharded_step, try_state


@checked
class LanguageModelTraining(LightningModule):
    """A training stage that uses manual optimisation, one optimizer batch per `training_step`.

    Args:
        name: folder or Hub id of the model to start from.
        architecture: instead of `name`, a Hugging Face configuration (with `model_type`) for a new random model.
        optimizer: called with the policy's parameters.
        lr_scheduler: called with the optimizer; stepped once per optimizer step.
        max_grad_norm: gradients are clipped to this norm over all ranks; none turns clipping off.
        layout: `packed` rows hold the prompt once; `separate` rows are plain padded ones. `auto` packs unless
            the start-up check on the first batch finds that packing changes this model's log-probabilities.
        attention: `auto` takes the first that passes the start-up check: on CUDA `varlen` (FlashAttention, in
            16 bits), `flex` (compiled FlexAttention), `pairwise` (pair by pair); on other devices `pairwise`;
            then the choice of transformers: `sdpa`, or `eager` where the model has no `sdpa`.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile_layers: fuse the operations between a layer's matrix products by `torch.compile`, which adds up to a
            minute to the start. `auto` compiles on CUDA if the start-up check passes.
        trust_remote_code: run model code that comes from the Hub.
        lora: train only low-rank adapters with these settings.
        quantize: with `lora`, load the base in 4 or 8 bits by bitsandbytes, with these settings of transformers'
            `BitsAndBytesConfig`: `{load_in_4bit: true}`, `bnb_4bit_quant_type`, ….
    """

    responses: Sequence[str]  # the sides of a pair that the stage trains on
    ranks: Ranks
    policy: ResponseScorer
    base_identity: Any = None  # of the model that a checkpoint of adapters alone needs (`model_identity`)
    _step_ended = _validation_started = 0.0  # from time.perf_counter

    def __init__(
        self,
        name: str | None,
        optimizer: OptimizerCallable,
        max_grad_norm: PositiveFloat | None,
        architecture: dict[str, Any] | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        layout: Literal["auto", "packed", "separate"] = "auto",
        attention: Literal["auto", "varlen", "flex", "pairwise", "sdpa", "eager"] = "auto",
        gradient_checkpointing: bool = False,
        compile_layers: bool | Literal["auto"] = "auto",
        trust_remote_code: bool = False,
        lora: Lora | None = None,
        quantize: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.name = name
        self.architecture = architecture
        self.make_optimizer = optimizer
        self.make_lr_scheduler: Any = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.layout = layout
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.trust_remote_code = trust_remote_code
        self.lora = lora
        self.quantize = quantize

    @property
    def data(self) -> Any:
        """Return the DataModule of the run (`PairDataModule`); None if the loaders came by themselves."""
        return getattr(self.trainer, "datamodule", None)

    # --- set-up -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Raise UserError for settings that cannot work, before Lightning's check, which names no remedy."""
        check_start(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.ranks = Ranks(self.trainer)
        if stage == "fit":
            try_rates(self, check_steps(self.trainer))

    def configure_model(self) -> None:
        if hasattr(self, "policy"):  # Lightning calls this hook again when fit follows validate
            self.check_data(self.policy.model)
            return
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        self.policy = self.build_scorer(self.name, self.lora)
        if self.name is not None and hasattr(self.data, "tokenizer"):
            check_tokens(self.name, self.data.tokenizer, self.trust_remote_code, refuse=False)
        self.keep_reference()
        stop_at(self.policy.model, getattr(self.data, "stop_ids", []))
        if self.gradient_checkpointing:
            if not self.policy.model.supports_gradient_checkpointing:
                raise UserError("model.gradient_checkpointing: transformers offers none for this model.")
            self.policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        # from_pretrained returns eval mode, in which transformers silently skips gradient checkpointing
        self.policy.train()
        self.place(self.policy)
        if self.adapters_alone:
            save_adapters_alone(self)
            if self.ranks.number == 0:  # which alone reads the files
                self.base_identity = model_identity(str(self.name), self.policy.model.config)
            self.base_identity = self.trainer.strategy.broadcast(self.base_identity)

    def build_scorer(self, name: str | None, lora: Lora | None) -> ResponseScorer:
        """Load the model, add adapters if asked for, and wrap it in a `ResponseScorer` of the run's precision."""
        strategy = self.trainer.strategy
        meta_above = getattr(strategy, "meta_init_above", math.inf)
        reads_base = lora is not None and lora.reads_base
        model = load_model(
            name,
            self.architecture,
            attention=None if self.attention in ("auto", *OURS) else self.attention,
            trust_remote_code=self.trust_remote_code,
            meta_above=math.inf if reads_base else meta_above,
            quantized=quantization(self.quantize, self.compute_dtype),
            device=strategy.root_device,
        )
        self.check_data(model)
        if reads_base and parameter_count(model) > meta_above:
            rank_zero_warn("model.lora: DoRA, PiSSA and OLoRA start from the base's weights: each rank loads all")
        if lora is not None:
            with stand_ins_for_meta(model):
                add_lora(model, lora)
            for weight in model.parameters():
                if weight.requires_grad or lora.moves_base:
                    # A is random, and its replicas must be equal; on 4 bits peft makes it in bfloat16
                    weight.data = strategy.broadcast(weight.data.cpu()).to(weight.device, torch.float32)
        freeze_unread(model)
        scorer = ResponseScorer(model)
        if self.attention in OURS:
            scorer.use_attention(self.attention)
        # converted before Lightning does it, because the reference is a copy and sharding fixes the dtype
        return self.trainer.precision_plugin.convert_module(scorer)  # type: ignore[return-value]

    def check_data(self, model: Any) -> None:
        """Raise UserError if the data has token ids or row lengths beyond the model's embeddings."""
        if (data := self.data) is not None:
            refuse_beyond(model, data.longest[1], data.largest_id, "data.tokenizer", "data.max_length")

    @property
    def families(self) -> list[tuple[ResponseScorer, ...]]:
        """Return the models of the stage, the policy first, copies of one together."""
        return [(self.policy,)]

    def keep_reference(self) -> None:
        """Make the reference, perhaps of the policy, which is not sharded yet; does nothing by default."""

    def place(self, scorer: ResponseScorer, frozen: bool = False) -> ResponseScorer:
        """Put the scorer on its device, with frozen weights in the compute dtype, and return it."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.place(scorer, frozen)
            return scorer
        if self.lora is None or not self.lora.use_dora or frozen:  # DoRA takes norms of the base's weights
            store_linear_weights(scorer, self.compute_dtype)
        return scorer.to(strategy.root_device) if frozen else scorer  # other strategies move the policy themselves

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of the forward pass, which decides its rounding error."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            return strategy.compute_dtype
        return {"64-true": torch.float64, "bf16-mixed": torch.bfloat16}.get(self.trainer.precision, torch.float32)

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.policy.parameters() if p.requires_grad]
        if isinstance(self.trainer.strategy, ShardedStrategy):
            try_sharded_step(self.make_optimizer, weights)
        optimizer = self.make_optimizer(weights)
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_scheduler(optimizer)}

    # --- one optimizer step -----------------------------------------------------------------------------

    def micro_batches(self, batch: OptimizerBatch, pairs: Sequence[int] | None = None) -> list[PackedRows]:
        """Return rows of this rank's `pairs`, as many on every rank; the first call settles the layout."""
        layout = self.layout
        for scorers in self.families if self.policy.layout is None else ():
            layout = StartCheck(
                scorers=scorers,
                responses=self.responses,
                ranks=self.ranks,
                dtype=self.compute_dtype,
                attention=self.attention,
                layout=layout,
                compile_layers=self.compile_layers,
                trains=self.trainer.state.fn == TrainerFn.FITTING and scorers[0] is self.policy,
            ).agreeing_layout(batch)
            for scorer in scorers:
                scorer.layout = layout
        return self.ranks.match(self.policy.pack(batch, self.responses, pairs))

    def backward_share(self, losses: Tensor, count: float, last: bool) -> Tensor:
        """Back-propagate `losses` as a part of the mean over `count` of all ranks, and return this part."""
        part = losses.sum() * (self.ranks.shares / count)  # DDP and FSDP2 average over the shares
        with gradient_sync(self.trainer.strategy, self.policy, last):
            self.manual_backward(part)
        return part.detach()

    def update(self) -> float:
        """Clip, step and return the gradient norm. If it is not finite, raise UserError before any change."""
        optimizer: Any = self.optimizers()
        schedule = self.lr_schedulers()
        leave_gathered(self.policy)
        grad_norm = clip_gradients(self.policy.parameters(), self.max_grad_norm or math.inf)
        if not math.isfinite(grad_norm):
            cure = "lower model.optimizer's lr, or use trainer.precision 32-true"
            step = self.trainer.global_step + 1
            raise UserError(f"The gradient norm is {grad_norm} at step {step}, which changed no weight: {cure}.")
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(schedule, LRScheduler):
            schedule.step()
        return grad_norm

    # --- log and time -----------------------------------------------------------------------------------

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
        """Return the seconds since the last step or the start, without validation."""
        before, self._step_ended = self._step_ended, time.perf_counter()
        return self._step_ended - before

    # --- checkpoint and resume --------------------------------------------------------------------------

    @property
    def adapters_alone(self) -> bool:
        """Return whether checkpoints hold the adapters alone; `name` gives the rest."""
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
        """Replace the restored settings of optimizer and schedule, such as the lr, by those of this run."""
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
            replayed = self.make_lr_scheduler(fresh)  # the same settings give the same values bit for bit
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
