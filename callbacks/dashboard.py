"""The TensorBoard dashboard: charts with a guide, histograms of gaps, extreme pairs, the settings of the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pyarrow as pa
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from app.core.log_folder import flattened, log_folder
from app.method.ranges import NonNegativeInt, PositiveInt, checked
from app.method.step import StepDecision
from callbacks.pair_audit import AUDIT_COLUMNS, audit_rows

LONGEST_TEXT = 240  # characters of a response that are shown
MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in "&\\`*_[]<>|#"}
KL = ("train/kl_chosen", "train/kl_rejected")


@dataclass(frozen=True)
class Chart:
    """An entry of charts.yaml."""

    title: str
    tags: Sequence[str]
    shows: str
    when_wrong: str
    band: bool = False

    @property
    def layout(self) -> list[object]:
        """Return the chart as `SummaryWriter.add_custom_scalars` takes it."""
        # TensorBoard matches a tag as the start of a regular expression, but in a band
        tags = list(self.tags) if self.band else [f"{re.escape(tag)}$" for tag in self.tags]
        return ["Margin" if self.band else "Multiline", tags]


_FILE = files("callbacks").joinpath("charts.yaml").read_text(encoding="utf-8")
CHARTS = {name: tuple(Chart(**chart) for chart in charts) for name, charts in yaml.safe_load(_FILE).items()}


def charts_with(tags: set[str]) -> dict[str, list[Chart]]:
    """Return by category the charts that have at least one of the curves `tags`."""
    # with all of their curves: TensorBoard draws a chart twice if it differs between runs
    found = {name: [chart for chart in charts if tags.intersection(chart.tags)] for name, charts in CHARTS.items()}
    return {name: charts for name, charts in found.items() if charts}


def lay_out(writer: SummaryWriter, tags: set[str], step: int) -> None:
    """Write the charts that have a curve among `tags`, and a Markdown table that explains each category."""
    found = charts_with(tags)
    writer.add_custom_scalars({name: {one.title: one.layout for one in charts} for name, charts in found.items()})
    for number, (name, charts) in enumerate(found.items(), 1):
        rows = [f"| **{one.title}** | {one.shows} | {one.when_wrong} |" for one in charts]
        table = "\n".join(["| chart | shows | when it looks wrong |\n|---|---|---|", *rows])
        writer.add_text(f"how to read/{number} {name}", table, step)


def as_markdown(pairs: Sequence[Mapping[str, Any]], texts: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table of rows of the audit, with their texts where `texts` has the pair id."""
    # few columns, because TensorBoard breaks the words in narrow ones
    lines = ["| pair | prompt | chosen | rejected |", "|---|---|---|---|"]
    for pair in pairs:
        labels = [f"{name}: {pair[name]}" for name in pair if name not in AUDIT_COLUMNS and pair[name] is not None]
        text = texts.get(pair["pair_id"], {})
        sides = [shown(text.get(side, "–")) for side in ("prompt", "chosen", "rejected")]
        fate = f"{'kept' if pair['kept'] else 'dropped'} at step {pair['step']}"
        told = f"**h = {pair['gap']:.3f}**, {fate}; {shown('; '.join([pair['pair_id'], *labels]))}"
        lines.append(f"| {' | '.join([told, *sides])} |")
    return "\n".join(lines)


def shown(text: str) -> str:
    """Return `text` on one line for a Markdown table, cut with an ellipsis, its markup escaped."""
    text = " ".join(text.split())
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT].rstrip()} …"
    return text.translate(MARKUP)


