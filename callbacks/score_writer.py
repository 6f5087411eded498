"""The parquet file of `beta-dpo predict`, with the scores of all pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer

from app.core.errors import UserError
from app.core.files import atomic_file

LOGP_COLUMNS = (
    "policy_chosen_logp",
    "policy_rejected_logp",
    "reference_chosen_logp",
    "reference_rejected_logp",
    "gap",
)
SCHEMA = pa.schema(
    [("pair_id", pa.string())]
    + [(name, pa.float64()) for name in LOGP_COLUMNS]
    + [("chosen_tokens", pa.int64()), ("rejected_tokens", pa.int64())]
)


class ScoreWriter(Callback):
    """A callback that writes the results of `predict_step` from all ranks to one file, visible only when complete.

    Args:
        path: the file, relative to the current folder.
    """

    def __init__(self, path: str = "scores.parquet"):
        if not path.endswith(".parquet"):
            raise UserError(f"scores.path must end in .parquet, not {path!r}.")
        self.path = Path(path)
        self._tables: list[pa.Table] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:
        self._tables.append(pa.table(outputs, schema=SCHEMA))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".rank{trainer.global_rank}.part")
        pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *self._tables]), part)
        self._tables = []
        trainer.strategy.barrier("scores")
        if trainer.is_global_zero:
            parts = [self.path.with_suffix(f".rank{rank}.part") for rank in range(trainer.world_size)]
            sampling = trainer.distributed_sampler_kwargs
            alike = 1 if sampling is None else trainer.world_size // sampling["num_replicas"]
            with atomic_file(self.path) as temporary:  # ranks of one tensor-parallel group have the same pairs
                pq.write_table(pa.concat_tables([pq.read_table(one) for one in parts[::alike]]), temporary)
            for one in parts:
                one.unlink()
            print(f"scores of {pq.read_metadata(self.path).num_rows} pairs: {self.path}")
