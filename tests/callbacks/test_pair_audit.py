"""The audit holds enough to recompute every decision, and never mixes two runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import beta_dpo, controlled, decision_on, preference, quiet_trainer, table_of

from app.core.errors import UserError
from callbacks import PairAudit
from callbacks.pair_audit import AUDIT_COLUMNS, audit_rows, forget_steps_from

ALPHA, BETA0, KEEP, MOMENTUM = 0.6, 0.1, 0.6, 0.9


def train(folder: Path, model: str, audit: PairAudit, steps: int = 5, ckpt_path: str | None = None) -> None:
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [audit, *beta_dpo(KEEP, ALPHA), checkpoint]  # first in the list, and still what all agreed on
    trainer = quiet_trainer(folder, callbacks, max_steps=steps, max_epochs=9, enable_checkpointing=True)
    # five steps an epoch, the last one of three
    trainer.fit(preference(model), controlled(43), ckpt_path=ckpt_path)


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(set(pq.read_table(folder / "audit")["step"].to_pylist()))


def test_decisions_follow_from_the_gap_column_alone(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, PairAudit(), steps=7)
    table = pq.read_table(tmp_path / "audit").to_pandas()
    assert sorted(table["step"].unique()) == list(range(1, 8))
    mean = std = 0.0
    for step, rows in table.groupby("step"):
        gaps = rows["gap"].to_numpy()
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gaps.mean()
        std = MOMENTUM * std + (1 - MOMENTUM) * math.sqrt(((gaps - gaps.mean()) ** 2).mean())
        correction = 1 - MOMENTUM ** int(step)
        m0, sigma = mean / correction, std / correction
        kept = rows["kept"].to_numpy()
        assert kept.sum() == max(1, math.floor(len(gaps) * KEEP + 1e-9))
        beta = max(1e-3, BETA0 * (1 + ALPHA * (gaps[kept].mean() - m0)))
        np.testing.assert_allclose(rows["running_mean"], m0, atol=1e-9)
        np.testing.assert_allclose(rows["running_std"], sigma, atol=1e-9)
        np.testing.assert_allclose(rows["beta"], beta, atol=1e-9)
        weight = -((gaps - m0) ** 2) / (2 * sigma**2) if sigma > 1e-6 else np.zeros_like(gaps)
        np.testing.assert_allclose(rows["log_weight"], weight, atol=1e-6)
    assert table["beta"].nunique() > 4
    assert table["gap"].abs().max() > 0.1


def test_columns_and_labels(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, PairAudit())
    table = pq.read_table(tmp_path / "audit")
    decided = list(AUDIT_COLUMNS)
    assert table.column_names[: len(decided)] == decided
    stored, rows = table_of(controlled(43))
    labels = stored.labels(rows)
    assert set(table.column_names[len(decided) :]) == set(labels) >= {"flipped", "kind"}
    by_id = dict(zip(stored.pair_ids(rows), labels["flipped"], strict=True))
    assert dict(zip(table["pair_id"].to_pylist(), table["flipped"].to_pylist(), strict=True)) == by_id
    assert len(by_id) == table.num_rows == 43


def test_files_hold_the_steps_they_are_named_for(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, PairAudit(every_n_steps=3))
    # every three steps, and with every checkpoint
    names = sorted(path.name for path in (tmp_path / "audit").iterdir())
    assert names == [f"steps-{a:08d}-{b:08d}.parquet" for a, b in [(1, 2), (3, 4), (5, 5)]]
    assert steps_on_disk(tmp_path) == list(range(1, 6))


def test_another_run_is_not_written_over(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, PairAudit())
    before = {path: path.read_bytes() for path in (tmp_path / "audit").iterdir()}
    with pytest.raises(UserError, match="already holds the audit of another run: choose another log folder"):
        train(tmp_path, tiny_llama, PairAudit())
    assert {path: path.read_bytes() for path in (tmp_path / "audit").iterdir()} == before


def test_a_resumed_run_takes_its_steps_once(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, PairAudit(), steps=5)
    whole = pq.read_table(tmp_path / "audit").sort_by("step")
    # after step 2: steps 3 to 5 are taken again, and step 6 is new
    train(tmp_path, tiny_llama, PairAudit(), steps=6, ckpt_path=str(tmp_path / "step=2.ckpt"))
    again = pq.read_table(tmp_path / "audit").sort_by("step")
    assert steps_on_disk(tmp_path) == list(range(1, 7))
    assert again.slice(0, whole.num_rows).equals(whole)


def test_forgetting_keeps_earlier_rows_and_removes_empty_files(tmp_path: Path) -> None:
    file = tmp_path / "steps.parquet"
    pq.write_table(pa.table({"step": [3, 3, 4, 5], "gap": [0.0, 1.0, 2.0, 3.0]}), file)
    forget_steps_from(file, 6)
    assert pq.read_table(file).num_rows == 4
    forget_steps_from(file, 4)
    assert pq.read_table(file)["gap"].to_pylist() == [0.0, 1.0]
    forget_steps_from(file, 3)
    assert not file.exists()
    assert list(tmp_path.iterdir()) == []


def test_labels_that_some_steps_lack_or_type_otherwise(tmp_path: Path) -> None:
    audit = PairAudit()
    audit._folder = tmp_path
    grades: list[list[float | None]] = [[None, None], [1, 2], [0.5, None]]
    for step, values in enumerate(grades):
        decision = decision_on([0.0, 0.0], step, labels={"grade": values})
        audit._tables.append(audit_rows(decision))
    audit.flush()
    assert pq.read_table(tmp_path)["grade"].to_pylist() == [None, None, 1, 2, 0.5, None]


def test_every_n_steps_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be a whole number from 1"):
        PairAudit(every_n_steps=0)


def test_a_label_never_hides_behind_a_column_of_the_audit() -> None:
    names = (*AUDIT_COLUMNS, "label_kept", "kind")
    decision = decision_on([1.0, 2.0], labels={name: [7, 8] for name in names})
    table = audit_rows(decision)
    assert table["kept"].to_pylist() == [True, True]
    labels = {name: table[name].to_pylist() for name in table.column_names[len(AUDIT_COLUMNS) :]}
    assert list(labels) == [*(f"label_{name}" for name in AUDIT_COLUMNS), "label_label_kept", "kind"]
    assert all(values == [7, 8] for values in labels.values())
