"""The parquet file of `beta-dpo predict`, with the scores of all pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import gather_object

from app.core.errors import UserError
from app.core.files import atomic_file, refuse_place
from app.core.intervals import wilson

LOGPS = ("policy_chosen_logp", "policy_rejected_logp", "reference_chosen_logp", "reference_rejected_logp")
SCHEMA = pa.schema(
    {"pair_id": pa.string()}
    | dict.fromkeys((*LOGPS, "gap"), pa.float64())
    | dict.fromkeys(("chosen_tokens", "rejected_tokens"), pa.int64())
)


class ScoreWriter(Callback):
    """A callback that writes the results of `predict_step` from all ranks to one file, visible only when complete.

    Args:
        path: the file, relative to the current folder.
        by: a label of the data, such as `subset` of RewardBench: it becomes a column, and the accuracy of the
            implicit reward (gap > 0; a tie is half right) is printed for each of its values.
    """

    def __init__(self, path: str = "scores.parquet", by: str | None = None):
        if not path.endswith(".parquet"):
            raise UserError(f"scores.path must end in .parquet, not {path!r}.")
        if by in SCHEMA.names:
            raise UserError(f"scores.by: {by} is a column of the scores; rename that label of the data.")
        self.path = Path(path)
        self.by = by
        self._tables: list[pa.Table] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        read = map(str, getattr(trainer.datamodule, "files", []))  # type: ignore[attr-defined]
        self._replaced = refuse_place("scores.path", str(self.path), (".parquet",), *read)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        table = pa.table(outputs, schema=SCHEMA)
        if self.by is not None:
            if self.by not in batch.labels:
                known = ", ".join(batch.labels) or "none"
                raise UserError(f"scores.by: the data has no label {self.by!r}; it has {known}.")
            values = [batch.labels[self.by][place] for place in batch.positions.tolist()]
            table = table.append_column(self.by, pa.array(map(str, values), pa.string()))
        self._tables.append(table)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = self._joined(self._tables)
        self._tables, of_ranks = [], [own] * trainer.world_size
        if trainer.world_size > 1:
            gather_object(own, of_ranks if trainer.is_global_zero else None)
        if trainer.is_global_zero:
            sampling = trainer.distributed_sampler_kwargs
            alike = 1 if sampling is None else trainer.world_size // sampling["num_replicas"]
            with atomic_file(self.path) as temporary:  # ranks of one tensor-parallel group have the same pairs
                pq.write_table(self._joined(of_ranks[::alike]), temporary)
            scored, loader = pq.read_metadata(self.path).num_rows, cast(Any, trainer.predict_dataloaders)
            total = len(loader.indices) if hasattr(loader, "indices") else scored
            of_all = f" of {total} (trainer.limit_predict_batches)" if scored < total else ""
            print(f"scores of {scored}{of_all} pairs: {self.path}{self._replaced}")
            if self.by is not None:
                print("\n".join(accuracies(pq.read_table(self.path), self.by)))

    def _joined(self, tables: list[pa.Table]) -> pa.Table:
        schema = SCHEMA if self.by is None else SCHEMA.append(pa.field(self.by, pa.string()))
        return pa.concat_tables([schema.empty_table(), *tables])


def accuracies(scores: pa.Table, by: str) -> list[str]:
    """Return the lines of a table: accuracy [95 % Wilson interval] for each value of `by`, and over all."""
    every = scores.to_pandas()
    finite = every[np.isfinite(every.gap)]
    right = (1 + np.sign(finite.gap)) / 2
    groups = right.groupby(finite[by])
    width = max(map(len, [by, "all pairs", *groups.groups]))
    lines = [f"{by:{width}}  pairs  accuracy [95 % interval]"]
    for name, one in [*groups, ("all pairs", right)]:
        if len(one):
            lines.append(f"{name:{width}}  {len(one):5}  {wilson(float(one.mean()), len(one))}")
    lines.append(f"mean over the values of {by}: {groups.mean().mean():.3f}")
    lost = len(every) - len(finite)
    return lines + ([f"{lost} pairs without a finite gap are in no share"] if lost else [])
