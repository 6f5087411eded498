"""The TensorBoard dashboard: charts with a guide, histograms of gaps, extreme pairs, the settings of the run."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from app.core.log_folder import log_folder
from app.method.ranges import NonNegativeInt, PositiveInt, checked
from app.method.step import StepDecision
from callbacks.dashboard_layout import GUIDE, guide, layout
from callbacks.hyperparameters import settings_of, summaries

LONGEST_TEXT = 240  # characters of a response that are shown
MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in "&\\`*_[]<>|#"}


@runtime_checkable
class KnowsTexts(Protocol):
    """A DataModule that can show its training pairs."""

    def pair_texts(self, pair_ids: list[str]) -> dict[str, dict[str, str]]:
        """Return `prompt`, `chosen` and `rejected` of training pairs, by pair id."""
        ...


class MeasuredPair(NamedTuple):
    """A pair as measured at one step; sorts by its gap."""

    gap: float
    step: int
    pair_id: str
    kept: bool
    labels: Mapping[str, object]


class ExtremePairs:
    """A collection of the `count` lowest and `count` highest gaps of all decisions since it was last emptied."""

    def __init__(self, count: int):
        self.count = count
        self.lowest: list[MeasuredPair] = []
        self.highest: list[MeasuredPair] = []

    def add(self, decision: StepDecision) -> None:
        """Add the eligible pairs of a step."""
        seen = [
            MeasuredPair(
                gap, decision.step, decision.pair_ids[at], kept, {n: v[at] for n, v in decision.labels.items()}
            )
            for at, (gap, kept, eligible) in enumerate(
                zip(decision.gaps.tolist(), decision.kept.tolist(), decision.eligible.tolist(), strict=True)
            )
            if eligible
        ]
        self.lowest = heapq.nsmallest(self.count, [*self.lowest, *seen], key=lambda pair: pair.gap)
        self.highest = heapq.nlargest(self.count, [*self.highest, *seen], key=lambda pair: pair.gap)

    def empty(self) -> tuple[list[MeasuredPair], list[MeasuredPair]]:
        """Return both lists, the most extreme pairs first, and empty them."""
        lowest, highest, self.lowest, self.highest = self.lowest, self.highest, [], []
        return lowest, highest


def as_markdown(pairs: Sequence[MeasuredPair], texts: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table of `pairs`, with prompt, chosen and rejected text where `texts` has the pair id."""
    # few columns, because TensorBoard breaks the words in narrow ones
    lines = ["| pair | prompt | chosen | rejected |", "|---|---|---|---|"]
    for pair in pairs:
        labels = "".join(f"; {name}: {value}" for name, value in pair.labels.items() if value is not None)
        fate = "kept" if pair.kept else "dropped"
        text = texts.get(pair.pair_id, {})
        sides = [shown(text.get(side, "–")) for side in ("prompt", "chosen", "rejected")]
        told = f"**h = {pair.gap:.3f}**, {fate} at step {pair.step}; {shown(f'{pair.pair_id}{labels}')}"
        lines.append(f"| {' | '.join([told, *sides])} |")
    return "\n".join(lines)


def shown(text: str) -> str:
    """Return `text` on one line for a Markdown table, cut with an ellipsis, its markup escaped."""
    text = " ".join(text.split())
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT].rstrip()} …"
    return text.translate(MARKUP)


