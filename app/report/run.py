"""The reader of a run's log folder, of which every part may be missing, and of the pairs that it was trained on."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tb_logging

from app.cli.options import yaml_fault
from app.cli.run_record import COMMANDS_FILE
from app.core.errors import UserError, refused, renamed
from app.core.intervals import Estimate
from app.core.log_folder import whole_lines
from callbacks import arguments, entries
from callbacks.pair_audit import AUDIT_COLUMNS, DATA, inside, read_audit
from datamodules.base import PairDataModule
from datamodules.records import TokenisedPair
from datamodules.table import PairTable

log = logging.getLogger(__name__)
SAMPLES = "samples.jsonl"
MOST_GROUPS = 20  # a label with more values does not group the pairs


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
        found = [one for one in entries(self.config) if str(one.get("class_path")).rsplit(".", 1)[-1] == kind]
        return arguments(found[0]) if found else None

    @property
    def filters(self) -> bool:
        """Return whether the audit has pairs left out that could have been trained on: those with a finite gap."""
        audit = self.audit
        return audit is not None and bool((audit.gap.notna() & ~audit.kept).any())


def read_run(folder: Path, name: str) -> Run:
    """Return the run in `folder`. Raises UserError if it has neither scalars nor an audit, or a damaged file."""
    curves = read_curves(folder)
    audit = read_audit(folder) if any((folder / "audit").glob("*.parquet")) else None
    if not curves and audit is None:
        lacks = "it holds neither TensorBoard events, metrics.csv nor audit/*.parquet (callbacks.PairAudit)"
        raise UserError(f"{folder} is not the log folder of a run: {lacks}.{inside(folder)}")
    if audit is not None:
        # the audit has every step at full precision, but its accuracy is that of the loss's own gap
        own = curves_of_audit(audit)
        curves = own | curves | {tag: curve for tag, curve in own.items() if tag != "train/reward_accuracy"}
    config, text = read_config(folder)
    file = folder / COMMANDS_FILE  # a resumed run has several
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    commands = [line for line in lines if line.startswith("beta-dpo fit")]
    return Run(name, folder, curves, audit, config, text, commands)


def read_curves(folder: Path) -> dict[str, pd.Series]:
    """Return all scalars of a folder's TensorBoard events, else of its metrics.csv; a step's last value counts."""
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
    with refused(f"{file} is not what CSVLogger writes"):
        table = pd.read_csv(io.StringIO(whole_lines(file))).groupby("step").last()
        curves = {tag: table[tag].dropna().astype(float) for tag in table.columns if "/" in tag}
        return {tag: curve for tag, curve in curves.items() if len(curve)}


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


def grouping_labels(audit: pd.DataFrame) -> list[str]:
    """Return the label columns that group the pairs: 2 to 20 values, each shared by five pairs on average."""
    labels = [name for name in audit.columns if name not in AUDIT_COLUMNS]
    most = min(MOST_GROUPS, audit.pair_id.nunique() // 5)
    return [name for name in labels if 2 <= audit[name].nunique() <= most]


def read_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    """Return the run's config.yaml as mapping and as text, both empty without one. UserError for another file."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}, ""
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {yaml_fault(error)}.") from error
    try:
        parts = [*map(config.get, ("trainer", "model", "data")), *entries(config)] if config is not None else []
        read = all(isinstance(part or {}, Mapping) and isinstance(arguments(part), Mapping) for part in parts)
    except AttributeError:  # a part is a list or a number
        read = False
    if not read:
        raise UserError(f"{file} is not the record of `beta-dpo fit`: remove it, or give another folder.")
    return config or {}, text


class PairTexts:
    """The training pairs of a run as text, by pair id, decoded from its table of tokens.

    The data is opened as in the run's config.yaml: relative paths start at the current folder, and a table that is
    no longer cached is built again. Prompts are cut as in the run.
    """

    def __init__(self, folder: Path) -> None:
        config, _ = read_config(folder)
        if not all("class_path" in (config.get(part) or {}) for part in ("model", "data")):
            file = folder / "config.yaml"
            raise UserError(f"{file} is missing or has no model and data: it is not the record of `beta-dpo fit`.")
        self.data = training_data(config)
        cure = f"{folder} names it; call the command where the run began"
        with renamed({"check the path that you gave": cure}):
            opened = self.data.open_table("train")
        assert opened is not None
        self.table: PairTable = opened[0]
        audits = (pq.read_schema(file).metadata or {} for file in sorted((folder / "audit").glob("*.parquet"))[:1])
        if any(audit.get(DATA) not in (None, b"", self.table.content(opened[1]).encode()) for audit in audits):
            cure = "restore data and tokenizer, or call the command where a relative data.path leads to them"
            raise UserError(f"The training pairs are not those of {folder} any more: {cure}.")
        rows = self.table.reachable(opened[1])
        self.rows = dict(zip(self.table.pair_ids(rows), rows.tolist(), strict=True))

    def pair(self, pair_id: str) -> TokenisedPair:
        """Return a pair as tokens. Raises UserError if the data does not have it (any more)."""
        if pair_id not in self.rows:
            why = "it has changed since the run, or a relative data.path starts at another folder"
            raise UserError(f"The run's data has no pair {pair_id}: {why}.")
        return self.table[self.rows[pair_id]]

    def texts(self, pair_id: str) -> dict[str, str]:
        """Return `prompt`, `chosen` and `rejected` as trained on, with special tokens except BOS and EOS."""
        tokenizer, pair = self.data.tokenizer, self.pair(pair_id)
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        return {
            name: str(tokenizer.decode([token for token in ids.tolist() if token not in ends])).strip()
            for name in ("prompt", "chosen", "rejected")
            if (ids := getattr(pair, name)) is not None
        }

    def extra_tokens_of_rejected(self, pair_ids: list[str]) -> list[int]:
        """Return |y_l| − |y_w| of these pairs, in tokens."""
        pairs = map(self.pair, pair_ids)
        return [(0 if pair.rejected is None else len(pair.rejected)) - len(pair.chosen) for pair in pairs]


def training_data(config: Mapping[str, Any]) -> PairDataModule:
    """Return the DataModule of a recorded configuration, with the model's tokenizer if none is named."""
    recorded = config["data"]
    settings = {"class_path": recorded["class_path"], "init_args": dict(recorded.get("init_args") or {})}
    # generated data depends on the seed of the run
    seed_everything(config.get("seed_everything") or 0, verbose=False)
    if settings["init_args"].get("tokenizer", "") is None:
        settings["init_args"]["tokenizer"] = (config["model"].get("init_args") or {}).get("name")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PairDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": settings})).data
