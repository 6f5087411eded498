"""The audit: parquet files with the measurements and decisions for every pair at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError, refused
from app.core.files import atomic_file
from app.core.log_folder import log_folder, refuse_another_run
from app.method.ranges import PositiveInt, checked
from app.method.step import StepDecision

DATA = b"data"  # the key of the hash of the training pairs in the metadata of a file
# those of the decision; every other column is a label of the data
AUDIT_COLUMNS = (
    *("step", "pair_id", "gap", "log_weight", "kept", "beta", "running_mean", "running_std"),
    *("reference_margin", "margin", "label_confidence", "loss_weight"),
)


@checked
class PairAudit(Callback):
    """A callback that writes `<log dir>/audit/*.parquet`, one row per pair and step.

    Columns: step (from 1), pair_id, gap, log_weight, kept, beta, running_mean, running_std, reference_margin (how
    strongly the reference prefers the chosen response, nats per token), margin, label_confidence (the probability
    of a right label, of RE-PO), loss_weight, then the label columns of the data; a label with one of these names
    gets the prefix `label_`. A column that the arm does not have is empty.

    Args:
        every_n_steps: steps per file; a file is written under a temporary name and renamed.
    """

    def __init__(self, every_n_steps: PositiveInt = 100):
        self.every_n_steps = every_n_steps
        # set when a run restarts that never reached a checkpoint and so repeats its steps
        self.replaces_steps = False
        self._decision: StepDecision | None = None
        self._tables: list[pa.Table] = []
        self._folder = Path()
        self._data = b""  # a hash of the training pairs, which the pair ids name

    def on_step_decided(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        self._decision = decision

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in `setup`, where Lightning does not know yet whether the run is resumed
        self._folder = log_folder(trainer) / "audit"
        reads = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        files = sorted(self._folder.glob("*.parquet")) if reads else []
        other_run = bool(files) and trainer.ckpt_path is None and not self.replaces_steps
        refuse_another_run(trainer, other_run, f"{self._folder} already holds the audit")
        data: Any = getattr(trainer, "datamodule", None)
        self._data = data.content("train").encode() if hasattr(data, "content") else b""
        for file in files:
            forget_steps_from(file, trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if self._decision is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._tables.append(audit_rows(self._decision))
        self._decision = None
        if len(self._tables) >= self.every_n_steps:
            self.flush()

    def flush(self, *_: object) -> None:
        """Write the rows in memory to one file named by its first and last step."""
        if not self._tables:
            return
        # a label may be missing from all pairs of one step, or be integers there and floats elsewhere
        table = pa.concat_tables(self._tables, promote_options="permissive")
        self._tables = []
        first, last = table["step"][0].as_py(), table["step"][-1].as_py()
        with atomic_file(self._folder / f"steps-{first:08d}-{last:08d}.parquet") as temporary:
            pq.write_table(table.replace_schema_metadata({DATA: self._data}), temporary)

    # a resumed run needs every step up to its checkpoint
    on_save_checkpoint = on_train_end = on_exception = flush  # type: ignore[assignment]


def audit_rows(decision: StepDecision) -> pa.Table:
    """Return a table with one row per pair of the global batch."""
    pairs, moments = len(decision.pair_ids), decision.moments

    def column(value: Tensor | float | None) -> pa.Array:
        return pa.array(value.tolist() if isinstance(value, Tensor) else [value] * pairs, pa.float64())

    decided = (
        pa.array([decision.step] * pairs, pa.int64()),
        pa.array(list(decision.pair_ids), pa.string()),
        column(decision.gaps),
        column(decision.log_weights),
        pa.array(decision.kept.tolist(), pa.bool_()),
        column(decision.beta),
        *(column(moments.mean if moments else None), column(moments.std if moments else None)),
        *(column(decision.reference_margin), column(decision.margin)),
        *(column(decision.confidence), column(decision.loss_weight)),
    )
    columns: dict[str, Any] = dict(zip(AUDIT_COLUMNS, decided, strict=True))
    for name, values in decision.labels.items():
        while name in columns:
            name = f"label_{name}"
        columns[name] = pa.array(list(values))
    return pa.table(columns)


def forget_steps_from(file: Path, step: int) -> None:
    """Drop the rows of `step` and later, which a run resumed from an earlier checkpoint repeats."""
    with refused(f"{file} cannot be read, so the run cannot resume it: remove it"):
        table = pq.read_table(file)
    earlier = table.filter(pa.compute.less(table["step"], step))
    if not earlier.num_rows:
        file.unlink()
    elif earlier.num_rows < table.num_rows:
        with atomic_file(file) as temporary:
            pq.write_table(earlier, temporary)


def read_audit(folder: Path) -> pd.DataFrame:
    """Return all rows of `PairAudit`, one per pair and step. Raises UserError if there are none."""
    files = sorted((folder / "audit").glob("*.parquet"))
    if not files:
        cure = "give the log folder of a run that had PairAudit"
        raise UserError(f"{folder} holds no audit/*.parquet: {cure}.{inside(folder)}")
    with refused(f"{folder}/audit cannot be read"):
        rows = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    lacks = [f"no column {name}" for name in AUDIT_COLUMNS[:8] if name != "log_weight" and name not in rows]
    lacks += [] if len(rows) else ["no row"]
    kinds = {"step": "i", "gap": "f", "kept": "b"}
    lacks += [f"other values in {name}" for name in kinds if not lacks and rows[name].dtype.kind != kinds[name]]
    if lacks or not rows.pair_id.map(type).eq(str).all():
        what = lacks[0] if lacks else "other values in pair_id"
        raise UserError(f"{folder}/audit has {what}: it is not what PairAudit writes, so remove it.")
    if rows.duplicated(["step", "pair_id"]).any():
        raise UserError(f"{folder}/audit has a pair twice in one step, as copies of a file give: remove the copy.")
    return rows.assign(gap=rows.gap.where(np.isfinite(rows.gap)))  # an infinite gap ranks no pair


def inside(folder: Path) -> str:
    """Return ` Did you mean …?` with the newest run in the folder, or an empty text. UserError for no folder."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give the log folder of a run, which `fit` names at its end.")
    found = sorted(folder.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    return f" Did you mean {found[-1].parent}?" if found else ""
