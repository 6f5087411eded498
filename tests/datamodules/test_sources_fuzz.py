"""Damaged input: never a traceback, never a pair that differs from the line it came from."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from app.errors import UserError
from datamodules.records import PreferencePair
from datamodules.sources import read_pairs

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


def _assert_exact(pair: PreferencePair, row: dict[str, object]) -> None:
    assert pair.labels == {"flipped": row["flipped"]}
    if "prompt" not in row:
        assert (f"{pair.prompt}{pair.chosen}", f"{pair.prompt}{pair.rejected}") == (row["chosen"], row["rejected"])
    elif isinstance(row["prompt"], str):
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])
    else:
        assert list(pair.prompt) == row["prompt"]
        assert [pair.chosen, pair.rejected] == [row[side][0]["content"] for side in ("chosen", "rejected")]  # type: ignore[index]


def test_damaged_files_never_break_the_reader(tmp_path: Path) -> None:
    refused, checked = _fuzz(tmp_path, files=2_000, seed=0)
    assert refused > 1_000
    assert checked > 1_000


@pytest.mark.slow
def test_ten_thousand_damaged_files_never_break_the_reader(tmp_path: Path) -> None:
    refused, checked = _fuzz(tmp_path, files=10_000, seed=1)
    assert refused > 5_000
    assert checked > 5_000
