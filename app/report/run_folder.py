"""Reading of the log folder of a run: its audit, its configuration and the pairs that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything

from app.cli.options import yaml_fault
from app.core.errors import UserError, first_line
from callbacks.pair_audit import DATA
from datamodules.base import PairDataModule
from datamodules.table import PairTable


def read_audit(folder: Path) -> pd.DataFrame:
    """Return all rows of `PairAudit`, one per pair and step. Raises UserError if there are none."""
    files = sorted((folder / "audit").glob("*.parquet"))
    if not files:
        raise UserError(
            f"{folder} holds no audit/*.parquet: give the log folder of a run that had PairAudit.{inside(folder)}"
        )
    try:
        rows = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{folder}/audit cannot be read: {first_line(error)}") from error
    lacks = [name for name in AUDIT_COLUMNS[:8] if name != "log_weight" and name not in rows]
    if lacks or not len(rows):
        what = f"no column {lacks[0]}" if lacks else "no row"
        raise UserError(f"{folder}/audit has {what}: it is not what PairAudit writes, so remove it.")
    return rows


def inside(folder: Path) -> str:
    """Return ` Did you mean …?` with the newest run in the folder, or an empty text."""
    found = sorted(folder.glob("version_*"), key=lambda path: path.stat().st_mtime)
    return f" Did you mean {found[-1]}?" if found else ""


# the columns of `PairAudit` itself; every other column is a label of the data
AUDIT_COLUMNS = (
    *("step", "pair_id", "gap", "log_weight", "kept", "beta", "running_mean", "running_std"),
    *("reference_margin", "margin", "label_confidence", "loss_weight"),
)
MOST_GROUPS = 20  # a label with more values does not group the pairs


def grouping_labels(audit: pd.DataFrame) -> list[str]:
    """Return the label columns that group the pairs: 2 to 20 values, each shared by five pairs on average."""
    labels = [name for name in audit.columns if name not in AUDIT_COLUMNS]
    most = min(MOST_GROUPS, audit.pair_id.nunique() // 5)
    return [name for name in labels if 2 <= audit[name].nunique() <= most]


def read_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    """Return the run's config.yaml as mapping and as text, both empty without one. UserError unless it is YAML."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}, ""
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {yaml_fault(error)}.") from error
    parts = ("trainer", "model", "data") if isinstance(config, Mapping) else ()
    if not all(isinstance(config.get(part) or {}, Mapping) for part in parts):
        raise UserError(f"{file} is not the record of `beta-dpo fit`: remove it, or give another folder.")
    return (config if isinstance(config, Mapping) else {}), text


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
        opened = self.data.open_table("train")
        assert opened is not None
        self.table: PairTable = opened[0]
        audits = (pq.read_schema(file).metadata or {} for file in sorted((folder / "audit").glob("*.parquet"))[:1])
        if any(audit.get(DATA) not in (None, b"", self.table.content(opened[1]).encode()) for audit in audits):
            raise UserError(
                f"The training pairs are not those of {folder} any more, whose pair ids would name others: restore "
                "data and tokenizer, or call the command where a relative data.path leads to them."
            )
        rows = self.table.reachable(opened[1])
        self.rows = dict(zip(self.table.pair_ids(rows), rows.tolist(), strict=True))

    def row(self, pair_id: str) -> int:
        """Return the pair's row in the table. Raises UserError if the data does not have the pair (any more)."""
        if pair_id not in self.rows:
            raise UserError(
                f"The run's data has no pair {pair_id}: it has changed since the run, or a relative data.path "
                "is relative to another folder."
            )
        return self.rows[pair_id]

    def texts(self, pair_id: str) -> dict[str, str]:
        """Return `prompt`, `chosen` and `rejected` as trained on, with special tokens except BOS and EOS."""
        tokenizer, pair = self.data.tokenizer, self.table[self.row(pair_id)]
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        sides = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        return {
            name: str(tokenizer.decode([token for token in ids.tolist() if token not in ends])).strip()
            for name, ids in sides.items()
            if ids is not None
        }

    def extra_tokens_of_rejected(self, pair_ids: list[str]) -> list[int]:
        """Return |y_l| − |y_w| of these pairs, in tokens."""
        pairs = [self.table[self.row(pair_id)] for pair_id in pair_ids]
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
