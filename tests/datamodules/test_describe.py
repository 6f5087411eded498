"""What is said of pairs before training: repeats, contradictions, shared prompts, cuts, how many are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from tiny_runs import table_of
from tiny_tokenizers import byte_tokenizer

from datamodules.describe import against_scores, cut_responses, describe, pairs_seen, repeats, shared_prompts
from datamodules.preference_data import PreferenceData
from datamodules.table import PairTable


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))


def opened(folder: Path, *texts: str, sources: int = 1) -> tuple[PairTable, np.ndarray]:
    """Return the table of pairs written as "prompt chosen rejected", dealt out to files."""
    paths = [folder / f"{number}.jsonl" for number in range(sources)]
    for number, path in enumerate(paths):
        rows = [
            dict(zip(("prompt", "chosen", "rejected"), text.split(), strict=True))
            for text in texts[number::sources]
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(
        str(paths[0]) if sources == 1 else [str(path) for path in paths], max_length=20, max_prompt_length=8
    )
    data.tokenizer = byte_tokenizer()
    return table_of(data)


@pytest.mark.parametrize("sources", [1, 2])
def test_repeats_and_contradictions_are_counted_within_and_across_files(tmp_path: Path, sources: int) -> None:
    texts = ("p a b", "p a b", "q a b", "p b a", "r a c", "r a c")
    table, rows = opened(tmp_path, *texts, sources=sources)
    twice, contradicted, spaced = repeats(table, rows)
    assert not spaced
    assert twice.startswith("2 pairs repeat an earlier one")
    assert contradicted.startswith("3 pairs contradict another one")
    assert len(rows) == 6  # nothing is taken out
    assert repeats(*opened(tmp_path, "p a b", "p a b"))[0] == "1 pair repeats an earlier one (first: 0.jsonl:2)"
    assert repeats(*opened(tmp_path, "p a b", "q b a", "p a c")) == ("", "", "")


def test_scores_against_the_label_are_counted(tmp_path: Path) -> None:
    scores = [(1, 2), (2, 1), (1, 1), (None, 3), (0.5, 4)]
    rows = [
        {"prompt": f"p{high}", "chosen": "a", "rejected": "b", "score_chosen": high, "score_rejected": low}
        for high, low in scores
    ]
    (tmp_path / "0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(str(tmp_path / "0.jsonl"))
    data.tokenizer = byte_tokenizer()
    said = against_scores(*table_of(data))
    assert said == "2 pairs have a score_chosen below the score_rejected (first: 0.jsonl:1, 0.jsonl:5); all stay"
    assert not against_scores(*opened(tmp_path, "p a b"))


def test_a_column_without_a_value_is_no_label(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "mark": None}
    rows = [pair | {"votes": [1], "note": None}, pair | {"votes": None, "note": "x"}]
    (tmp_path / "0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(str(tmp_path / "0.jsonl"))
    data.tokenizer = byte_tokenizer()
    table, found = table_of(data)
    assert table.labels(found) == {"note": [None, "x"]}
    assert "1 with no use for votes" in describe(table, found)[0]


def test_answers_that_differ_in_outer_spaces_alone_are_told(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a\n"}))
    data = PreferenceData(str(tmp_path / "0.jsonl"))
    data.tokenizer = byte_tokenizer()
    found = data.open_table("train")
    assert found is not None
    *others, spaced = repeats(*found)
    assert others == ["", ""]  # they do not contradict themselves
    assert spaced.startswith("1 pair has responses that differ in outer spaces alone (first: 0.jsonl:1)")


def test_validation_prompts_that_are_trained_on_are_named(tmp_path: Path) -> None:
    trained = opened(tmp_path, "p a b", "q a b")
    held_out = opened(tmp_path, "x a b", "p c d", "q e f")
    assert shared_prompts(trained, held_out).startswith(
        "2 of 3 pairs have a prompt that is trained on (first: 0.jsonl:2"
    )
    assert not shared_prompts(trained, opened(tmp_path, "x a b"))
    # one as it is trained on, two but for case and punctuation, one another
    near = shared_prompts(trained, opened(tmp_path, "p c d", "P! c d", "«q» e f", "pq e f"))
    for words in ("1 of 4 pairs have a prompt that is trained on", "2 of 4 pairs have a prompt like one that is"):
        assert words in near


def test_cut_responses_are_told_of_above_five_percent(tmp_path: Path) -> None:
    short = [f"p{number} a b" for number in range(19)]
    table, _ = opened(tmp_path, *short, f"q {'x' * 30} {'y' * 30}")  # 2 of 40 responses
    assert not cut_responses(table, 20)
    table, _ = opened(tmp_path, *short[1:], f"q {'x' * 30} {'y' * 30}")  # 2 of 38
    assert cut_responses(table, 20).startswith("5% of the responses are cut to data.max_length 20")


@pytest.mark.parametrize(
    ("limits", "said", "all_of_them"),
    [
        ({"max_steps": 40}, "320 of 20000 pairs will be seen (40 steps of 8;", False),
        ({"max_epochs": 1}, "each of 20000 pairs will be seen once (2500 steps of 8;", True),
        (
            {"max_epochs": 2, "max_steps": 3750},
            "each of 20000 pairs will be seen 1.5 times on average (3750 steps of 8;",
            True,
        ),
        (
            {"max_epochs": 1, "limit_train_batches": 10},
            "80 of 20000 pairs will be seen (10 steps of 8; trainer.limit",
            False,
        ),
        (
            {"max_epochs": 1, "limit_train_batches": 0.5},
            "10000 of 20000 pairs will be seen (1250 steps of 8;",
            False,
        ),
        ({"max_epochs": 2}, "each of 20000 pairs will be seen twice (5000 steps of 8;", True),
        (
            {"max_epochs": 2, "limit_train_batches": 0.5},
            "each of 20000 pairs will be seen once (2500 steps of 8;",
            True,
        ),
        ({"max_epochs": -1}, "20000 of 20000 pairs will be seen (no limit of steps;", True),
    ],
)
def test_how_many_pairs_will_be_seen(limits: dict[str, Any], said: str, all_of_them: bool) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **limits)
    told, every = pairs_seen(20_000, 8, trainer)
    assert told.startswith(said)
    assert every == all_of_them


def test_a_batch_size_above_the_number_of_pairs_is_named() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    told, as_asked = pairs_seen(19, 64, trainer)
    assert told.startswith("each of 19 pairs will be seen once (1 steps of 19; data.batch_size 64 is more")
    assert not as_asked
