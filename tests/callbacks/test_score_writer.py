"""`predict` writes the scores of all pairs, equal to those of plain rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_runs import controlled, plain_logps, preference, quiet_trainer, save_tiny_model, table_of
from transformers import AutoModelForCausalLM

from app.core.errors import UserError
from app.core.intervals import wilson
from app.method.losses import SimPOLoss
from callbacks import ScoreWriter
from datamodules import PreferenceData

COLUMNS = [
    "pair_id",
    "policy_chosen_logp",
    "policy_rejected_logp",
    "reference_chosen_logp",
    "reference_rejected_logp",
    "gap",
    "chosen_tokens",
    "rejected_tokens",
]


def test_scores_equal_a_direct_computation(tiny_llama: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.parquet"
    module, data = preference(tiny_llama), controlled(13, batch_size=5, micro_batch_tokens=150)
    trainer = quiet_trainer(tmp_path, [ScoreWriter(str(out))], max_steps=2)
    trainer.fit(module, data)  # so that policy and reference differ
    trainer.predict(module, data, return_predictions=False)
    scores = pq.read_table(out)
    assert scores.column_names == COLUMNS
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]

    table, rows = table_of(data, "predict")
    assert scores["pair_id"].to_pylist() == table.pair_ids(rows)
    module.policy.use_attention(module.policy.own_attention)  # plain rows, not the packed ones of training
    policy, reference = module.policy.model.eval(), AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for row, score in zip(rows, scores.to_pylist(), strict=True):
        pair = table[int(row)]
        assert pair.rejected is not None
        assert (score["chosen_tokens"], score["rejected_tokens"]) == (len(pair.chosen), len(pair.rejected))
        expected = {}
        with torch.no_grad():
            for name, model in (("policy", policy), ("reference", reference)):
                for side in ("chosen", "rejected"):
                    expected[f"{name}_{side}_logp"] = float(
                        plain_logps(model, pair.prompt, getattr(pair, side)).sum()
                    )
        for name, value in expected.items():
            assert score[name] == pytest.approx(value, abs=1e-3), name
        gap = score["policy_chosen_logp"] - score["policy_rejected_logp"]
        gap -= score["reference_chosen_logp"] - score["reference_rejected_logp"]
        assert score["gap"] == pytest.approx(gap, abs=1e-9)
    assert max(abs(gap) for gap in scores["gap"].to_pylist()) > 0.01


def test_what_was_left_out_is_said(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("lightning_modules.preference.rank_zero_info", told.append)
    out = tmp_path / "scores.parquet"
    limited = "scores of 4 of 10 (trainer.limit_predict_batches) pairs"
    for limit, said in ((1, limited), (1.0, "scores of 10 pairs")):
        trainer = quiet_trainer(tmp_path, [ScoreWriter(str(out))], limit_predict_batches=limit)
        module = preference(tiny_llama, loss=SimPOLoss(), reference="cached")
        trainer.predict(module, controlled(10, batch_size=4), return_predictions=False)
        assert said in capsys.readouterr().out
    assert "model.reference: cached has no effect with SimPOLoss" in told[0]


def test_without_a_reference_its_columns_are_null(tmp_path: Path) -> None:
    name = save_tiny_model("llama", tmp_path / "m")
    out = tmp_path / "scores.parquet"
    trainer = quiet_trainer(tmp_path, [ScoreWriter(str(out))])
    trainer.predict(preference(name, loss=SimPOLoss()), controlled(3), return_predictions=False)
    scores = pq.read_table(out)
    assert scores.column_names == COLUMNS
    assert scores["reference_chosen_logp"].null_count == scores["reference_rejected_logp"].null_count == 3
    for score in scores.to_pylist():
        normalised = score["policy_chosen_logp"] / score["chosen_tokens"]
        normalised -= score["policy_rejected_logp"] / score["rejected_tokens"]
        assert score["gap"] == pytest.approx(normalised, abs=1e-9)


def test_the_path_must_be_parquet() -> None:
    with pytest.raises(UserError, match=r"scores\.path must end in \.parquet"):
        ScoreWriter("scores.csv")


def test_accuracy_by_a_label(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.parquet"
    trainer = quiet_trainer(tmp_path, [ScoreWriter(str(out), by="flipped")])
    trainer.predict(preference(tiny_llama, loss=SimPOLoss()), controlled(12), return_predictions=False)
    scores = pq.read_table(out).to_pandas()
    told = capsys.readouterr().out
    shares = []
    for name, rows in scores.groupby("flipped"):
        shares.append((rows.gap > 0).mean())
        wanted = [name, str(len(rows)), *str(wilson(shares[-1], len(rows))).split()]
        assert wanted in [line.split() for line in told.splitlines()]
    assert f"mean over the values of flipped: {sum(shares) / len(shares):.3f}" in told
    assert str(wilson((scores.gap > 0).mean(), 12)) in told
    trainer = quiet_trainer(tmp_path, [ScoreWriter(str(out), by="subset")])
    with pytest.raises(UserError, match=r"scores\.by: the data has no label 'subset'; it has "):
        trainer.predict(preference(tiny_llama), controlled(3), return_predictions=False)
    with pytest.raises(UserError, match="gap is a column of the scores"):
        ScoreWriter(by="gap")


def test_the_pairs_are_not_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "pairs.parquet")
    pq.write_table(pa.table({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}), path)
    data = PreferenceData(path)
    with pytest.raises(UserError, match=r"scores\.path: .*pairs\.parquet is read by this command"):
        ScoreWriter(path).on_predict_start(SimpleNamespace(datamodule=data), None)  # type: ignore[arg-type]
    ScoreWriter(str(tmp_path / "scores.parquet")).on_predict_start(
        SimpleNamespace(datamodule=data),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
