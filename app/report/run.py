"""The reader of a training run's log folder; every part of a run may be missing."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tb_logging

from app.cli.run_record import COMMANDS_FILE
from app.core.errors import UserError, first_line
from app.core.intervals import Estimate
from app.core.log_folder import whole_lines
from app.report.run_folder import inside, read_audit, read_config
from callbacks.hyperparameters import arguments, last_word
from callbacks.slots import entries

log = logging.getLogger(__name__)
SAMPLES = "samples.jsonl"


@dataclass
class Run:
    """One run; parts that its folder lacks are empty (`app.report.page.missing` reports them)."""

    name: str
    folder: Path
    curves: dict[str, pd.Series]  # values by step, ascending, one or more for every TensorBoard tag
    audit: pd.DataFrame | None  # one row per pair and step, as `PairAudit` writes it
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    commands: Sequence[str] = ()
    # figures of the run's samples by name ("win rate", "mean true reward", …), and the same of the SFT model's
    samples: dict[str, Estimate] = field(default_factory=dict)
    baseline: dict[str, Estimate] = field(default_factory=dict)
    rivals: dict[str, Estimate] = field(default_factory=dict)  # win rate over the samples of other runs, by name

    def last(self, tag: str) -> float | None:
        """Return the last value logged under `tag`, if any."""
        return float(self.curves[tag].iloc[-1]) if tag in self.curves else None

    def part(self, tag: str, first: float, last: float) -> np.ndarray:
        """Return the finite values between two fractions of a curve's points; none without the curve."""
        values = self.curves[tag].to_numpy() if tag in self.curves else np.empty(0)
        part = values[round(first * len(values)) : round(last * len(values))]
        return part[np.isfinite(part)]

    def callback(self, kind: str) -> Mapping[str, Any] | None:
        """Return the settings of the callback of the class `kind` in config.yaml, if it has one."""
        found = (arguments(entry) for entry in entries(self.config) if last_word(entry.get("class_path")) == kind)
        return next(found, None)

    @property
    def filters(self) -> bool:
        """Return whether the audit has pairs left out that could have been trained on: those with a finite gap."""
        audit = self.audit
        return audit is not None and bool((np.isfinite(audit.gap.to_numpy(float)) & ~audit.kept.astype(bool)).any())


def read_run(folder: Path, name: str) -> Run:
    """Return the run in `folder`. Raises UserError if it has neither scalars nor an audit, or a damaged file."""
    curves = read_curves(folder)
    audit = read_audit(folder) if any((folder / "audit").glob("*.parquet")) else None
    if not curves and audit is None:
        raise UserError(
            f"{folder} is not the log folder of a run: it holds neither TensorBoard events, metrics.csv nor "
            f"audit/*.parquet (callbacks.PairAudit).{inside(folder)}"
        )
    if audit is not None:
        # the audit has every step at full precision, but its accuracy is that of the loss's own gap
        own = curves_of_audit(audit)
        curves = own | curves | {tag: curve for tag, curve in own.items() if tag != "train/reward_accuracy"}
    config, text = read_config(folder)
    return Run(name, folder, curves, audit, config, text, read_commands(folder))


def read_curves(folder: Path) -> dict[str, pd.Series]:
    """Return all scalars in the TensorBoard events of a folder, else in the metrics.csv of Lightning's CSVLogger.

    If a step was logged twice, its last value counts. The log names a file whose rest is damaged and left out.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return read_csv(folder / "metrics.csv")
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader = tb_logging.get_logger()
    before = reader.level
    reader.setLevel(logging.DEBUG)  # at which it says that it stops at a damaged record
    reader.addFilter(_warn_of_damage)
    try:
        accumulator.Reload()
    finally:
        reader.setLevel(before)
        reader.removeFilter(_warn_of_damage)
    curves = {}
    for tag in accumulator.Tags()["scalars"]:
        points = {point.step: point.value for point in accumulator.Scalars(tag)}
        curves[tag] = pd.Series(points, dtype=float).sort_index()
    return curves


def _warn_of_damage(record: logging.LogRecord) -> bool:
    if record.msg.startswith("Truncated record"):
        log.warning("%s is cut or damaged: what follows the damage is not shown", record.args[0])  # type: ignore[index]
    return record.levelno >= logging.WARNING


def read_csv(file: Path) -> dict[str, pd.Series]:
    """Return the columns with "/" in their name; none without the file. Raises UserError for another format."""
    if not file.is_file():
        return {}
    try:
        table = pd.read_csv(io.StringIO(whole_lines(file))).groupby("step").last()
        curves = {tag: table[tag].dropna().astype(float) for tag in table.columns if "/" in tag}
        return {tag: curve for tag, curve in curves.items() if len(curve)}
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is not what CSVLogger writes: {first_line(error)}.") from error


def curves_of_audit(audit: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the curves that can be computed from the audit, for a run without logged scalars."""
    audit = audit.assign(right=(1 + np.sign(audit.gap)) / 2, kept_gap=audit.gap.where(audit.kept))
    by_step = audit.groupby("step")
    found = {
        "beta/used": audit.beta.where(audit.kept).groupby(audit.step).mean(),
        "gap/mean": by_step.gap.mean(),
        "gap/kept_mean": by_step.kept_gap.mean(),
        "gap/running_mean": by_step.running_mean.first(),
        "gap/running_std": by_step.running_std.first(),
        "filter/kept_fraction": by_step.kept.mean(),
        "pairs": by_step.size(),
        "train/reward_accuracy": by_step.right.mean(),
    }
    return {tag: column.astype(float) for tag, column in found.items() if column.notna().any()}


def read_commands(folder: Path) -> list[str]:
    """Return the run's `fit` commands in order; a resumed run has more than one."""
    file = folder / COMMANDS_FILE
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return [line for line in lines if line.startswith("beta-dpo fit")]
