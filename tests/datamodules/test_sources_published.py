"""Rows in the exact schemas of published data sets, in folders that `load_dataset` reads in the Hub's place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_rows import GOOD, NEWS, PAIRS, PKU, POOR, QUESTION, ROWS, SHP, TLDR, ULTRAFEEDBACK
from tiny_tokenizers import byte_tokenizer

from app.core.errors import UserError
from datamodules.preference_data import PreferenceData
from datamodules.records import BadRow, LeftOut
from datamodules.sources.pairs import read_pairs, read_row
from datamodules.sources.source import RowFormat, Source
from datamodules.table import cached_table
from datamodules.tokenisation import Tokenisation


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("format", list(ROWS))
@pytest.mark.parametrize("automatic", [False, True])
def test_a_published_row_becomes_its_pair(format: RowFormat, automatic: bool) -> None:
    source = Source("f", format="auto" if automatic else format)
    pair, ignored = read_row(ROWS[format], "f:1", source, need_rejected=True)
    assert pair == PAIRS[format]
    unused = ["rejected_harm_category", "chosen_harm_category"] if format == "pku_saferlhf" else []
    assert ignored == (["messages"] if automatic and format == "ultrafeedback" else unused)


@pytest.mark.parametrize("format", list(ROWS))
def test_other_formats_refuse_the_row(format: RowFormat) -> None:
    for other in ("hh", *(name for name in ROWS if name != format)):
        with pytest.raises(BadRow):
            read_row(ROWS[format], "f:1", Source("f", format=other))


def test_the_other_choice_swaps_the_sides() -> None:
    for format, field, value in (
        ("tldr", "choice", 0),
        ("shp", "labels", 1),
        ("pku_saferlhf", "better_response_id", 0),
    ):
        row = {**ROWS[format], field: value}
        if format == "shp":
            row |= {"score_A": 20, "score_B": 5}
        pair, _ = read_row(row, "f:1", Source("f", format=format))
        assert (pair.chosen, pair.rejected) == (PAIRS[format].rejected, PAIRS[format].chosen)


def test_the_safer_id_decides_on_demand() -> None:
    pair, _ = read_row(PKU, "f:1", Source("f", format="pku_saferlhf", preferred_by="safer"))
    assert (pair.chosen, pair.rejected) == (" Pins lift.", " Break it.")
    expected = {
        "better_is_chosen": False,
        "safer_is_chosen": True,
        "is_chosen_safe": True,
        "chosen_source": "Alpaca-7B",
    }
    assert expected.items() <= pair.labels.items()


def info(**changes: object) -> dict[str, object]:
    return {**TLDR, "info": {**TLDR["info"], **changes}}


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("tldr", "text", "not an object with fields"),
        ("tldr", {key: value for key, value in TLDR.items() if key != "choice"}, "missing field"),
        ("tldr", {**TLDR, "choice": 2}, "choice is neither 0 nor 1"),
        ("tldr", {**TLDR, "choice": None}, "choice is neither 0 nor 1"),
        ("tldr", {**TLDR, "info": None}, "wrong type"),
        ("tldr", {**TLDR, "summaries": TLDR["summaries"][:1]}, "wrong type"),
        ("tldr", {**TLDR, "summaries": [" a", " b"]}, "wrong type"),
        (
            "tldr",
            {**TLDR, "summaries": [{"policy": "ref"}, TLDR["summaries"][1]]},
            "empty text of the rejected summary",
        ),
        (
            "tldr",
            {**TLDR, "summaries": [{"text": None}, TLDR["summaries"][1]]},
            "empty text of the rejected summary",
        ),
        ("tldr", {**TLDR, "summaries": [{"text": " "}, TLDR["summaries"][1]]}, "empty rejected"),
        ("tldr", {**TLDR, "summaries": [{"text": "same"}, {"text": " same"}]}, "chosen equals rejected"),
        ("tldr", info(post=None), "empty info.post"),
        ("tldr", info(post=" "), "empty prompt"),
        ("tldr", info(title=3), "wrong type"),
        ("tldr", info(title="\ud800"), "text is not valid Unicode"),
        ("shp", {**SHP, "labels": "0"}, "choice is neither 0 nor 1"),
        ("shp", {**SHP, "labels": True}, "choice is neither 0 nor 1"),
        ("shp", {**SHP, "labels": 1}, "scores contradict the label"),
        ("shp", {**SHP, "score_A": None}, "wrong type"),
        ("shp", {**SHP, "score_ratio": float("nan")}, "wrong type"),
        ("shp", {key: value for key, value in SHP.items() if key != "score_ratio"}, "missing field"),
        ("shp", {**SHP, "history": "\n"}, "empty prompt"),
        ("shp", {**SHP, "history": "a\n\nAssistant: b"}, "turns within a question"),
        ("shp", {**SHP, "human_ref_B": ""}, "empty chosen"),
        ("shp", {**SHP, "human_ref_A": None}, "empty human_ref_A"),
        ("ultrafeedback", {**ULTRAFEEDBACK, "chosen": "4"}, "wrong type"),
        ("ultrafeedback", {**ULTRAFEEDBACK, "rejected": [QUESTION]}, "last turn is not the assistant's"),
        ("ultrafeedback", {**ULTRAFEEDBACK, "rejected": [QUESTION, GOOD]}, "chosen equals rejected"),
        ("ultrafeedback", {**ULTRAFEEDBACK, "prompt": "What is 3 + 3?"}, "no shared prompt"),
        ("ultrafeedback", {**ULTRAFEEDBACK, "score_chosen": 1.0}, "scores contradict the label"),
        ("ultrafeedback", {**ULTRAFEEDBACK, "score_rejected": None}, "wrong type"),
        ("ultrafeedback", {"prompt": "hi", "chosen": [GOOD], "rejected": [POOR]}, "missing field"),
        ("pku_saferlhf", {**PKU, "better_response_id": -1}, "choice is neither 0 nor 1"),
        ("pku_saferlhf", {key: value for key, value in PKU.items() if key != "safer_response_id"}, "missing field"),
        ("pku_saferlhf", {**PKU, "response_0": None}, "empty response_0"),
        ("pku_saferlhf", {**PKU, "response_0": ""}, "empty rejected"),
        ("pku_saferlhf", {**PKU, "prompt": None}, "empty prompt"),
    ],
)
def test_a_malformed_published_row_is_refused_with_its_reason(format: RowFormat, row: object, reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        read_row(row, "f:1", Source("f", format=format))
    assert bad.value.reason == reason
    assert not isinstance(bad.value, LeftOut)


@pytest.mark.parametrize("format", list(ROWS))
def test_malformed_rows_in_a_dataset_folder_are_located_or_counted(tmp_path: Path, format: RowFormat) -> None:
    response = {
        "tldr": "choice",
        "shp": "human_ref_A",
        "ultrafeedback": "score_chosen",
        "pku_saferlhf": "response_1",
    }
    folder = tmp_path / format
    write(folder / "train.jsonl", ROWS[format], {**ROWS[format], response[format]: None}, ROWS[format])
    write(folder / "test.jsonl", ROWS[format])
    with pytest.raises(UserError, match=rf"{format}/train\.jsonl:2: .*data\.on_bad_row: skip"):
        list(read_pairs(str(folder), format=format))
    reader = read_pairs(str(folder), format=format, on_bad_row="skip")
    assert [pair.pair_id for pair in reader] == [f"{format}/train.jsonl:1", f"{format}/train.jsonl:3"]
    assert reader.report.counts["rows"] == 3
    assert reader.report.counts["pairs"] == 2
    (pair,) = read_pairs(str(folder), format=format, split="test")
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        PAIRS[format].prompt,
        PAIRS[format].chosen,
        PAIRS[format].rejected,
    )


def test_low_score_ratios_are_left_out_and_counted_in_either_mode(tmp_path: Path) -> None:
    write(tmp_path / "shp.jsonl", SHP, {**SHP, "score_A": 18, "score_ratio": 20 / 18}, {**SHP, "score_ratio": 2.0})
    for mode in ("error", "skip"):
        reader = read_pairs(str(tmp_path / "shp.jsonl"), min_score_ratio=2, on_bad_row=mode)
        assert [pair.pair_id for pair in reader] == ["shp.jsonl:1", "shp.jsonl:3"]
        assert reader.report.counts["skipped: score_ratio below 2"] == 1
        assert reader.report.examples == {"skipped: score_ratio below 2": ["shp.jsonl:2"]}
    assert len(list(read_pairs(str(tmp_path / "shp.jsonl")))) == 3


def test_news_articles_are_left_out_of_tldr_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "tldr.jsonl", NEWS, TLDR)
    reader = read_pairs(str(tmp_path / "tldr.jsonl"))
    assert [pair.pair_id for pair in reader] == ["tldr.jsonl:2"]
    assert reader.report.counts["skipped: summary of a news article, no TL;DR post"] == 1


def test_all_subsets_of_hh_or_one_of_them(tmp_path: Path) -> None:
    folders = tmp_path / "hh-rlhf"  # as Anthropic/hh-rlhf: a folder for each subset, and one of another kind
    subsets = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
    for subset in subsets:
        for split in ("train", "test"):
            turn = f"\n\nHuman: {subset} {split}\n\nAssistant:"
            write_gzip(folders / subset / f"{split}.jsonl.gz", {"chosen": f"{turn} a", "rejected": f"{turn} b"})
    attempts = folders / "red-team-attempts" / "red_team_attempts.jsonl.gz"
    write_gzip(attempts, {"transcript": "\n\nHuman: a\n\nAssistant: b", "rating": 4})
    for split in ("train", "test"):
        pairs = list(read_pairs(str(folders), format="hh", split=split))
        assert sorted(pair.prompt for pair in pairs) == [
            f"\n\nHuman: {name} {split}\n\nAssistant:" for name in subsets
        ]
    (pair,) = read_pairs(str(folders), format="hh", subset="helpful-base", split="test")
    assert (pair.pair_id, pair.prompt) == ("hh-rlhf/helpful-base:1", "\n\nHuman: helpful-base test\n\nAssistant:")


def write_gzip(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_subset_is_a_declared_configuration(tmp_path: Path) -> None:
    declared = tmp_path / "PKU-SafeRLHF"  # its card declares configurations, named unlike the folders
    write(declared / "data/Alpaca-7B/train.jsonl", PKU)
    write(declared / "data/Alpaca2-7B/train.jsonl", {**PKU, "prompt": "How do keys work?"})
    (declared / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: default\n  data_files:\n  - {split: train, path: data/*/train.jsonl}\n"
        "- config_name: alpaca2-7b\n  data_files:\n  - {split: train, path: data/Alpaca2-7B/train.jsonl}\n---\n"
    )
    assert len(list(read_pairs(str(declared)))) == 2
    (pair,) = read_pairs(str(declared), subset="alpaca2-7b")
    assert pair.prompt == "\n\nHuman: How do keys work?\n\nAssistant:"
    with pytest.raises(UserError, match=r"subset 'alpaca9'.*data\.subset"):
        read_pairs(str(declared), subset="alpaca9")


def test_the_parquet_branch_of_tldr_is_read_by_folder(tmp_path: Path) -> None:
    # typed as published: inferred from one row, the type of a field that is null there would be unknown
    texts = {"info": ("id", "post", "title", "subreddit", "site", "article"), "summary": ("text", "policy", "note")}
    structs = {name: pa.struct([(field, pa.string()) for field in fields]) for name, fields in texts.items()}
    comparisons = pa.schema(
        [
            ("info", structs["info"]),
            ("summaries", pa.list_(structs["summary"])),
            ("choice", pa.int32()),
            *((name, pa.string()) for name in ("worker", "batch", "split")),
            ("extra", pa.struct([("confidence", pa.int32())])),
        ]
    )
    axis = pa.schema([("info", structs["info"]), ("summary", structs["summary"])])
    other = {"info": TLDR["info"], "summary": TLDR["summaries"][0]}
    for name, rows in (
        ("comparisons/train/0000.parquet", [TLDR]),
        ("comparisons/validation/0000.parquet", [NEWS, TLDR, {**TLDR, "choice": 0}]),
        ("axis/validation/0000.parquet", [other]),
        ("axis/test/0000.parquet", [other]),
    ):
        (tmp_path / "tldr" / name).parent.mkdir(parents=True, exist_ok=True)
        schema = comparisons if name.startswith("comparisons") else axis
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "tldr" / name)
    reader = read_pairs(str(tmp_path / "tldr"), subset="comparisons", split="validation", format="tldr")
    assert [(pair.pair_id, pair.chosen) for pair in reader] == [
        ("tldr/comparisons:2", " Cat sleeps on keyboard."),
        ("tldr/comparisons:3", " Cat sleeps."),
    ]


def test_a_cached_table_is_not_taken_for_another_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "tables"))
    write(tmp_path / "shp.jsonl", SHP, {**SHP, "history": "Why?", "score_A": 18, "score_ratio": 20 / 18})
    for ratio, pairs in ((1.0, 2), (2.0, 1), (1.0, 2)):
        source = Source(str(tmp_path / "shp.jsonl"), min_score_ratio=ratio)
        table = cached_table(read_pairs(source, "error", need_rejected=True), byte_tokenizer(), Tokenisation())
        assert len(table) == pairs
        assert table.parts[0].report.counts["skipped: score_ratio below 2"] == 2 - pairs
        assert table.labels([0])["score_chosen"] == [20]


def test_settings_without_a_use_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", SHP)
    path = str(tmp_path / "p.jsonl")
    for settings, said in (
        ({"format": "hh", "min_score_ratio": 2.0}, "belongs to data.format shp, not to hh"),
        ({"format": "shp", "preferred_by": "safer"}, "belongs to data.format pku_saferlhf, not to shp"),
    ):
        with pytest.raises(UserError, match=said):
            PreferenceData(path, **settings)
    _, ignored = read_row(SHP, "f:1", Source("f", preferred_by="safer"), need_rejected=True)
    assert ignored == ["data.preferred_by, which is for pku_saferlhf"]
    with pytest.raises(ValueError, match="min_score_ratio must be a finite number from 1"):
        PreferenceData(path, min_score_ratio=0.5)
    with pytest.raises(UserError, match="leave out the subset 'x'"):
        read_pairs(path, subset="x")
    for local in (path, str(tmp_path)):
        with pytest.raises(UserError, match=r"leave out data\.revision"):
            read_pairs(local, revision="main")
