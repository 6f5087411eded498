"""Several sources by weight: the shares, ids and labels of their pairs, and prompts held out of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import table_of
from tiny_tokenizers import TEMPLATE, byte_tokenizer

from app.core.errors import UserError
from datamodules.preference_data import PreferenceData, drawn_rows
from datamodules.records import Message
from datamodules.sources.messages import prompt_key
from datamodules.sources.source import Source

Paths = list[str | Source]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(count: int, name: str, **columns: object) -> list[dict[str, object]]:
    return [
        {"prompt": f"{name} {n}", "chosen": f" yes {n}", "rejected": f" no {n}", **columns} for n in range(count)
    ]


def data(folder: Path, path: str | Paths, template: bool = False, validation_share: float = 0.0) -> PreferenceData:
    byte_tokenizer(template=TEMPLATE if template else None).save_pretrained(folder / "tokenizer")
    return PreferenceData(
        path, tokenizer=str(folder / "tokenizer"), chat_template=template, validation_share=validation_share
    )


def test_sources_give_their_shares_under_ids_of_their_own(tmp_path: Path) -> None:
    first = write(tmp_path / "a/train.jsonl", rows(30, "a", votes=3, source="reddit"))
    second = write(tmp_path / "b/train.jsonl", rows(30, "b", votes="many"))
    mixed: Paths = [Source(first, 3.0, "one"), Source(second, 1.0, "two")]
    table, chosen = table_of(data(tmp_path, mixed))
    labels = table.labels(chosen)
    assert (labels["source"].count("one"), labels["source"].count("two")) == (30, 10)
    assert labels["source_in_data"] == ["reddit"] * 30 + [None] * 10
    assert labels["votes"] == ["3"] * 30 + ["many"] * 10  # one column cannot hold both types
    ids = table.pair_ids(chosen)
    assert ids[:2] == ["one/train.jsonl:1", "one/train.jsonl:2"]
    assert len(set(ids)) == 40
    assert ids == [id for id in table.columns.column("pair_id").to_pylist() if id in ids]
    again, drawn = table_of(data(tmp_path, mixed[::-1]))
    assert set(again.pair_ids(drawn)) == set(ids)  # the draw does not depend on the order of the list
    more, drawn = table_of(data(tmp_path, [mixed[0], Source(second, 2.0, "two")]))
    assert set(more.pair_ids(drawn)) > set(ids)
    _, whole = table_of(data(tmp_path, [Source(first, name="one"), Source(second, name="two")]))
    assert len(whole) == 60
    assert len(table_of(data(tmp_path, mixed), "predict")[1]) == 60


def test_pairs_come_from_their_tables(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", rows(count, name)) for name, count in (("a", 3), ("b", 4))]
    table, _ = table_of(data(tmp_path, [Source(path) for path in paths]))
    alone = [table_of(data(tmp_path, path))[0] for path in paths]
    assert table.part_of([0, 2, 3, 6]).tolist() == [0, 0, 1, 1]
    for index in (0, 2, 3, 6):
        own, row = (alone[0], index) if index < 3 else (alone[1], index - 3)
        for found, wanted in zip(table[index], own[row], strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert table.pair_ids([6, 0]) == ["b.jsonl/b.jsonl:4", "a.jsonl/a.jsonl:1"]
    with pytest.raises(IndexError):
        table[7]


def test_a_prompt_is_held_out_of_all_sources_in_any_form(tmp_path: Path) -> None:
    forms: list[list[dict[str, object]]] = [[], [], []]
    for n in range(20):
        talk = (("user", "q"), ("assistant", "a"), ("user", f"r {n}"))
        messages = [{"role": role, "content": content} for role, content in talk]
        forms[0].append({"prompt": messages, "chosen": "x", "rejected": "y"})
        turns = f"\n\nHuman: q\n\nAssistant: a\n\nHuman: r {n}\n\nAssistant:"
        forms[1].append({"chosen": f"{turns} u", "rejected": f"{turns} v"})
        forms[2].append({"prompt": f"r {n}", "chosen": "x", "rejected": "y"})
    paths = [write(tmp_path / f"{n}.jsonl", form) for n, form in enumerate(forms)]
    source = data(tmp_path, [Source(path) for path in paths], template=True, validation_share=0.2)
    table, train = table_of(source)
    _, held_out = table_of(source, "validation")
    assert not set(table.keys("prompt", train)) & set(table.keys("prompt", held_out))
    assert sorted([*train, *held_out]) == list(range(60))
    assert (table.keys("prompt")[:20] == table.keys("prompt")[20:40]).all()
    names = table.labels(held_out)["source"]
    assert names.count("0.jsonl") == names.count("1.jsonl") > 0


def test_one_question_has_one_key() -> None:
    turn = Message("user", "Why?")
    assert prompt_key("Why?") == prompt_key("\n\nHuman: Why?\n\nAssistant:") == prompt_key((turn,))
    longer = (turn, Message("assistant", "So."), turn)
    told = (Message("system", "Be brief."), turn)
    assert len({prompt_key("Why?"), prompt_key("Why"), prompt_key(longer), prompt_key(told)}) == 4


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
)
def test_the_mixture_is_the_largest_with_these_shares(counts: list[int], weights: list[float]) -> None:
    weights = weights[: len(counts)]
    part = np.repeat(np.arange(len(counts)), counts)
    names = [f"s{n}" for n in range(len(counts))]
    total = min(count * sum(weights) / weight for count, weight in zip(counts, weights, strict=True))
    if min(weights) / sum(weights) * total < 0.5001:
        return  # a source would give no pair
    found = drawn_rows(part, np.arange(len(part)), weights, names)
    given_by = np.bincount(part[found], minlength=len(counts))
    assert len(set(found.tolist())) == len(found)
    assert (given_by == np.array(counts)).any()
    assert np.abs(given_by - np.array(weights) / sum(weights) * total).max() <= 0.5 + 1e-6


def test_what_makes_no_mixture_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(2, "a"))
    other = write(tmp_path / "b/a.jsonl", rows(500, "b"))
    refused: list[tuple[Paths, str]] = [
        ([], "an empty list"),
        ([Source(path), Source(other)], "two sources called 'a.jsonl'"),
        ([Source(path, 1.0), Source(other, name="b")], "every source a weight"),
        ([Source(path, format="hh", min_score_ratio=2.0)], "belongs to data.format shp"),
    ]
    for sources, said in refused:
        with pytest.raises(UserError, match=said):
            PreferenceData(sources)
    with pytest.raises(UserError, match=r"data\.format is 'hh'.*set data\.format: \"auto\""):
        PreferenceData([Source(path)], format="hh")
    few = data(tmp_path, [Source(path, 1.0, "many"), Source(other, 0.001, "few")])
    with pytest.raises(UserError, match="the source 'few' gives no pair"):
        few.open_table("train")