@checked
@dataclass(eq=False)
class BetaDashboard(Callback):
    """A callback that arranges the logged scalars in charts and adds histograms, extreme pairs and the KL.

    TensorBoard shows the charts in its "custom scalars" tab, explains them in its "text" tab, and has the settings
    and final figures of runs with a config.yaml in its "HParams" tab. Every logger gets the KL to the reference.

    Args:
        histogram_every_n_steps: steps between histograms of `gap/kept` and `gap/dropped`.
        kl_every_n_steps: steps between measurements of the KL, each another forward pass of both models; 0: none.
        pairs_every_n_steps: steps between lists of the pairs with the most extreme gaps.
        pairs: number of pairs in such a list at either end.
    """

    histogram_every_n_steps: PositiveInt = 10
    kl_every_n_steps: NonNegativeInt = 20
    pairs_every_n_steps: PositiveInt = 100
    pairs: PositiveInt = 5

    def __post_init__(self) -> None:
        self._extreme: dict[str, pa.Table] = {}  # rows of the audit since the last list, the most extreme first
        self._decision: StepDecision | None = None
        self._laid_out = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._laid_out = False

    def on_step_decided(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        self._decision = decision  # drawn at the end of the step
        due = self.kl_every_n_steps and (decision.step - 1) % self.kl_every_n_steps == 0
        # here, because all ranks measure together, and before the policy's update, as for every other curve
        if due and decision.measure_kl and trainer.loggers:
            means = decision.measure_kl()[:, decision.eligible].mean(dim=1).tolist()
            for logger in trainer.loggers:  # `self.log` would repeat a measurement at every step up to the next one
                logger.log_metrics(dict(zip(KL, means, strict=True)), step=decision.step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        decision, self._decision = self._decision, None
        writer = tensorboard_writer(trainer)
        if decision is None or writer is None:
            return
        if not self._laid_out:  # only after the first step are the curves of this run known
            measured = KL if self.kl_every_n_steps and decision.measure_kl else ()
            lay_out(writer, {*trainer.callback_metrics, *measured}, decision.step)
            self._laid_out = True
        if (decision.step - 1) % self.histogram_every_n_steps == 0:
            for name, chosen in (("kept", decision.kept), ("dropped", decision.eligible & ~decision.kept)):
                if chosen.any():
                    writer.add_histogram(f"gap/{name}", decision.gaps[chosen], decision.step)
        rows = audit_rows(decision).filter(pa.array(decision.eligible.tolist()))
        for name, order in (("lowest", "ascending"), ("highest", "descending")):
            both = pa.concat_tables([self._extreme.get(name, rows[:0]), rows], promote_options="permissive")
            self._extreme[name] = both.sort_by([("gap", order)])[: self.pairs]
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

    def _list_extreme_pairs(self, trainer: Trainer, writer: SummaryWriter, step: int) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        for name, table in self._extreme.items():
            if pairs := table.to_pylist():
                texts = data.pair_texts([pair["pair_id"] for pair in pairs]) if hasattr(data, "pair_texts") else {}
                writer.add_text(f"pairs/{name} gaps", as_markdown(pairs, texts), step)
        self._extreme = {}


def tensorboard_writer(trainer: Trainer) -> SummaryWriter | None:
    """Return the writer of the first TensorBoard logger on rank 0; None elsewhere or without such a logger."""
    writers = (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
    return next(writers, None) if trainer.is_global_zero else None


# --- the HParams tab, which compares the settings and final figures of the runs of a sweep ------------------

Value = str | float | bool

# title in the tab → key in the run's configuration; the tab shows the first five by default
SETTINGS = {
    "α": "schedule.alpha",
    "ρ": "filter.keep_ratio",
    "β0": "model.beta0",
    "learning rate": "model.optimizer.lr",
    "loss": "model.loss",
    "filter": "filter.by",
    "level of β": "schedule.level",
    "momentum": "statistics.momentum",
    "gap scale": "statistics.gap_scale",
    "ε": "schedule.epsilon",
    "α of the margin": "margin.alpha",
    "sft weight": "model.sft_weight",
    "optimizer": "model.optimizer",
    "max grad norm": "model.max_grad_norm",
    "model": "model.name",
    "data": "data.path",
    "batch size": "data.batch_size",
    "steps": "trainer.max_steps",
    "epochs": "trainer.max_epochs",
    "seed": "seed_everything",
}
TEXTS = {"loss", "filter", "level of β", "gap scale", "optimizer", "model", "data"}
# the tab takes the last logged value of a run; by default it shows the first five metrics
METRICS = (
    "val/reward_accuracy",
    "val/policy_accuracy",
    "val/loss",
    "train/kl_chosen",
    "beta/used",
    "val/reward_margin",
    "val/log_ratio_chosen",
    "train/reward_accuracy",
    "beta/clamped",
    "train/pairs_per_second",
)


def settings_of(config: Mapping[str, Any]) -> dict[str, Value]:
    """Return the `SETTINGS` that the configuration of a run (config.yaml as read) has a value for."""
    given = {"model.loss": "SigmoidLoss"} | {k: one for k, one in flattened(config).items() if one is not None}
    return {title: given[key] for title, key in SETTINGS.items() if isinstance(given.get(key), (str, int, float))}


def summaries(settings: Mapping[str, Value]) -> tuple[Summary, ...]:
    """Return the summaries that a finished run writes to its event file to appear in the HParams tab."""
    # the tab takes its columns from one run only, so every run names all settings, even those that it lacks
    every = {title: "" if title in TEXTS else 0.0 for title in SETTINGS}
    columns, _, _ = hparams(every, dict.fromkeys(METRICS, 0.0))
    (value,) = columns.value
    content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in list(SETTINGS)[:5]  # the tab puts settings that differ first
    value.metadata.plugin_data.content = content.SerializeToString()
    _, start, end = hparams(dict(settings), {})
    return columns, start, end
