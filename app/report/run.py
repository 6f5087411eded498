"""What a training run left in its log folder, read as far as it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app import run_folder
from app.errors import UserError
from app.intervals import Estimate
from app.run_record import COMMANDS_FILE
from callbacks.hyperparameters import arguments, last_word

SAMPLES = "samples.jsonl"


class Curve(NamedTuple):
    """A measurement over the run; both arrays are [n], steps ascending."""

    steps: np.ndarray
    values: np.ndarray

    def part(self, first: float, last: float) -> np.ndarray:
        """The finite values in this part of the curve, given as fractions of its points."""
        begin, end = round(first * len(self.values)), round(last * len(self.values))
        part = self.values[begin:end]
        return part[np.isfinite(part)]


@dataclass
class Run:
    """One run. What it lacks is empty, and `missing` says so."""

    name: str
    folder: Path
    curves: dict[str, Curve]  # by TensorBoard tag
    audit: pd.DataFrame | None  # one row per pair and step, as `PairAudit` writes it
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    commands: Sequence[str] = ()
    # of its samples: by name ("win rate", "mean true reward", …), and how the SFT model's compare
    samples: dict[str, Estimate] = field(default_factory=dict)
    baseline: dict[str, Estimate] = field(default_factory=dict)
    rivals: dict[str, Estimate] = field(default_factory=dict)  # win rate over the samples of other runs, by name

    def curve(self, tag: str) -> Curve | None:
        """The curve logged under `tag`, if any."""
        return self.curves.get(tag)

    def last(self, tag: str) -> float | None:
        """The last value logged under `tag`."""
        curve = self.curves.get(tag)
        return float(curve.values[-1]) if curve is not None and len(curve.values) else None

    @property
    def steps(self) -> int:
        """Optimizer steps that left a trace."""
        return max((int(curve.steps[-1]) + 1 for tag, curve in self.curves.items() if tag in PER_STEP), default=0)

    @property
    def chooses_beta(self) -> bool:
        """Whether a schedule chose β: it logs the share that it clamped."""
        return "beta/clamped" in self.curves

    @property
    def callbacks(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Class name and settings of every callback that config.yaml names."""
        entries = (self.config.get("trainer") or {}).get("callbacks") or []
        return [(last_word(entry.get("class_path")), arguments(entry)) for entry in entries]

    @property
    def filters(self) -> bool:
        """Whether pairs were left out on purpose."""
        kept = self.curve("filter/kept_fraction")
        return kept is not None and bool((kept.values < 1).any())


def read_run(folder: Path, name: str) -> Run:
    """Everything that `folder` holds of a run. Raises UserError when it has neither scalars nor an audit."""
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
    """All scalars in the TensorBoard events of a folder, else in the metrics.csv of Lightning's CSVLogger.

    A step that was taken twice counts as the last time.
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
    """The columns that have a "/" in their name, by step; none where there is no such file."""
    if not file.is_file():
        return {}
    try:
        table = pd.read_csv(file).groupby("step").last()
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is not what CSVLogger writes: {str(error).splitlines()[0]}.") from error
    columns = {tag: table[tag].dropna() for tag in table.columns if "/" in tag}
    return {tag: Curve(column.index.to_numpy(), column.to_numpy(float)) for tag, column in columns.items()}


def read_audit(folder: Path) -> pd.DataFrame | None:
    """All rows of the audit, if there is one. Raises UserError when a file of it is damaged."""
    return run_folder.read_audit(folder) if any((folder / "audit").glob("*.parquet")) else None


def curves_of_audit(audit: pd.DataFrame) -> dict[str, Curve]:
    """The curves that an audit holds as well, for a run without TensorBoard events."""
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
    """The configuration that the run recorded, as mapping and as text; both empty when there is none."""
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
    """The `fit` commands that were given, the first first; more than one where the run was resumed."""
    file = folder / COMMANDS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line.startswith("beta-dpo fit")]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart: `version_0` of two runs says nothing."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("runs: the same folder is given twice.")