@checked
class BetaDashboard(Callback):
    """A callback that arranges the logged scalars in charts and adds histograms, extreme pairs and the KL.

    TensorBoard shows the charts in its "custom scalars" tab. Its "text" tab explains them and says what to do when
    they look wrong. Its "HParams" tab has the settings and final figures of runs with a config.yaml. The KL to the
    reference goes to every logger, as `train/kl_chosen` and `train/kl_rejected`.

    Args:
        histogram_every_n_steps: steps between histograms of `gap/kept` and `gap/dropped`.
        kl_every_n_steps: steps between measurements of the KL; each costs one more forward pass of policy and
            reference; 0 measures none.
        pairs_every_n_steps: steps between lists of the pairs with the most extreme gaps.
        pairs: number of pairs in such a list at either end.
    """

    def __init__(
        self,
        histogram_every_n_steps: PositiveInt = 10,
        kl_every_n_steps: NonNegativeInt = 20,
        pairs_every_n_steps: PositiveInt = 100,
        pairs: PositiveInt = 5,
    ):
        self.histogram_every_n_steps = histogram_every_n_steps
        self.kl_every_n_steps = kl_every_n_steps
        self.pairs_every_n_steps = pairs_every_n_steps
        self.extreme = ExtremePairs(pairs)
        self._decision: StepDecision | None = None
        self._kl: Tensor | None = None
        self._laid_out = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._laid_out = False

    def on_step_decided(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        self._decision = decision  # drawn at the end of the step
        due = self.kl_every_n_steps and (decision.step - 1) % self.kl_every_n_steps == 0
        # here, because all ranks measure together, and before the policy's update, as for every other curve
        self._kl = decision.measure_kl() if due and decision.measure_kl and trainer.loggers else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        decision, self._decision = self._decision, None
        if decision is None:
            return
        curves = self._log_kl(trainer, decision)
        writer = tensorboard_writer(trainer)
        if writer is None:
            return
        if not self._laid_out:  # only after the first step are the curves of this run known
            lay_out(writer, {*trainer.callback_metrics, *curves}, decision.step)
            self._laid_out = True
        if (decision.step - 1) % self.histogram_every_n_steps == 0:
            add_histograms(writer, decision)
        self.extreme.add(decision)
        if decision.step % self.pairs_every_n_steps == 0:
            self._list_extreme_pairs(trainer, writer, decision.step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = log_folder(trainer)  # every rank must ask, because Lightning broadcasts it
        writer = tensorboard_writer(trainer)
        if writer is None:
            return
        self._list_extreme_pairs(trainer, writer, trainer.global_step)
        config = folder / "config.yaml"
        if config.is_file():
            for summary in summaries(settings_of(yaml.safe_load(config.read_text(encoding="utf-8")))):
                writer._get_file_writer().add_summary(summary)  # as torch writes hparams itself
        writer.flush()

    def _log_kl(self, trainer: Trainer, decision: StepDecision) -> dict[str, float]:
        """Log the KL and return its curves.

        It goes to the loggers directly: `self.log` would repeat a measurement at every step up to the next one.
        """
        if self._kl is None:
            return {}
        chosen, rejected = self._kl[:, decision.eligible].mean(dim=1).tolist()
        curves = {"train/kl_chosen": chosen, "train/kl_rejected": rejected}
        for logger in trainer.loggers:
            logger.log_metrics(curves, step=decision.step)
        return curves

    def _list_extreme_pairs(self, trainer: Trainer, writer: SummaryWriter, step: int) -> None:
        lists = dict(zip(("lowest", "highest"), self.extreme.empty(), strict=True))
        data = getattr(trainer, "datamodule", None)
        for name, pairs in lists.items():
            if pairs:
                texts = data.pair_texts([pair.pair_id for pair in pairs]) if isinstance(data, KnowsTexts) else {}
                writer.add_text(f"pairs/{name} gaps", as_markdown(pairs, texts), step)


def lay_out(writer: SummaryWriter, tags: set[str], step: int) -> None:
    """Write the charts that have a curve among `tags`, and the guide to them."""
    writer.add_custom_scalars(layout(tags))
    for number, (name, text) in enumerate(guide(tags).items(), 1):
        writer.add_text(f"{GUIDE}/{number} {name}", text, step)


def add_histograms(writer: SummaryWriter, decision: StepDecision) -> None:
    """Write the histograms `gap/kept` and `gap/dropped`; omit one without pairs."""
    gaps: dict[str, torch.Tensor] = {
        "gap/kept": decision.gaps[decision.kept],
        "gap/dropped": decision.gaps[decision.eligible & ~decision.kept],
    }
    for name, values in gaps.items():
        if len(values):
            writer.add_histogram(name, values, decision.step)


def tensorboard_writer(trainer: Trainer) -> SummaryWriter | None:
    """Return the writer of the first TensorBoard logger on rank 0; None elsewhere or without such a logger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None
