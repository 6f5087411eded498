"""Damaged input: never a traceback, never a pair that differs from the line it came from."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from app.core.errors import UserError
from datamodules.records import PreferencePair
from datamodules.sources.pairs import read_pairs, read_row
from datamodules.sources.source import Source

_ALPHABET = ["hello", "ü", "日本", "\\", '"', "\n\nHuman: x", "\n\nAssistant: y", "{", "</s>", " ", "\u2028", "🙂"]


def _row(rng: random.Random) -> dict[str, object]:
    def words() -> str:
        return "w" + " ".join(rng.choices(_ALPHABET, k=rng.randint(1, 6)))

    match rng.randint(0, 2):
        case 0:
            row: dict[str, object] = {"prompt": words(), "chosen": "+" + words(), "rejected": "-" + words()}
        case 1:
            start = "\n\nHuman: " + rng.choice(_ALPHABET[:3]) + "\n\nAssistant:"
            row = {"chosen": start + " yes", "rejected": start + " no"}
        case _:
            talk = [{"role": "user", "content": words()}]
            row = {
                "prompt": talk,
                "chosen": [{"role": "assistant", "content": "+" + words()}],
                "rejected": [{"role": "assistant", "content": "-" + words()}],
            }
    return row | {"pair_id": f"id{rng.getrandbits(64):x}", "flipped": rng.random() < 0.5}


def _damage(rng: random.Random, line: bytes) -> bytes:
    """One to three random changes of bytes: replaced, deleted, inserted, doubled, swapped or cut off."""
    data = bytearray(line)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        at = rng.randrange(len(data))
        end = min(len(data), at + rng.randint(1, 12))
        match rng.randint(0, 5):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = rng.choice([b"\n", b'"', b"\\", b"\x00", b"\xff", b"{", b"\\ud800", b",", b"]"])
            case 3:
                data[at:at] = data[at:end]
            case 4:
                data[at:end] = bytes(reversed(data[at:end]))
            case _:
                del data[at:]
    return bytes(data)


def _fuzz(folder: Path, files: int, seed: int) -> tuple[int, int]:
    """Read `files` damaged files in both modes; how many were refused, and how many good pairs were checked."""
    rng = random.Random(seed)
    refused = checked = 0
    for _ in range(files):
        rows = [_row(rng) for _ in range(rng.randint(1, 6))]
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5).encode() for row in rows]
        damaged = {index for index in range(len(lines)) if rng.random() < 0.4} or {0}
        intact = {str(row["pair_id"]): row for index, row in enumerate(rows) if index not in damaged}
        data = b"\n".join(_damage(rng, line) if index in damaged else line for index, line in enumerate(lines))
        path = folder / "fuzz.jsonl"
        if rng.random() < 0.2:
            path = folder / "fuzz.jsonl.gz"
            data = gzip.compress(data, 1)
            if rng.random() < 0.5:
                data, intact = _damage(rng, data), {}  # what survives cannot be told from outside
        path.write_bytes(data)
        try:
            list(read_pairs(str(path)))
        except UserError:
            refused += 1
        try:
            found = {pair.pair_id: pair for pair in read_pairs(str(path), on_bad_row="skip")}
        except UserError:
            assert not intact
            continue
        for pair_id, row in intact.items():
            _assert_exact(found[pair_id], row)
            checked += 1
    return refused, checked


def _assert_exact(pair: PreferencePair, row: dict[str, Any]) -> None:
    assert pair.labels == {"flipped": row["flipped"]}
    if "prompt" not in row:
        assert (f"{pair.prompt}{pair.chosen}", f"{pair.prompt}{pair.rejected}") == (row["chosen"], row["rejected"])
    elif isinstance(row["prompt"], str):
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])
    else:
        assert list(pair.prompt) == row["prompt"]
        assert [pair.chosen, pair.rejected] == [row[side][0]["content"] for side in ("chosen", "rejected")]


FORMS = ("text", "messages", "one message", "parts", "sharegpt", "alpaca", "question", "hh", "json text")


def _other_row(rng: random.Random, form: str) -> dict[str, object]:
    """Return a row in one of the everyday formats; a text says which side it belongs to."""

    def said(who: str, text: object) -> dict[str, object]:
        return {"role": who, "content": text}

    asked, good, bad = (f"{side}\u00b7" + " ".join(rng.choices(_ALPHABET[:5], k=3)) for side in "pcr")
    sides: dict[str, object] = {"chosen": said("assistant", good), "rejected": said("assistant", bad)}
    rows: dict[str, dict[str, object]] = {
        "text": {"prompt": asked, "chosen": good, "rejected": bad},
        "messages": {"messages": [said("user", asked)], **sides},
        "one message": {"prompt": asked, **sides},
        "parts": {"prompt": [said("user", [{"type": "text", "text": asked}])], "chosen": good, "rejected": bad},
        "sharegpt": {
            "conversations": [{"from": "human", "value": asked}],
            "chosen": {"from": "gpt", "value": good},
            "rejected": {"from": "gpt", "value": bad},
        },
        "alpaca": {"instruction": asked, "input": "", "chosen": good, "rejected": bad},
        "question": {"question": asked, "chosen": good, "rejected": bad},
        "hh": {
            side: f"\n\nHuman: {asked}\n\nAssistant: {text}" for side, text in (("chosen", good), ("rejected", bad))
        },
        "json text": {
            "prompt": json.dumps([said("user", asked)]),
            "chosen": json.dumps([said("assistant", good)]),
            "rejected": json.dumps(said("assistant", bad)),
        },
    }
    return rows[form] | {"pair_id": f"id{rng.getrandbits(64):x}"}


def _written(rng: random.Random, rows: list[dict[str, object]], kind: str) -> list[bytes]:
    """Return the pieces of a file, one a row (in a .csv file the first are the names of the columns)."""
    if kind != "csv":
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5).encode() for row in rows]
        if kind == "json":
            lines = [
                b"[" * (n == 0) + line + (b"]" if n == len(lines) - 1 else b",") for n, line in enumerate(lines)
            ]
        return lines
    pieces = []
    table: list[list[object]] = [list(rows[0]), *(list(row.values()) for row in rows)]
    for cells in table:
        text = io.StringIO(newline="")
        csv.writer(text).writerow(cell if isinstance(cell, str) else json.dumps(cell) for cell in cells)
        pieces.append(text.getvalue().removesuffix("\r\n").encode())
    return pieces


def _fuzz_formats(folder: Path, files: int, seed: int) -> Counter[str]:
    """Read `files` files of one damaged row each; the counts by what came of the damaged row."""
    rng = random.Random(seed)
    came_of: Counter[str] = Counter()
    for number in range(files):
        form, kind = FORMS[number % len(FORMS)], ("jsonl", "json", "csv")[number % 3]
        rows = [_other_row(rng, form) for _ in range(rng.randint(1, 5))]
        whole = {str(row["pair_id"]): read_row(row, "", Source("f"), need_rejected=True)[0] for row in rows}
        pieces = _written(rng, rows, kind)
        hit = rng.randrange(len(rows))
        place = hit + (kind == "csv")
        pieces[place] = _damage(rng, pieces[place])
        path = folder / f"fuzz.{kind}"
        path.write_bytes(b"\n".join(pieces))
        with contextlib.suppress(UserError):
            list(read_pairs(str(path), need_rejected=True))
        try:
            reader = read_pairs(str(path), need_rejected=True, on_bad_row="skip")
            found = {pair.pair_id: pair for pair in reader}
        except UserError:
            came_of["file refused"] += 1
            continue
        intact = [pair_id for pair_id in whole if pair_id != rows[hit]["pair_id"]]
        for pair_id in intact:
            assert found.pop(pair_id) == whole[pair_id]
        if not found:
            # counted, and not just gone
            assert not reader.report.complete or not pieces[place].strip(b"[], "), pieces
            came_of["row refused"] += 1
        for pair in found.values():
            prompt = pair.prompt if isinstance(pair.prompt, str) else "".join(turn.content for turn in pair.prompt)
            texts = {"p": prompt, "c": pair.chosen, "r": str(pair.rejected)}
            for side, text in texts.items():  # a letter may have changed, but no text has come to another side
                assert not any(f"{other}\u00b7" in text for other in "pcr".replace(side, "")), (pieces, pair)
                # JSON of a message, as long as it still says who speaks and what, is never taken for a text
                assert not re.match(r'\[?\{"role": "(user|assistant)", "content": ', text), (pieces, pair)
            came_of["row read"] += 1
    return came_of


def test_damaged_rows_of_everyday_formats_are_read_or_refused(tmp_path: Path) -> None:
    came_of = _fuzz_formats(tmp_path, files=1_500, seed=2)
    assert min(came_of[what] for what in ("file refused", "row refused", "row read")) > 100


@pytest.mark.slow
def test_ten_thousand_damaged_files_of_everyday_formats(tmp_path: Path) -> None:
    came_of = _fuzz_formats(tmp_path, files=10_000, seed=3)
    assert min(came_of[what] for what in ("file refused", "row refused", "row read")) > 500


def test_damaged_files_never_break_the_reader(tmp_path: Path) -> None:
    refused, checked = _fuzz(tmp_path, files=2_000, seed=0)
    assert refused > 1_000
    assert checked > 1_000


@pytest.mark.slow
def test_ten_thousand_damaged_files_never_break_the_reader(tmp_path: Path) -> None:
    refused, checked = _fuzz(tmp_path, files=10_000, seed=1)
    assert refused > 5_000
    assert checked > 5_000


@pytest.mark.parametrize("cut", [False, True], ids=["flipped bits", "cut"])
def test_a_damaged_arrow_file_ends_in_a_sentence_and_not_the_process(cut: bool, tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(40)])
    file = tmp_path / "rows.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    whole, refused = file.read_bytes(), 0
    for at in range(3, len(whole), 16):
        file.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        try:
            list(read_pairs(str(file), "skip"))
        except UserError:
            refused += 1
    assert refused > 40
