"""What makes a pair, and what is refused, row by row and form by form."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import UserError
from datamodules.records import BadRow, Message, PreferencePair, Prompt, blank
from datamodules.sources.files import arrow_rows
from datamodules.sources.messages import prompt_messages
from datamodules.sources.pairs import read_pairs, read_row
from datamodules.sources.source import Source

TALK = "\n\nHuman: hi\n\nAssistant:"
USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}


def pair_of(row: object, format: str = "auto", need_rejected: bool = False) -> PreferencePair:
    return read_row(row, "f:1", Source("f", format=format), need_rejected)[0]


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "hi"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, (Message("user", "hi"),)),
        ({"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")]}, (Message("user", "hi"),)),
        ({"prompt": "hi", "chosen": [says("a")], "rejected": [says("b")]}, (Message("user", "hi"),)),
        ({"chosen": [USER, says("a")], "rejected": [USER, says("b")]}, (Message("user", "hi"),)),
        # the published form of UltraFeedback repeats the prompt in both conversations
        ({"prompt": "hi", "chosen": [USER, says("a")], "rejected": [USER, says("b")]}, (Message("user", "hi"),)),
        (
            {"prompt": "hi", "chosen": [SYSTEM, USER, says("a")], "rejected": [SYSTEM, USER, says("b")]},
            (Message("system", "be kind"), Message("user", "hi")),
        ),
        (
            {"prompt": [USER], "chosen": [says("x"), USER, says("a")], "rejected": [says("x"), USER, says("b")]},
            (Message("user", "hi"), Message("assistant", "x"), Message("user", "hi")),
        ),
        ({"chosen": TALK + "a", "rejected": TALK + "b"}, TALK),
    ],
)
def test_every_form_gives_the_same_pair(row: dict[str, object], prompt: Prompt) -> None:
    pair = pair_of({**row, "flipped": True, "votes": [1, 2]})
    assert pair == PreferencePair("f:1", prompt, "a", "b", {"flipped": True})


def test_what_the_chat_template_takes_beside_the_text_is_kept() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
    call = {"id": None, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Look."}
    rest: dict[str, object] = {
        "system": "be kind",
        "tools": json.dumps(tools),
        "chat_template_kwargs": {"enable_thinking": False, "other": None},
    }
    pair = pair_of({"prompt": "hi", "chosen": [asks], "rejected": [says("sunny")], **rest})
    assert pair.prompt == (Message("system", "be kind"), Message("user", "hi"))
    assert (pair.tools, pair.template_kwargs) == (tools, {"enable_thinking": False})
    called = [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    assert pair.answer("chosen") == {
        "role": "assistant",
        "content": "",
        "tool_calls": called,
        "reasoning_content": "Look.",
    }
    assert pair.answer("rejected") == {"role": "assistant", "content": "sunny"}
    answered = [USER, asks, {"role": "tool", "content": "3 °C"}]
    found = pair_of({"prompt": answered, "chosen": "cold", "rejected": "hot", **rest}).prompt
    assert isinstance(found, tuple)
    assert [turn.role for turn in found] == ["system", "user", "assistant", "tool"]
    for field, value, reason in (
        ("system", 3, "wrong type"),
        ("tools", "[{", "bad JSON"),
        ("tools", {"a": 1}, "wrong type"),
        ("chat_template_kwargs", [1], "wrong type"),
        ("prompt", [SYSTEM | {"content": "be rude"}, USER], "two system messages"),
        ("chosen", [asks | {"tool_calls": ["x"]}], "wrong type"),
        ("chosen", [asks | {"tool_calls": []}], "wrong type"),
        ("tools", ["\ud800"], "text is not valid Unicode"),
    ):
        with pytest.raises(BadRow) as bad:
            pair_of({"prompt": "hi", "chosen": [says("a")], "rejected": [says("b")], **rest, field: value})
        assert bad.value.reason == reason


@pytest.mark.parametrize(
    "row",
    [{"prompt": "hi", "response": "a"}, {"prompt": "hi", "chosen": "a"}, {"prompt": "hi", "response": [says("a")]}],
)
def test_demonstrations_have_no_rejected_and_are_refused_on_demand(row: dict[str, object]) -> None:
    pair = pair_of(row)
    assert (pair.chosen, pair.rejected, pair.labels) == ("a", None, {})
    with pytest.raises(BadRow, match="missing field"):
        pair_of(row, need_rejected=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object with fields"),
        ({}, "missing field"),
        ({"prompt": "hi", "rejected": "b"}, "missing field"),
        ({"prompt": "hi", "response": "a", "rejected": "b"}, "missing field"),
        ({"response": "a"}, "missing field"),
        ({"prompt": "hi", "chosen": "a", "rejected": None}, "empty rejected"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong type"),
        ({"prompt": "hi", "chosen": "a", "rejected": [says("b")]}, "wrong type"),
        ({"prompt": ["hi"], "chosen": "a", "rejected": "b"}, "wrong type"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"}, "wrong type"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "pair_id": 1.5}, "wrong type"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "pair_id": " "}, "empty pair_id"),
        ({"prompt": [{"role": "robot", "content": "x"}], "chosen": "a", "rejected": "b"}, "unknown role"),
        ({"prompt": [USER, says("x")], "chosen": "a", "rejected": "b"}, "turns out of order"),
        ({"prompt": [USER, SYSTEM, USER], "chosen": "a", "rejected": "b"}, "turns out of order"),
        ({"chosen": [USER], "rejected": [USER]}, "last turn is not the assistant's"),
        ({"chosen": [USER, says("a")], "rejected": [SYSTEM, USER, says("b")]}, "no shared prompt"),
        ({"prompt": "x", "chosen": [USER, says("a")], "rejected": [USER, says("b")]}, "no shared prompt"),
        ({"chosen": [says("a")], "rejected": [says("b")]}, "empty prompt"),
        ({"prompt": " \n", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": [{"role": "user", "content": ""}], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": "hi", "chosen": " ", "rejected": "b"}, "empty chosen"),
        ({"prompt": "hi", "chosen": "a", "rejected": "\u3000"}, "empty rejected"),
        ({"prompt": "hi", "chosen": "\u200b", "rejected": "b"}, "empty chosen"),
        ({"prompt": "hi", "chosen": [says("a")], "rejected": [says(" \ufeff\u00ad\0")]}, "empty rejected"),
        ({"prompt": "\u2060", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": "hi", "response": ""}, "empty response"),
        ({"prompt": "hi", "chosen": [], "rejected": []}, "empty chosen"),
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"chosen": "a", "rejected": "b"}, "missing field"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"chosen": "\n\nRobot: hi\n\nAssistant: a", "rejected": TALK + "b"}, "not an HH transcript"),
        ({"chosen": TALK + "a\n\nHuman: b", "rejected": TALK + "b"}, "last turn is not the assistant's"),
        ({"chosen": TALK + "a" + TALK + "c", "rejected": TALK + "b"}, "no shared prompt"),
        ({"prompt": "hi", "chosen": "\ud800", "rejected": "b"}, "text is not valid Unicode"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "kind": "\udfff"}, "text is not valid Unicode"),
    ],
)
def test_a_malformed_row_is_refused_with_its_reason(row: object, reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        pair_of(row)
    assert bad.value.reason == reason


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"chosen": TALK + "a", "rejected": TALK + "b"}, "pairs", "missing field"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "hh", "not an HH transcript"),
        ({"text": "hi", "rejected": "b"}, "text", "two answers"),
        ({"chosen": [USER, says("a")], "rejected": [USER, says("b")]}, "hh", "wrong type"),
    ],
)
def test_a_named_format_refuses_the_other_one(row: object, format: str, reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        pair_of(row, format)
    assert bad.value.reason == reason


def test_prompt_messages_reads_turns_and_refuses_other_roles_and_orders() -> None:
    text = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: a\n\nb: c\n\nAssistant:"
    turns = (("user", "hi"), ("assistant", "yes?"), ("user", "a\n\nb: c"))
    assert prompt_messages(text) == tuple(Message(*turn) for turn in turns)
    for wrong in (
        "\n\nAssistant:",
        "\n\nSystem: x\n\nHuman: hi\n\nAssistant:",
        "\n\nAssistant: hi\n\nAssistant:",
        "\n\nHuman: hi\n\nHuman: ho\n\nAssistant:",
        "\n\nHuman: hi\n\nAssistant: x\n\nAssistant:",
    ):
        with pytest.raises(ValueError, match="HH prompt"):
            prompt_messages(wrong)


GOOD = {"prompt": "hi", "chosen": "a", "rejected": "b"}


def test_error_mode_names_the_line_the_reason_and_the_cure(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "chosen": " "})
    with pytest.raises(UserError, match=r"p\.jsonl:2: empty chosen; .*data\.on_bad_row: skip"):
        list(read_pairs(path))


def test_skip_mode_counts_by_reason_and_remembers_where(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = json.dumps(GOOD).encode()
    nested = b"[" * 100_000
    double = b'{"prompt": "hi", "chosen": "a", "chosen": "c", "rejected": "b"}'
    number = b'{"prompt": "hi", "chosen": "a", "rejected": "b", "n": ' + b"9" * 5000 + b"}"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good, b"{", b"\xff", b"", nested, double, number, good, b""]))
    reader = read_pairs(str(path), on_bad_row="skip")
    assert [pair.pair_id for pair in reader] == ["p.jsonl:1", "p.jsonl:8"]
    lost = {"skipped: bad JSON": 3, "skipped: invalid UTF-8": 1, "skipped: repeated field": 1}
    assert reader.report.counts == {"rows": 7, "pairs": 2, **lost}  # a blank line is no row
    assert reader.report.examples["skipped: bad JSON"] == ["p.jsonl:2", "p.jsonl:5", "p.jsonl:7"]
    assert "3 skipped: bad JSON (first: p.jsonl:2" in reader.report.summary()


def test_pair_ids_are_unique(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {**GOOD, "pair_id": 7}, {**GOOD, "pair_id": "7"}, {**GOOD, "pair_id": "x"})
    with pytest.raises(UserError, match=r"p\.jsonl:2: repeated pair_id"):
        list(read_pairs(path))
    assert [pair.pair_id for pair in read_pairs(path, on_bad_row="skip")] == ["7", "x"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n"])
def test_a_file_without_a_good_row_is_refused(tmp_path: Path, content: bytes) -> None:
    for name, data in (("p.jsonl", content), ("p.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="holds no"):
            list(read_pairs(str(tmp_path / name), on_bad_row="skip"))


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({**GOOD, "chosen": os.urandom(50).hex()}).encode() + b"\n" for _ in range(500))
    packed = gzip.compress(lines)
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"damaged gzip .Compressed file ended before"):
        list(read_pairs(str(path), on_bad_row="skip"))  # half of the rows would count as one that is skipped
    path.write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    with pytest.raises(UserError, match="damaged gzip"):
        list(read_pairs(str(path), on_bad_row="skip"))


def test_invalid_utf8_within_a_list_costs_its_own_row_alone() -> None:
    texts = pa.StringArray.from_buffers(3, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"b\xffb"))
    turns = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([texts], ["content"]))
    first, second, third = (row for _, row in arrow_rows([pa.record_batch({"chosen": turns})]))
    assert first == third == {"chosen": [{"content": "b"}]}
    assert isinstance(second, BadRow)


def test_parquet_rows_keep_their_labels_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = pa.table(
        {
            "prompt": [[USER], [USER], None],
            "chosen": ["a", "a", "a"],
            # the second text is not UTF-8, which Arrow does not check
            "rejected": pa.StringArray.from_buffers(
                3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"b\xffb")
            ),
            "kind": ["x", "y", "z"],
        }
    )
    pq.write_table(table, path)
    reader = read_pairs(str(path), on_bad_row="skip")
    assert list(reader) == [PreferencePair("p.parquet:1", (Message("user", "hi"),), "a", "b", {"kind": "x"})]
    assert reader.report.counts == {
        "rows": 3,
        "pairs": 1,
        "skipped: invalid UTF-8": 1,
        "skipped: empty prompt": 1,
    }
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        list(read_pairs(str(path), on_bad_row="skip"))


def test_the_files_of_a_folder_make_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "prefs"
    folder.mkdir()
    write(folder / "train.jsonl", {"chosen": TALK + "a", "rejected": TALK + "b", "votes": 3})
    write(folder / "test.jsonl", {"chosen": TALK + "c", "rejected": TALK + "d", "votes": 1})
    assert list(read_pairs(str(folder), split="test")) == [
        PreferencePair("prefs/test.jsonl:1", TALK, "c", "d", {"votes": 1})
    ]
    with pytest.raises(UserError, match="split 'none'"):
        read_pairs(str(folder), split="none")


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.xlsx").write_text("x")
    (tmp_path / "pairs.csv").write_text("x")
    for path, said in (
        ("nope.jsonl", "no file"),
        ("./nope", "no file"),
        ("nope", "no file or folder 'nope'.*Hub id is `owner/name`"),
        (str(tmp_path / "p.xlsx"), "known kind"),
        (str(tmp_path / "pair.csv"), "Did you mean pairs.csv"),
        (str(tmp_path / "*.parquet"), "no file or folder"),
    ):
        with pytest.raises(UserError, match=said):
            read_pairs(path)
    with pytest.raises(UserError, match="without splits"):
        read_pairs(write(tmp_path / "p.jsonl", GOOD), split="test")


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda value: not blank(value)
)
label = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | text


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(text, text, text, st.dictionaries(st.sampled_from(["kind", "ümlaut", "n"]), label)).filter(
            lambda row: row[1] != row[2]
        ),
        min_size=1,
        max_size=5,
    ),
    ascii_only=st.booleans(),
    packed=st.booleans(),
)
def test_any_text_survives_the_way_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list, ascii_only: bool, packed: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / ("p.jsonl.gz" if packed else "p.jsonl")
    lines = [
        json.dumps({"prompt": p, "chosen": c, "rejected": r, **labels}, ensure_ascii=ascii_only)
        for p, c, r, labels in rows
    ]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    expected = [PreferencePair(f"{path.name}:{n}", *row) for n, row in enumerate(rows, 1)]
    assert list(read_pairs(str(path))) == expected
