"""The reader of a training run's log folder; every part of a run may be missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.cli.run_record import COMMANDS_FILE
from app.core.errors import UserError
from app.core.intervals import Estimate
from app.report import run_folder
from callbacks.hyperparameters import arguments, last_word
from callbacks.slots import entries

SAMPLES = "samples.jsonl"
_NUMBERED = re.compile(r"version_\d+")  # Lightning's loggers number their folders in this way


class Curve(NamedTuple):
    """A measurement over the run; both arrays are [n], with ascending steps."""

    steps: np.ndarray
    values: np.ndarray

    def part(self, first: float, last: float) -> np.ndarray:
        """Return the finite values between two fractions of the curve's points."""
        begin, end = round(first * len(self.values)), round(last * len(self.values))
        part = self.values[begin:end]
        return part[np.isfinite(part)]


@dataclass
class Run:
    """One run; parts that its folder lacks are empty (`app.report.page.missing` reports them)."""

    name: str
    folder: Path
    curves: dict[str, Curve]  # by TensorBoard tag
    audit: pd.DataFrame | None  # one row per pair and step, as `PairAudit` writes it
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    commands: Sequence[str] = ()
    # figures of the run's samples by name ("win rate", "mean true reward", …), and the same of the SFT model's
    samples: dict[str, Estimate] = field(default_factory=dict)
    baseline: dict[str, Estimate] = field(default_factory=dict)
    rivals: dict[str, Estimate] = field(default_factory=dict)  # win rate over the samples of other runs, by name

    def curve(self, tag: str) -> Curve | None:
        """Return the curve logged under `tag`, if any."""
        return self.curves.get(tag)

    def last(self, tag: str) -> float | None:
        """Return the last value logged under `tag`, if any."""
        curve = self.curves.get(tag)
        return float(curve.values[-1]) if curve is not None and len(curve.values) else None

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps, from the last step with a logged value."""
        return max((int(curve.steps[-1]) for tag, curve in self.curves.items() if tag in PER_STEP), default=0)

    @property
    def chooses_beta(self) -> bool:
        """Return whether a schedule chose β; only a schedule logs the share of clamped β."""
        return "beta/clamped" in self.curves

    @property
    def callbacks(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the class name and the settings of every callback in config.yaml."""
        return [(last_word(entry.get("class_path")), arguments(entry)) for entry in entries(self.config)]

    @property
    def filters(self) -> bool:
        """Return whether some step left out pairs that it could have trained on: those with a finite gap."""
        if self.audit is not None:
            return bool((np.isfinite(self.audit.gap.to_numpy(float)) & ~self.audit.kept.astype(bool)).any())
        kept = self.curve("filter/kept_fraction")
        return kept is not None and bool((kept.values < 1).any())


def read_run(folder: Path, name: str) -> Run:
    """Return the run in `folder`. Raises UserError if it has neither scalars nor an audit, or a damaged file."""
    curves, audit = read_curves(folder), read_audit(folder)
    if not curves and audit is None:
        raise UserError(
            f"{folder} is not the log folder of a run: it holds neither TensorBoard events, metrics.csv nor "
            "audit/*.parquet (callbacks.PairAudit)."
        )
    if audit is not None:
        curves = curves_of_audit(audit) | curves
    config, text = read_config(folder)
    return Run(name, folder, curves, audit, config, text, read_commands(folder))


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return all scalars in the TensorBoard events of a folder, else in the metrics.csv of Lightning's CSVLogger.

    If a step was logged twice, its last value counts.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return read_csv(folder / "metrics.csv")
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    curves = {}
    for tag in accumulator.Tags()["scalars"]:
        points = {point.step: point.value for point in accumulator.Scalars(tag)}
        steps = sorted(points)
        curves[tag] = Curve(np.array(steps), np.array([points[step] for step in steps], dtype=float))
    return curves


def read_csv(file: Path) -> dict[str, Curve]:
    """Return the columns with "/" in their name; none without the file. Raises UserError for another format."""
    if not file.is_file():
        return {}
    try:
        table = pd.read_csv(file).groupby("step").last()
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is not what CSVLogger writes: {str(error).splitlines()[0]}.") from error
    columns = {tag: table[tag].dropna() for tag in table.columns if "/" in tag}
    return {tag: Curve(column.index.to_numpy(), column.to_numpy(float)) for tag, column in columns.items()}


def read_audit(folder: Path) -> pd.DataFrame | None:
    """Return all rows of the audit, if there is one. Raises UserError if one of its files is damaged."""
    return run_folder.read_audit(folder) if any((folder / "audit").glob("*.parquet")) else None


def curves_of_audit(audit: pd.DataFrame) -> dict[str, Curve]:
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
        "train/reward_accuracy": by_step.right.mean(),
    }
    return {
        tag: Curve(column.index.to_numpy(), column.to_numpy(float))
        for tag, column in found.items()
        if column.notna().any()
    }


PER_STEP = ("beta/used", "gap/mean", "train/loss")


def read_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    """Return the run's config.yaml as mapping and as text, both empty without one. UserError unless it is YAML."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}, ""
    text = file.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {str(error).splitlines()[0]}.") from error
    return (config if isinstance(config, Mapping) else {}), text


def read_commands(folder: Path) -> list[str]:
    """Return the run's `fit` commands in order; a resumed run has more than one."""
    file = folder / COMMANDS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line.startswith("beta-dpo fit")]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest path suffixes that differ, without `version_0` where that is enough.

    Raises UserError if a folder is given twice.
    """
    whole = [folder.resolve().parts for folder in folders]
    named = [parts[:-1] if _NUMBERED.fullmatch(parts[-1]) else parts for parts in whole]
    for parts in (named, whole):
        for length in range(1, max(map(len, parts), default=1) + 1):
            names = ["/".join(part[-length:]) for part in parts]
            if len(set(names)) == len(names):
                return names
    raise UserError("runs: the same folder is given twice.")
