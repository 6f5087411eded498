"""Gap mixtures: which pairs get a sample, the same in every run, and what happens where there is none."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from tiny_runs import Recorder, beta_dpo, controlled, preference, quiet_trainer, table_of
from tiny_tokenizers import byte_tokenizer, texts

from app.core.errors import UserError
from datamodules.batches import OptimizerBatchLoader, PreferenceBatch
from datamodules.controlled_task import preference_pairs
from datamodules.gap_mixture import GapMixedTable, GapMixture
from datamodules.preference_data import PreferenceData

PAIRS, BATCH = 200, 8


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs of which two follow each other with the same prompt."""
    rows = [
        {"prompt": f"q {n // 2}", "chosen": f" yes {n}", "rejected": f" no {n}", "score_rejected": n, "kind": "k"}
        for n in range(PAIRS)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return path


def write_samples(folder: Path, keep: int = PAIRS, **changes: object) -> str:
    """A sample for each of the first `keep` pairs, as `beta-dpo generate` writes it."""
    rows = [
        {"prompt_id": f"pairs.jsonl:{n + 1}", "prompt": f"q {n // 2}", "response": f" S{n}", "finished": True}
        for n in range(keep)
    ]
    rows[0] |= changes
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(pairs: Path, mixture: GapMixture) -> tuple[GapMixedTable, np.ndarray]:
    tokenizer = str(pairs.parent / "tokenizer")
    table, rows = table_of(PreferenceData(str(pairs), tokenizer=tokenizer, gap_mixture=mixture))
    assert isinstance(table, GapMixedTable)
    return table, rows


def epoch(
    table: GapMixedTable, rows: np.ndarray, rank: int = 0, world_size: int = 1, skip: int = 0
) -> list[PreferenceBatch]:
    loader = OptimizerBatchLoader(
        table,
        rows,
        batch_size=BATCH,
        micro_batch_tokens=4000,
        shuffle=True,
        seed=4,
        rank=rank,
        world_size=world_size,
        exchange=table.exchange,
    )
    if skip:
        before = OptimizerBatchLoader(
            table, rows, batch_size=BATCH, micro_batch_tokens=4000, shuffle=True, seed=4, exchange=table.exchange
        )
        list(islice(before, skip))
        loader.load_state_dict(before.state_dict())
    return list(loader)


def rejected_of(batch: PreferenceBatch) -> list[str]:
    tokenizer = byte_tokenizer()
    return [texts(pair, tokenizer)[2].removesuffix("</s>") for pair in batch.share]


def test_pairs_are_drawn_by_their_id_and_get_their_sample(pairs: Path) -> None:
    table, rows = opened(pairs, GapMixture(write_samples(pairs.parent), 0.3))
    batches = epoch(table, rows)
    replaced = {}
    for batch in batches:
        for place, (pair_id, text) in enumerate(zip(batch.pair_ids, rejected_of(batch), strict=True)):
            number = int(pair_id.partition(":")[2]) - 1
            replaced[pair_id] = batch.labels["replaced"][place] is True
            assert text == (f" S{number}" if replaced[pair_id] else f" no {number}")
            assert batch.labels["score_rejected"][place] == (None if replaced[pair_id] else number)
            assert batch.labels["kind"][place] == "k"
    assert len(replaced) == PAIRS
    assert sum(replaced.values()) == pytest.approx(0.3 * PAIRS, abs=3 * (0.21 * PAIRS) ** 0.5)
    assert f"{sum(replaced.values())} of {PAIRS} rejected responses replaced" in table.note
    # nested in a larger share, another with another seed, and the same whatever the order and the other pairs
    more, _ = opened(pairs, GapMixture(write_samples(pairs.parent), 0.5))
    drawn = {id for id, was in replaced.items() if was}
    assert drawn < {id for batch in epoch(more, rows) for id, was in labelled(batch).items() if was}
    half = rows[::2]
    part, _ = opened(pairs, GapMixture(write_samples(pairs.parent), 0.3))
    assert all(replaced[id] == was for batch in epoch(part, half) for id, was in labelled(batch).items())
    other, _ = opened(pairs, GapMixture(write_samples(pairs.parent), 0.3, seed=1))
    assert drawn != {id for batch in epoch(other, rows) for id, was in labelled(batch).items() if was}


def labelled(batch: PreferenceBatch) -> dict[str, object]:
    return dict(zip(batch.pair_ids, batch.labels["replaced"], strict=True))


def test_whole_batches_are_drawn_the_same_after_a_resume_and_on_any_rank(pairs: Path) -> None:
    table, rows = opened(pairs, GapMixture(write_samples(pairs.parent), 0.4, unit="batch"))
    kinds = [set(batch.labels["replaced"]) for batch in epoch(table, rows)]
    assert all(len(kind) == 1 for kind in kinds)
    share = sum(kind == {True} for kind in kinds) / len(kinds)
    assert 0 < share < 0.8
    assert [set(batch.labels["replaced"]) for batch in epoch(table, rows, skip=7)] == kinds[7:]
    for rank in range(2):
        assert [set(batch.labels["replaced"]) for batch in epoch(table, rows, rank, 2)] == kinds
        assert all(
            {text.startswith(" S") for text in rejected_of(batch)} <= set(batch.labels["replaced"])
            for batch in epoch(table, rows, rank, 2)
        )


def test_no_share_and_the_whole(pairs: Path) -> None:
    for unit in ("pair", "batch"):
        for share in (0.0, 1.0):
            mixture = GapMixture(write_samples(pairs.parent), share, unit=unit)
            told = Counter(was for batch in epoch(*opened(pairs, mixture)) for was in batch.labels["replaced"])
            assert told == {bool(share): PAIRS}


def test_missing_samples_stop_the_run_or_are_counted(pairs: Path) -> None:
    samples = write_samples(pairs.parent, keep=PAIRS - 4)
    with pytest.raises(
        UserError, match=r"4 pairs .*no usable sample in .*first: pairs\.jsonl:197.*on_missing: keep"
    ):
        opened(pairs, GapMixture(samples, 1.0))
    table, rows = opened(pairs, GapMixture(samples, 1.0, on_missing="keep"))
    assert "4 without a usable sample kept theirs" in table.note
    told = Counter(was for batch in epoch(table, rows) for was in batch.labels["replaced"])
    assert told == {True: PAIRS - 4, False: 4}
    report = table.samples.report.counts
    assert report["skipped: no sample for the prompt"] == 4


def test_a_sample_that_makes_no_pair_is_not_used(pairs: Path) -> None:
    for response, reason in ((" ", "the sample is empty"), ("yes 0", "the sample is the chosen response")):
        samples = write_samples(pairs.parent, response=response)
        table, _ = opened(pairs, GapMixture(samples, 1.0, on_missing="keep"))
        assert table.samples.report.counts[f"skipped: {reason}"] == 1


def test_a_sample_that_was_cut_off_has_no_end(pairs: Path) -> None:
    table, _ = opened(pairs, GapMixture(write_samples(pairs.parent, finished=False), 1.0))
    first, second = (texts(table[row], byte_tokenizer())[2] for row in (PAIRS, PAIRS + 1))
    assert not first.endswith("</s>")
    assert second.endswith("</s>")


def test_validation_pairs_keep_their_responses(pairs: Path) -> None:
    data = PreferenceData(
        str(pairs),
        tokenizer=str(pairs.parent / "tokenizer"),
        gap_mixture=GapMixture(write_samples(pairs.parent), 1.0),
        validation_share=0.1,
    )
    table, rows = table_of(data, "validation")
    assert not isinstance(table, GapMixedTable)
    train_table, train = table_of(data)
    assert isinstance(train_table, GapMixedTable)
    assert not set(table.keys("prompt", rows)) & set(train_table.keys("prompt", train_table.exchange(train, 1, 0)))
    assert '" S' in data.shown(train_table, int(train[0]))[-1]  # as it is trained
    assert '" no' in data.shown(table, int(rows[0]))[-1]


@pytest.mark.parametrize("unit", ["pair", "batch"])
def test_training_sees_the_samples_with_either_reference(
    unit: Literal["pair", "batch"], tiny_llama: str, tmp_path: Path
) -> None:
    samples = tmp_path / "samples.jsonl"
    rows = [
        {"prompt": pair.prompt, "response": " well the cat has .", "finished": True}
        for pair in preference_pairs(30, seed=9)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    audits = []
    for reference in ("frozen", "cached"):
        mixture = GapMixture(str(samples), 0.5, unit=unit)
        recorder = Recorder()
        trainer = quiet_trainer(tmp_path, [*beta_dpo(), recorder])
        trainer.fit(preference(tiny_llama, lr=0.05, reference=reference), controlled(30, gap_mixture=mixture))
        audits.append(recorder.decisions)
    seen = [was for decision in audits[0] for was in decision.labels["replaced"]]
    assert {False, True} == set(seen)
    for frozen, cached in zip(*audits, strict=True):
        assert frozen.labels == cached.labels
        assert frozen.gaps.tolist() == pytest.approx(cached.gaps.tolist(), abs=1e-4)


def test_wrong_settings_and_files_are_refused(pairs: Path) -> None:
    with pytest.raises(ValueError, match="GapMixture: share must"):
        GapMixture("s.jsonl", 1.5)
    with pytest.raises(ValueError, match="GapMixture: seed must"):
        GapMixture("s.jsonl", 0.5, seed=-1)
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        opened(pairs, GapMixture("nowhere.jsonl", 0.5))
    broken = pairs.parent / "broken.jsonl"
    broken.write_text('{"prompt": "q 0", "response": " S"}\n{"prompt": "q 0"}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:2 is not a sample"):
        opened(pairs, GapMixture(str(broken), 0.5))
    broken.write_text('{"prompt": "another", "response": " S"}\n')
    with pytest.raises(UserError, match="no usable sample for any training pair"):
        opened(pairs, GapMixture(str(broken), 0.5))
