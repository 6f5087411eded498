"""What both training stages share: the policy, micro-batches that match across ranks, and the update."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from app.errors import UserError
from app.method.batch import Layout, OptimizerBatch, PackedRows
from lightning_modules.attention import OURS
from lightning_modules.host_memory import keep_freed_memory
from lightning_modules.layout_check import agreeing_layout
from lightning_modules.logged_training import LoggedTraining
from lightning_modules.lora import Lora, add_lora
from lightning_modules.pretrained import load_model, refuse_beyond, stop_at, store_linear_weights
from lightning_modules.resumption import apply_settings, count_batches_of
from lightning_modules.scorer import ResponseScorer
from lightning_modules.sharding import clip_gradients, gradient_sync
from lightning_modules.start_checks import check_start, check_steps
from lightning_modules.strategy import ShardedStrategy
from lightning_modules.weight_reading import read_weights, weight_files

log = logging.getLogger(__name__)

Attention = Literal["auto", "varlen", "flex", "pairwise", "sdpa", "eager"]
CompileLayers = bool | Literal["auto"]


class LanguageModelTraining(LoggedTraining):
    """A policy trained by manual optimisation, one optimizer batch per `training_step`.

    Args:
        name: folder or Hub id of the model to start from.
        architecture: instead of `name`, a Hugging Face configuration (with `model_type`) for a new random model.
        optimizer: called with the policy's parameters.
        lr_scheduler: called with the optimizer; stepped once per optimizer step.
        max_grad_norm: gradients are clipped to this norm over all ranks; none turns clipping off.
        layout: `packed` rows hold the prompt once; `separate` rows are plain padded ones. `auto` packs unless
            a check on the first batch shows that this model's log-probabilities do not survive it.
        attention: `auto` takes the fastest that passes a check at the start: on CUDA `varlen` (FlashAttention, in
            16 bits), `flex` (compiled FlexAttention), then `pairwise` (see `pairwise_attention`), the first on CPU,
            then what transformers takes for the model: `sdpa`, or `eager` for a family that has no other.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile_layers: fuse what the layers do between their matrix products by `torch.compile`, which takes some
            of the time and memory of a step away and costs the start of the run up to a minute. `auto` does so on
            CUDA, where it works.
        trust_remote_code: run model code that comes from the Hub.
        lora: train low-rank adapters of these settings, and nothing else.
    """

    responses: Sequence[str]  # the sides of a pair that the stage trains on

    def __init__(
        self,
        name: str | None,
        architecture: dict[str, Any] | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        max_grad_norm: float | None,
        layout: Literal["auto", "packed", "separate"],
        attention: Attention,
        gradient_checkpointing: bool,
        compile_layers: CompileLayers,
        trust_remote_code: bool,
        lora: Lora | None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.name = name
        self.architecture = architecture
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.requested_layout = layout
        self.layout: Layout | None = None  # known after the check on the first batch
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.trust_remote_code = trust_remote_code
        self.lora = lora
        self.policy: ResponseScorer

    # --- set-up -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Refuse what cannot work. The one hook before Lightning's own check, which does not know the cure."""
        check_start(self)
        return []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_steps(self.trainer)

    def configure_model(self) -> None:
        if hasattr(self, "policy"):  # Lightning calls this hook again when fit follows validate
            self.check_data(self.policy.model)
            return
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        # here rather than when Lightning does it: the reference is copied from it, and sharding fixes the type
        self.policy = self.trainer.precision_plugin.convert_module(self.build_scorer())  # type: ignore[assignment]
        self.keep_reference(self.policy)
        stop_at(self.policy.model, getattr(self.trainer.datamodule, "stop_ids", []))  # type: ignore[attr-defined]
        if self.gradient_checkpointing:
            if not self.policy.model.supports_gradient_checkpointing:
                raise UserError("model.gradient_checkpointing: transformers offers none for this model.")
            self.policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        # from_pretrained returns eval mode, in which transformers silently skips gradient checkpointing
        self.policy.train()
        sizes = [(weight.numel(), weight.requires_grad) for weight in self.policy.parameters()]
        trained = sum(size for size, wanted in sizes if wanted)
        rank_zero_info(f"{trained:,} of {sum(size for size, _ in sizes):,} parameters are trained")
        self.place(self.policy)
        self.on_policy_ready()

    def build_scorer(self) -> ResponseScorer:
        """Load the model that the configuration names, with a packed forward around it."""
        asked = None if self.attention in ("auto", *OURS) else self.attention
        model = load_model(
            self.name,
            self.architecture,
            attention=asked,
            trust_remote_code=self.trust_remote_code,
            meta_above=getattr(self.trainer.strategy, "meta_init_above", math.inf),
        )
        self.check_data(model)
        if self.lora is not None:
            add_lora(model, self.lora)
        scorer = ResponseScorer(model)
        if self.attention in OURS:
            scorer.use_attention(self.attention)
        return scorer

    def check_data(self, model: Any) -> None:
        """Raise UserError where the data has tokens or rows that the model has no embedding for."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "largest_id"):
            refuse_beyond(model, data.longest[1], data.largest_id, "data.tokenizer", "data.max_length")

    @property
    def scorers(self) -> tuple[ResponseScorer, ...]:
        """Every model of the stage, the policy first."""
        return (self.policy,)

    def keep_reference(self, fresh: ResponseScorer) -> None:
        """Called with the fresh model before it is sharded: a stage with a reference copies it here."""

    def on_policy_ready(self) -> None:
        """Called once the policy stands as it starts, sharded or not, and before any checkpoint is loaded."""

    def place(self, scorer: ResponseScorer, frozen: bool = False) -> ResponseScorer:
        """Shard the scorer under `ShardedStrategy`, reading its weights now if they were left out; returns it.

        Any other strategy moves the policy itself; a `frozen` scorer, which it does not know, moves here.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, ShardedStrategy):
            if frozen:
                store_linear_weights(scorer, self.compute_dtype)
                scorer.to(strategy.root_device)
            return scorer
        strategy.place(scorer, frozen)
        if any(parameter.is_meta for parameter in scorer.parameters()):
            assert self.name is not None
            offloaded = frozen and strategy.offload_reference
            read_weights(scorer.model, weight_files(self.name), "cpu" if offloaded else strategy.root_device)
        return scorer

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the forward pass: what rounding it has."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            return strategy.compute_dtype
        precision = str(self.trainer.precision)
        if precision.startswith("64"):
            return torch.float64
        return torch.bfloat16 if "bf16" in precision else torch.float32

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_scheduler(optimizer)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if self.trainer.state.fn == TrainerFn.FITTING and data is not None:
            count_batches_of(checkpoint["loops"]["fit_loop"], data.batch_size)

    def on_train_start(self) -> None:
        """Put the settings of the optimizer and its schedule in force that were asked for, not restored."""
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
        # enough to rebuild the model without the run's configuration: `beta-dpo export` reads it
        checkpoint["model_config"] = self.policy.model.config.to_json_string(use_diff=False)
        checkpoint["lora"] = None if self.lora is None else {"base": self.name, **asdict(self.lora)}
        named = self.policy.model.base_dtype
        checkpoint["base_dtype"] = None if named is None else str(named).removeprefix("torch.")
        checkpoint["generation_config"] = self.policy.model.generation_config.to_json_string()

    # --- one optimizer step -----------------------------------------------------------------------------

    def micro_batches(self, batch: OptimizerBatch, pairs: Sequence[int] | None = None) -> list[PackedRows]:
        """This rank's rows of `pairs` (indices into its share; all when None), as many as on every rank.

        The layout is settled on the first batch seen (see `layout_check`).
        """
        if self.layout is None:
            self.layout = agreeing_layout(self, batch)
        return self.match_ranks(batch.micro_batches(self.responses, self.layout, self.policy.balanced_row, pairs))

    def match_ranks(self, rows: list[PackedRows]) -> list[PackedRows]:
        """`rows` on this rank's device, with empty ones added up to the largest number that any rank has.

        The sharded forward and backward passes are collective: every rank must run as many.
        """
        most = int(self.reduce(torch.tensor(len(rows)), "max"))
        return [each.to(self.device) for each in (*rows, *(PackedRows.empty() for _ in range(most - len(rows))))]

    def score(
        self, scorer: Callable[[PackedRows], Tensor], micro_batches: Sequence[PackedRows], share: int
    ) -> Tensor:
        """Summed log-probabilities [share, sides] float64 of the rank's pairs; zero for pairs not in the rows."""
        logps = torch.zeros(share, len(self.responses), dtype=torch.float64, device=self.device)
        for rows in micro_batches:
            logps = logps.index_copy(0, rows.pairs, scorer(rows).view(-1, len(self.responses)))
        return logps

    def backward_micro_batch(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `gradient_sync` says what ranks exchange before the `last` one of a step."""
        with gradient_sync(self.trainer.strategy, self.policy, last):
            self.manual_backward(loss)

    def update(self) -> float:
        """Clip, step the optimizer and the schedule; returns the gradient norm before clipping.

        Raises UserError when the norm is not finite, before the weights are touched.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        grad_norm = clip_gradients(self.policy.parameters(), self.max_grad_norm or math.inf)
        if not math.isfinite(grad_norm):
            raise UserError(
                f"The gradient norm is {grad_norm} at step {self.trainer.global_step + 1}: the weights were left "
                "as they were; lower model.optimizer's lr or use trainer.precision 32-true, and resume."
            )
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(schedule, LRScheduler):
            schedule.step()
        return grad_norm

    @property
    def data_parallel_size(self) -> int:
        """Shares of a batch: the number of ranks, or of tensor-parallel groups, whose ranks have the same share."""
        sampling = self.trainer.distributed_sampler_kwargs
        return 1 if sampling is None else int(sampling["num_replicas"])

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """`value` reduced over all ranks (`sum`, `mean` or `max`), on the CPU; in a sum every share counts once."""
        if self.trainer.world_size == 1:
            return value.cpu()
        if how == "sum" and self.trainer.global_rank % (self.trainer.world_size // self.data_parallel_size):
            value = torch.zeros_like(value)  # a neighbour adds the same
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op=how).cpu()
