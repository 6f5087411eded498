"""The base class of both training stages: policy, micro-batches that match across ranks, and update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from app.core.errors import UserError
from app.method.batch import OptimizerBatch, PackedRows
from app.method.ranges import PositiveFloat, checked
from lightning_modules.attention import OURS
from lightning_modules.flops import parameter_count
from lightning_modules.layout_check import StartCheck
from lightning_modules.lora import Lora, add_lora, save_adapters_alone
from lightning_modules.measuring import Ranks
from lightning_modules.pretrained import (
    load_model,
    model_identity,
    quantization,
    stand_ins_for_meta,
    stop_at,
    store_linear_weights,
)
from lightning_modules.private import keep_freed_memory
from lightning_modules.recorded_training import RecordedTraining
from lightning_modules.refused_models import check_tokens, refuse_beyond
from lightning_modules.scorer import ResponseScorer
from lightning_modules.sharding import ShardedStrategy, clip_gradients, gradient_sync, leave_gathered
from lightning_modules.start_checks import check_start, check_steps, try_rates, try_sharded_step


@checked
class LanguageModelTraining(RecordedTraining):
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
        self.make_lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.layout = layout
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.trust_remote_code = trust_remote_code
        self.lora = lora
        self.quantize = quantize

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
                if weight.requires_grad or lora.moves_base:  # A is random, and its replicas must be equal
                    weight.data = strategy.broadcast(weight.data.cpu()).to(weight.device)
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
        """Back-propagate `losses` as a part of the mean over `count` of all ranks, and return this part.

        The factor number of shares turns the average over shares, which DDP and FSDP2 take, into a sum.
        """
        part = losses.sum() * (self.ranks.shares / count)
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
