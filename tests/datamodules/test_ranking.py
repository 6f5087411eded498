"""Selection and order by a column or by the scores of `predict`: which pairs, which order, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import Recorder, beta_dpo, controlled, preference, quiet_trainer, table_of
from tiny_tokenizers import byte_tokenizer

from app.core.errors import UserError
from callbacks import ScoreWriter
from datamodules.gap_mixture import GapMixture
from datamodules.preference_data import PreferenceData
from datamodules.ranking import Ranking, Selection

SCORES = [3.0, -1.0, 2, 2, 5.5, 1, 0.0, 2.0]  # by place in the file; ties keep its order
SMALLEST_FIRST = [1, 6, 5, 2, 3, 7, 0, 4]
ID = "pairs.jsonl:{}".format


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))


def data(folder: Path, scores: Sequence[object] = SCORES, **settings: Any) -> PreferenceData:
    rows = [{"prompt": f"q {n}", "chosen": " y", "rejected": " no", "own": s} for n, s in enumerate(scores)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return PreferenceData(str(folder / "pairs.jsonl"), tokenizer=str(folder / "tokenizer"), **settings)


def served(folder: Path, scores: Sequence[object] = SCORES, **settings: Any) -> tuple[list[int], list[str]]:
    """The places of the training pairs, in the order of the rows, and the lines for the log."""
    opened = data(folder, scores, **settings)
    table, rows = table_of(opened)
    return [int(id.partition(":")[2]) - 1 for id in table.pair_ids(rows)], opened.notes["train"]


def test_the_first_share_is_kept_and_ties_keep_the_order_of_the_data(tmp_path: Path) -> None:
    kept, (note,) = served(tmp_path, select=Selection("own", share=0.5, first="smallest"))
    assert kept == sorted(SMALLEST_FIRST[:4])
    assert note == "select: 4 of 8 pairs by smallest own (-1 to 2); 4 left out"
    kept, _ = served(tmp_path, select=Selection("own", share=0.01))
    assert kept == [4]  # at least one
    kept, notes = served(tmp_path, select=Selection("own", share=0.7), order=Ranking("own", first="smallest"))
    assert kept == [2, 3, 7, 0, 4]
    assert notes[1] == "order: 5 of 5 pairs by smallest own (2 to 5.5), first to last, in every epoch"
    assert served(tmp_path, order=Ranking("own", minus="own"))[0] == list(range(8))
    kept, _ = served(tmp_path, select=Selection("random", share=0.5))
    fewer, _ = served(tmp_path, select=Selection("random", share=0.25))
    assert set(fewer) < set(kept)
    assert len(kept) == 4
    assert kept != [0, 1, 2, 3]
    _, everything = table_of(data(tmp_path, select=Selection("own")), "predict")
    assert len(everything) == 8  # `predict` scores every pair


def test_scores_of_a_file_are_joined_by_pair_id(tmp_path: Path) -> None:
    file = str(tmp_path / "scores.parquet")
    shuffled = [7, 2, 4, 0, 1, 6, 5, 3]
    table = pa.table(
        {"pair_id": [ID(n + 1) for n in shuffled] + ["held out"], "gap": [*map(float, shuffled), 99.0]}
    )
    pq.write_table(table, file)
    assert served(tmp_path, order=Ranking("gap", scores=file))[0] == [7, 6, 5, 4, 3, 2, 1, 0]
    kept, (note,) = served(tmp_path, select=Selection("gap", scores=file, share=0.25))
    assert kept == [6, 7]
    assert f"by largest gap of {file} (7 to 6); 6 left out" in note

    def refused(scores: pa.Table, said: str, by: str = "gap") -> None:
        pq.write_table(scores, file)
        with pytest.raises(UserError, match=said):
            served(tmp_path, select=Selection(by, scores=file))

    refused(table.slice(2), r"lacks 2 of 8 training pairs \(first: pairs\.jsonl:3\): run `beta-dpo predict`")
    refused(pa.concat_tables([table, table]), "names a pair twice")
    refused(table, r"has no column 'gpa'; it has pair_id, gap", by="gpa")
    nan = table.set_column(1, "gap", pa.array([float("nan"), None, *[1.0] * 7]))
    refused(
        nan, r"2 of 8 training pairs have no finite number in the column 'gap' \(first: pairs\.jsonl:3 with None"
    )
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        UserError, match=r"data\.order\.scores: .*scores\.parquet cannot be read .*`beta-dpo predict`"
    ):
        served(tmp_path, order=Ranking("gap", scores=file))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"1 of 8 .*'own' \(first: pairs\.jsonl:2 with None\): complete the column, or take"),
        ("high", r"8 of 8 .*first: pairs\.jsonl:1 with '3\.0'"),  # a column of mixed types is text
        (float("inf"), r"1 of 8 .*with inf"),
    ],
)
def test_a_pair_without_a_number_is_refused(value: object, said: str, tmp_path: Path) -> None:
    scores: list[object] = [float(score) for score in SCORES]
    scores[1] = value
    with pytest.raises(UserError, match=said):
        served(tmp_path, scores, select=Selection("own"))


def test_a_column_that_the_data_lacks_and_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.order: the data has no column 'other'; it has these: own\. Name"):
        served(tmp_path, order=Ranking("other"))
    with pytest.raises(ValueError, match="Selection: share must"):
        Selection("own", share=0.0)


def test_an_order_survives_a_resume_and_is_the_same_on_all_ranks(tiny_llama: str, tmp_path: Path) -> None:
    """Three steps and the rest after a resume, against all at once; the selection is by scores of `predict`."""
    scores = str(tmp_path / "scores.parquet")
    trainer = quiet_trainer(tmp_path, [ScoreWriter(scores)])
    trainer.predict(preference(tiny_llama), controlled(33, batch_size=6), return_predictions=False)
    settings: dict[str, Any] = {
        "batch_size": 6,
        "select": Selection("policy_chosen_logp", minus="policy_rejected_logp", scores=scores, share=0.7),
        "order": Ranking("chosen_reward", minus="rejected_reward", first="smallest"),
    }

    def fit(folder: Path, steps: int, **more: Any) -> list[list[str]]:
        recorder = Recorder()
        saved = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"max_steps": steps, "max_epochs": 2, "enable_checkpointing": True}
        trainer = quiet_trainer(folder, [*beta_dpo(), recorder, saved], **options)
        trainer.fit(preference(tiny_llama, lr=0.05), controlled(33, **settings), **more)
        return [list(decision.pair_ids) for decision in recorder.decisions]

    whole = fit(tmp_path / "whole", 8)
    assert [len(ids) for ids in whole] == [6, 6, 6, 5, 6, 6, 6, 5]
    assert whole[:4] == whole[4:]
    assert len({id for ids in whole for id in ids}) == 23
    margins = [table_labels(settings)[id] for ids in whole[:4] for id in ids]
    assert margins == sorted(margins)
    before = fit(tmp_path / "parts", 3)
    assert before + fit(tmp_path / "parts", 8, ckpt_path=str(tmp_path / "parts/step=3.ckpt")) == whole
    # what a rank is given are shares of the same batches
    module = controlled(33, **settings)
    table, rows = table_of(module)
    for rank in range(2):
        place = {"rank": rank, "num_replicas": 2}
        fields = {"distributed_sampler_kwargs": place, "lightning_module": None, "limit_train_batches": 1.0}
        module.trainer = type("Two", (), fields)()
        module._tables = {"train": (table, rows)}
        assert [list(batch.pair_ids) for batch in islice(module.train_dataloader(), 4)] == whole[:4]


def table_labels(settings: dict[str, Any]) -> dict[str, float]:
    table, rows = table_of(controlled(33, **settings))
    labels = table.labels(rows)
    margins = np.array(labels["chosen_reward"]) - np.array(labels["rejected_reward"])
    return dict(zip(table.pair_ids(rows), margins.tolist(), strict=True))


def test_a_gap_mixture_replaces_the_selected_pairs_in_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "response": f" S{n}", "finished": True} for n in range(8)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = GapMixture(str(tmp_path / "samples.jsonl"), 1.0)
    first: dict[str, Any] = {"gap_mixture": mixture, "select": Selection("own", share=0.5)}
    assert served(tmp_path, **first, order=Ranking("own"))[0] == [4, 0, 2, 3]
    hashes = set()
    for order in (Ranking("own"), Ranking("own", first="smallest"), None):
        opened = data(tmp_path, **first, order=order)
        opened._tables["train"] = table_of(opened)
        hashes.add(opened.content("train"))
    assert len(hashes) == 3  # so that a resume with another order is refused
