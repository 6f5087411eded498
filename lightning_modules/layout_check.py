"""The start-up check, which picks the fastest attention, layout and layers that agree with plain rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from app.core.errors import UserError, first_line
from app.method.batch import Layout, OptimizerBatch, PackedRows
from lightning_modules.attention import VARLEN, attentions
from lightning_modules.flex import FLEX
from lightning_modules.measuring import Ranks
from lightning_modules.scorer import LogitRule, ResponseScorer, response_logps, response_tokens
from lightning_modules.sharding import clip_gradients, gradient_sync

log = logging.getLogger(__name__)
inform, warn = rank_zero_only(log.info), rank_zero_only(log.warning)

# largest mean difference per response token, in nats, that rounding explains; a lost mask changes whole nats
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2}
CHECKED_PAIRS = 4
# why these do not train without CUDA: their own errors are long, or come only in the first backward pass
CUDA_ALONE = {VARLEN: "FlashAttention runs on CUDA alone", FLEX: "FlexAttention has no backward pass but on CUDA"}


class Sample(NamedTuple):
    """Pairs for a comparison, with their scores in plain rows (see `StartCheck._scores`)."""

    batch: OptimizerBatch
    pairs: list[int]
    expected: Tensor

    def apart(self, scores: Tensor) -> Tensor:
        """Return the largest difference of `scores` from those expected that are finite."""
        apart = (scores.detach().cpu() - self.expected).abs().nan_to_num(nan=math.inf)
        return apart.masked_fill(~self.expected.isfinite(), 0).max()


def with_other_ends(rows: PackedRows) -> PackedRows:
    """Return `rows` with another last token of each response, after which a causal model predicts nothing."""
    ends = rows.predict_index[rows.response_tokens.cumsum(0) - 1] + 1
    ids = rows.input_ids.flatten().index_copy(0, ends, rows.input_ids.flatten()[ends - 1])
    return replace(rows, input_ids=ids.view_as(rows.input_ids), _remembered={})


@dataclass(frozen=True)
class StartCheck:
    """The start-up check of a stage; `attention`, `layout` and `compile_layers` are its options."""

    scorers: Sequence[ResponseScorer]  # the models, the policy first
    responses: Sequence[str]  # the sides of a pair that the stage scores
    ranks: Ranks  # those that run the same check
    dtype: torch.dtype  # of the forward pass
    attention: str
    layout: Literal["auto", "packed", "separate"]
    compile_layers: bool | Literal["auto"]
    trains: bool  # whether a backward pass follows

    @property
    def policy(self) -> ResponseScorer:
        return self.scorers[0]

    def agreeing_layout(self, batch: OptimizerBatch) -> Layout:
        """Choose attention and layers of the models, and return the layout for training.

        The check compares a few pairs of the batch, and the longest of the run, which alone reveals models that
        count positions in a row (a local window) or depend on the longest row (scaled rotary positions). Raises
        UserError if nothing fits.
        """
        try:
            with torch.inference_mode(False):  # training uses what a validation has settled
                plain = self._plain_sample(batch)
                return self._settled([plain, self._alone_sample(batch.stretched(plain.pairs))])
        except torch.OutOfMemoryError as error:
            cure = "see `beta-dpo plan`; lower data.micro_batch_tokens, or set model.gradient_checkpointing: true"
            raise UserError(f"Out of memory in the start-up check ({first_line(error)}): {cure}.") from error

    def _settled(self, samples: Sequence[Sample]) -> Layout:
        on_cuda = self.ranks.device.type == "cuda"
        names = [self.policy.attention]
        if self.attention == "auto":
            names = [*attentions(self.policy.model, self.ranks.device, self.dtype), self.policy.own_attention]
        wanted: Layout = "packed" if self.layout == "auto" else self.layout
        candidates = [(name, wanted) for name in names]  # in order of preference
        if self.layout == "auto":
            candidates.append((names[-1], "separate"))
        disagreed: list[str] = []
        for attention, layout in candidates:
            for scorer in self.scorers:
                scorer.use_attention(attention)
            finding = CUDA_ALONE.get(attention) if self.trains and not on_cuda else None
            finding = finding or self._finding(layout, samples, backward=on_cuda)
            if finding is None:
                break
            disagreed.append(f"attention {attention} in {layout} rows: {finding}")
        else:
            raise UserError(self._refusal(disagreed[-1]))
        if disagreed:
            rows = "packed rows" if layout == "packed" else "a row of its own for every response (slower)"
            warn("start-up check: %s; so attention is %s, with %s", "; ".join(disagreed), attention, rows)
        if self.compile_layers is True or (self.compile_layers == "auto" and on_cuda):
            self._compile(layout, samples)
        layers = ", layers compiled" if self.policy.compiled else ""
        passes = ", forward and backward" if self.trains and (on_cuda or self.policy.compiled) else ""
        pairs = f"{len(samples[0].pairs)} pairs of the data and the longest possible one"
        checked = f"{pairs}, {samples[1].batch.tokens} tokens{passes}"
        inform("start-up check passed (attention %s, %s rows%s): %s", attention, layout, layers, checked)
        return layout

    def _refusal(self, finding: str) -> str:
        """Return the error message, with a remedy, for a run in which no candidate agrees."""
        if self.layout == "packed":
            return f"model.layout: {finding}; set it to auto or separate."
        if self.attention != "auto":
            return f"model.attention: {finding}; set it to auto."
        rope = getattr(self.policy.text_config, "rope_parameters", None) or {}
        known = rope.get("original_max_position_embeddings", "the length the model was first trained on")
        why = f"as with rotary positions scaled by the longest row (rope_type {rope.get('rope_type')})"
        cure = f"lower data.max_length to {known}, or take a model without such scaling"
        return f"model.name: {finding}. They depend on the other rows of a batch, {why}: {cure}."

    def _compile(self, layout: Layout, samples: Sequence[Sample]) -> None:
        """Compile the layers. If they do not agree, undo it with `auto`, else raise UserError."""
        for scorer in self.scorers:
            scorer.compile_layers()
        if finding := self._finding(layout, samples, backward=True):
            if self.compile_layers != "auto":
                raise UserError(f"model.compile_layers: {finding}; set it to auto or false.")
            for scorer in self.scorers:
                scorer.compile_layers(False)
            warn("start-up check: compiled layers: %s; so the layers run as they are (slower)", finding)

    def _finding(self, layout: Layout, samples: Sequence[Sample], backward: bool) -> str | None:
        """Return what is wrong on any rank, of an exception the first line; None if all agrees."""
        backward = backward and self.trains
        # as few rows as possible, so that several pairs share a row
        packed = [one.batch.micro_batches(self.responses, layout, math.inf, one.pairs) for one in samples]
        rows = list(map(self.ranks.match, packed))
        worst, error = 0.0, ""
        try:
            for sample, micro_batches in zip(samples, rows, strict=True):
                with torch.set_grad_enabled(backward):
                    scores = self._scores(micro_batches)
                worst = max(worst, float(sample.apart(scores)))
                if backward and not self._has_gradient(scores) and sample.expected.isfinite().all():
                    error = "its gradients are not finite"
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as refusal:  # for example another mask format, a missing kernel, or the compiler
            error = f"{type(refusal).__name__}: {first_line(refusal)}"
        failed, worst = self.ranks.reduce(torch.tensor([bool(error), worst], dtype=torch.float64), "max").tolist()
        if failed:
            return error or "it failed on another rank"
        changes = f"it changes this model's log-probabilities by {worst:.2g} nats per token"
        return changes if worst > TOLERANCE[self.dtype] else None

    def _has_gradient(self, scores: Tensor) -> bool:
        """Back-propagate `scores`, drop the gradients, and return whether they are finite."""
        # FSDP2 drops gradients only after their reduction; DDP's buckets must not see these
        with gradient_sync(self.ranks.strategy, self.policy, last=isinstance(self.policy, FSDPModule)):
            scores.sum().backward()
        norm = clip_gradients(self.policy.parameters(), math.inf)
        self.policy.zero_grad(set_to_none=True)
        return math.isfinite(norm)

    def _plain_sample(self, batch: OptimizerBatch) -> Sample:
        """Return a few pairs, scored in plain rows by the model's head. Raises UserError if ours differs."""
        pairs = list(range(min(CHECKED_PAIRS, len(batch.positions))))
        rows = self.ranks.match(batch.micro_batches(self.responses, "separate", math.inf, pairs))
        kind = self.policy.model.config.model_type
        with self.policy.as_loaded(), torch.no_grad():
            expected = self._scores(rows, whole_logits=True).cpu()
            sample = Sample(batch, pairs, expected)
            if self._differ(sample, self._scores(list(map(with_other_ends, rows)), whole_logits=True)):
                cure = "whose tokens attend to later ones: take a causal model (decoder only)"
                raise UserError(f"model.name: {self.policy.model.name_or_path} is a {kind}, {cure}.")
            for rule in LogitRule.candidates(self.policy.text_config):
                for scorer in self.scorers:
                    scorer.logit_rule = rule
                if not self._differ(sample, self._scores(rows)):
                    break
            else:
                said = "its log-probabilities differ from those of transformers: choose another"
                raise UserError(f"model.name: the output head of a {kind} is not supported, {said}.")
        # a pair that is not finite tests nothing, and would make its packed row NaN; one side may be finite
        finite = expected.isfinite().all(dim=1)
        return Sample(batch, [pair for pair in pairs if finite[pair]], expected.masked_fill(~finite[:, None], 0))

    def _differ(self, sample: Sample, scores: Tensor) -> bool:
        """Return whether `scores` differ on any rank from those of `sample`, more than rounding explains."""
        return float(self.ranks.reduce(sample.apart(scores), "max")) > TOLERANCE[self.dtype]

    def _alone_sample(self, batch: OptimizerBatch) -> Sample:
        """Return the pairs of the batch, every response scored in a micro-batch of its own, free of other rows."""
        pairs = list(range(len(batch.positions)))
        expected = torch.zeros(CHECKED_PAIRS, len(self.responses), dtype=torch.float64)
        with self.policy.as_loaded(), torch.no_grad():
            for pair in range(2):  # also on ranks without a pair, because forward passes may be collective
                for number, side in enumerate(self.responses):
                    alone = batch.micro_batches((side,), "separate", math.inf, pairs[pair : pair + 1])
                    expected[:, number] += self._scores(self.ranks.match(alone), sides=1).flatten().cpu()
        return Sample(batch, pairs, expected)

    def _scores(self, rows: Sequence[PackedRows], sides: int | None = None, whole_logits: bool = False) -> Tensor:
        """Return the mean log-probability of each response's tokens, [CHECKED_PAIRS, sides]; 0 for other pairs."""
        size = CHECKED_PAIRS, sides or len(self.responses), self.ranks.device
        scorer = partial(self.policy, whole_logits=whole_logits)
        return response_logps(scorer, rows, *size) / response_tokens(rows, *size)
