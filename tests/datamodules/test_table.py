"""Tables on disk: what comes out is what went in, once per machine, and never damaged."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from select import select
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_tokenizers import TEMPLATE, byte_tokenizer, letter_tokenizer, tokenise_pair

from app.core.cache import DamagedEntry, cache_root
from app.core.errors import UserError
from datamodules import table as table_module
from datamodules.controlled_task import build_tokenizer
from datamodules.describe import unknown_text
from datamodules.preference_data import split_by_prompt
from datamodules.records import Message, PreferencePair, RowReport
from datamodules.sources.pairs import OnBadRow, PairStream, read_pairs
from datamodules.sources.source import RowFormat, Source
from datamodules.table import PairTable, build_table, cached_table, open_table
from datamodules.tokenisation import LAST_TURN, OLD_TURNS, Tokenisation, tokenise_pairs

DATA = Path(os.environ.get("BETA_DPO_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
SETTINGS = Tokenisation(max_length=24, max_prompt_length=12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))
    return cache_root("tables")


def pairs(count: int) -> Iterator[PreferencePair]:
    for index in range(count):
        labels: dict[str, object] = {"flipped": index % 2 == 0, **({"grade": index} if index % 3 else {})}
        yield PreferencePair(f"id{index}", f"the cat {index // 2}", f" yes {index}", f" no {index * 7}", labels)


def load_table(
    path: str, tokenizer: Any, settings: Tokenisation, mode: OnBadRow = "error", format: RowFormat = "auto"
) -> PairTable:
    """Return the table of pairs or demonstrations in a file or folder."""
    return cached_table(read_pairs(Source(path, format=format), mode), tokenizer, settings)


def test_several_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_PAIRS_PER_BATCH", 16)
    tokenizer = byte_tokenizer()
    longer = [*pairs(500), PreferencePair("long", "the cat", " yes" * 20, " no" * 20)]  # is cut
    for folder, cores, before in (("one", 1, 99), ("several", 3, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setattr(table_module, "_BEFORE_PROCESSES", before)
        built(iter(longer), tokenizer, SETTINGS, tmp_path / folder)
    # a worker of a Pool may have no processes of its own
    worker = get_context("fork").Process(
        target=built, args=(iter(longer), tokenizer, SETTINGS, tmp_path / "worker"), daemon=True
    )
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    for folder, name in product(("several", "worker"), table_module.FILES):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / folder / name).read_bytes()
    stream = iter([*pairs(100), PreferencePair("chat", (Message("user", "Hi"),), "a", "b")])
    with pytest.raises(UserError, match="chat messages, and no chat template"):  # from another process
        built(stream, tokenizer, replace(SETTINGS, chat_template=False), tmp_path / "refused")


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def built(stream: Iterable[PreferencePair], tokenizer: Any, settings: Tokenisation, folder: Path) -> PairTable:
    build_table(PairStream("pairs", dict, lambda _: stream), tokenizer, settings, folder)
    return open_table(folder)


ROWS: list[dict[str, object]] = [{"prompt": f"q{index}", "chosen": " yes", "rejected": " no"} for index in range(5)]


def test_a_table_returns_what_tokenise_pair_gives(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    count = 2500  # several record batches
    table = built(pairs(count), tokenizer, SETTINGS, tmp_path / "t")
    assert len(table) == count
    for index in (0, 1023, 1024, 2499):
        expected = tokenise_pair(list(pairs(count))[index], tokenizer, SETTINGS)[0]
        assert expected is not None
        for found, wanted in zip(table[index], expected, strict=True):
            assert found is not None
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, wanted)
        assert table.lengths[index] == sum(len(ids) for ids in expected if ids is not None)
    assert table.lengths.dtype == np.int64
    assert table.pair_ids([3, 2000, 3]) == ["id3", "id2000", "id3"]
    assert table.pair_ids(np.array([], dtype=np.int64)) == []
    assert table.labels([0, 1]) == {"flipped": [True, False], "grade": [None, 1]}
    assert table.kinds == {"flipped": ["bool"], "grade": ["int"]}
    assert len(np.unique(table.keys("prompt"))) == count // 2
    assert len(set(table.keys("prompt", [0, 1]))) == 1
    with pytest.raises(IndexError):
        table[count]


def test_labels_of_mixed_types_become_text(tmp_path: Path) -> None:
    values = [(1, 1, 2**70, 2**60 + 1, 2**60 + 1), ("a", 0.5, 1, 0.5, 1), (None,) * 5]
    stream = [
        PreferencePair(str(n), "the cat", "a", "b", {"mixed": m, "number": f, "big": b, "wide": w, "whole": h})
        for n, (m, f, b, w, h) in enumerate(values)
    ]
    table = built(stream, byte_tokenizer(), SETTINGS, tmp_path / "t")
    assert table.labels([0, 1, 2]) == {
        "mixed": ["1", "a", None],
        "number": [1, 0.5, None],
        "big": [str(2**70), "1", None],
        "wide": [str(2**60 + 1), "0.5", None],  # which a column of decimals would round
        "whole": [2**60 + 1, 1, None],
    }
    assert type(table.labels([0])["number"][0]) is float


@pytest.mark.parametrize(
    ("tokenizer", "known", "partly", "how"),
    [
        (build_tokenizer(), " eagle", " xyz", "(<unk>)"),
        (letter_tokenizer(), "ab\u200da\n", "aéb", "(left out)"),
    ],
)
def test_text_that_the_tokenizer_does_not_know_is_counted(
    tokenizer: Any, known: str, partly: str, how: str, tmp_path: Path
) -> None:
    stream = [PreferencePair(str(n), known, said, known + known) for n, said in enumerate((partly, known))]
    table = built(stream, tokenizer, SETTINGS, tmp_path / "t")
    counts = table.parts[0].report.counts
    assert {why: count for why, count in counts.items() if "does not know" in why} == {
        f"with text that the tokenizer does not know {how}": 1
    }
    assert unknown_text(table).startswith("50% of the pairs hold text that the tokenizer does not know; each")


def test_demonstrations_and_messages_are_stored(tmp_path: Path) -> None:
    stream = [
        PreferencePair("a", (Message("user", "hi"),), "yes", None),
        PreferencePair("b", (Message("user", "hi"),), "yes", "no"),
    ]
    table = built(stream, byte_tokenizer(template=TEMPLATE), Tokenisation(chat_template=True), tmp_path / "t")
    assert table[0].rejected is None
    assert table[1].rejected is not None
    assert table.side_lengths[2].tolist() == [0, len(table[1].rejected)]
    assert table.labels([0]) == {}


def test_the_report_adds_up_and_says_where(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        *ROWS,
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "a</s>b", "rejected": "b"},
        {"prompt": "q" * 40, "chosen": "a", "rejected": "b", "votes": [1]},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    table = load_table(path, byte_tokenizer(), SETTINGS, "skip")
    (part,) = table.parts
    assert part.report.counts == {
        "rows": 8,
        "pairs": 6,
        "skipped: empty chosen": 1,
        "dropped: BOS or EOS within chosen": 1,
        "prompt truncated": 1,
        "with no use for votes": 1,
    }
    assert part.report.examples == {
        "skipped: empty chosen": ["p.jsonl:6"],
        "dropped: BOS or EOS within chosen": ["p.jsonl:7"],
        "prompt truncated": ["p.jsonl:8"],
    }


def test_nothing_left_is_refused_and_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "</s>", "rejected": "b"}])
    with pytest.raises(UserError, match=r"No pair is left after tokenisation \(1 dropped: [^{]+\)"):
        load_table(path, byte_tokenizer(), SETTINGS)
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    stream = read_pairs(str(path))
    rows = stream.read

    def growing(report: RowReport) -> Iterator[PreferencePair]:
        yield from rows(report)
        Path(path).write_text(Path(path).read_text() + "\n")

    stream.read = growing
    with pytest.raises(UserError, match=r"p\.jsonl has changed while it was read"):
        cached_table(stream, byte_tokenizer(), SETTINGS)
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_the_second_call_opens_the_cache_and_any_change_builds_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    tokenizer = byte_tokenizer()
    first = load_table(path, tokenizer, SETTINGS)
    (folder,) = (entry for entry in cache.iterdir() if entry.is_dir())
    made = (folder / "pairs.arrow").stat()
    again = load_table(path, tokenizer, SETTINGS)
    assert (folder / "pairs.arrow").stat() == made
    assert again.parts == first.parts
    splitting = byte_tokenizer()
    splitting.split_special_tokens = True
    others = [
        load_table(path, byte_tokenizer(bos=False), SETTINGS),
        load_table(path, splitting, SETTINGS),
        load_table(path, tokenizer, Tokenisation(24, 12, "keep_start")),
        load_table(path, tokenizer, SETTINGS, "skip"),
        load_table(path, tokenizer, SETTINGS, format="pairs"),
        load_table(write(tmp_path / "q.jsonl", ROWS), tokenizer, SETTINGS),  # its pair ids differ
        load_table(write(tmp_path / "p.jsonl", ROWS[:-1]), tokenizer, SETTINGS),
    ]
    assert sum(entry.is_dir() for entry in cache.iterdir()) == 8
    assert len(others[-1]) == 4


def test_a_complete_entry_is_read_where_nothing_can_be_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    load_table(path, byte_tokenizer(), SETTINGS)
    monkeypatch.setattr("app.core.files.has_kernel_locks", read_only)
    assert len(load_table(path, byte_tokenizer(), SETTINGS)) == 5
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): set BETA_DPO_CACHE"):
        load_table(path, byte_tokenizer(bos=False), SETTINGS)


def read_only(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_killed_process_leaves_finished_parts_and_the_next_one_resumes_behind_them(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table_module, "_PAIRS_PER_BATCH", 16)
    monkeypatch.setattr(table_module, "_BATCHES_PER_PART", 4)
    count = 6000
    rows: list[dict[str, object]] = [
        {"prompt": f"q{index}", "chosen": "a</s>b" if index % 50 == 7 else " yes" * 9, "rejected": "", "n": index}
        if index % 100 == 8
        else {"prompt": f"q{index}" * 9, "chosen": " yes", "rejected": " no", "n": None if index < 2000 else index}
        for index in range(count)
    ]
    path = write(tmp_path / "p.jsonl", rows)
    load = partial(load_table, path, byte_tokenizer(), SETTINGS, "skip")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    alive, inherited = os.pipe()
    process = get_context("fork").Process(target=load)
    process.start()
    os.close(inherited)
    assert process.pid is not None
    while len(list(cache.glob("*.parts/[0-9]*"))) < 30:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder,) = cache.glob("*.parts")
    done = len(list(folder.glob("[0-9]*"))) * 64
    assert 30 * 64 <= done < count
    assert not folder.with_suffix("").exists()
    assert select([alive], [], [], 20)[0] == [alive]  # the workers have ended, too
    os.close(alive)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(table_module, "tokenise_pairs", watched := Mock(wraps=tokenise_pairs))
    with caplog.at_level(logging.INFO):
        resumed = load()
    assert f"p.jsonl: resumes tokenising at row {done + 1} of {count}" in caplog.text
    tokenised = sum(len(call.args[0]) for call in watched.call_args_list)
    assert tokenised == resumed.parts[0].report.counts["rows"] - 60 - done
    assert not folder.exists()

    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "undisturbed"))
    assert len(load()) == len(resumed)
    for name in table_module.FILES:
        whole = tmp_path / "undisturbed" / "tables" / folder.stem / name
        assert whole.read_bytes() == (folder.with_suffix("") / name).read_bytes()


def test_parts_of_refused_data_and_of_work_left_for_a_week_are_removed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "_BATCHES_PER_PART", 1)
    good = write(tmp_path / "good.jsonl", ROWS)
    with pytest.raises(UserError, match=r"bad\.jsonl:2501"):
        load_table(write(tmp_path / "bad.jsonl", [*ROWS * 500, {}]), byte_tokenizer(), SETTINGS)
    assert not list(cache.glob("*.parts"))
    left, recent = cache / "left.parts", cache / "recent.parts"
    for folder in (left, recent):
        folder.mkdir()
    os.utime(left, (0, time.time() - 8 * 24 * 3600))
    load_table(good, byte_tokenizer(), SETTINGS)
    assert [left.exists(), recent.exists()] == [False, True]


def test_a_generated_source_is_cached_without_generating_again() -> None:
    calls = []

    def generate() -> Iterator[PreferencePair]:
        calls.append(1)
        return pairs(3)

    stream = PairStream("cats", lambda: {"task": "cats", "seed": 1}, lambda _: generate())
    for _ in range(2):
        assert len(cached_table(stream, byte_tokenizer(), SETTINGS)) == 3
    assert len(calls) == 1


def test_a_changed_dataset_folder_is_read_again(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "prefs"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    for _ in range(2):
        assert len(load_table(str(folder), byte_tokenizer(), SETTINGS)) == 5
    assert sum(entry.is_dir() for entry in cache.iterdir()) == 1
    write(folder / "train.jsonl", ROWS * 2)
    assert len(load_table(str(folder), byte_tokenizer(), SETTINGS)) == 10


@pytest.mark.parametrize("damage", ["cut", "bit", "no meta", "meta", "pickle"])
def test_a_damaged_cache_is_refused_and_rebuilt(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    table = load_table(path, byte_tokenizer(), SETTINGS)
    expected = [table[index].chosen.tolist() for index in range(5)]
    (folder,) = (entry for entry in cache.iterdir() if entry.is_dir())
    arrow = folder / "pairs.arrow"
    del table
    data = bytearray(arrow.read_bytes())
    match damage:
        case "cut":
            arrow.write_bytes(data[: len(data) // 2])
        case "bit":
            data[len(data) // 2] ^= 1
            arrow.write_bytes(data)
        case "no meta":
            (folder / "table.json").unlink()
        case "meta":
            (folder / "table.json").write_text("[]")
        case _:
            arrow.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DamagedEntry):
        open_table(folder)
    with caplog.at_level(logging.WARNING):
        rebuilt = load_table(path, byte_tokenizer(), SETTINGS)
    assert "damaged entry of the cache of tables is rebuilt" in caplog.text
    assert [rebuilt[index].chosen.tolist() for index in range(5)] == expected


def test_whoever_wants_the_same_table_waits_for_it(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "p.jsonl", ROWS * 300)
    with ThreadPoolExecutor(4) as pool:  # a lock file excludes threads as it does processes
        tables = list(pool.map(lambda _: load_table(path, byte_tokenizer(), SETTINGS), range(4)))
    assert [len(table) for table in tables] == [1500] * 4
    assert all("waiting for it" in message for message in caplog.messages), caplog.text
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set BETA_DPO_CACHE"):
        load_table(write(tmp_path / "p.jsonl", ROWS), byte_tokenizer(), SETTINGS)


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    keys=st.lists(st.integers(-20, 20), min_size=1, max_size=80),
    share=st.integers(0, 12).map(lambda twentieths: twentieths / 20),
)
def test_a_prompt_is_never_on_both_sides(keys: list[int], share: float) -> None:
    prompt_keys = np.array(keys, dtype=np.int64)
    largest = max(np.unique(prompt_keys, return_counts=True)[1])
    try:
        train, held_out = split_by_prompt(prompt_keys, share)
    except UserError:
        assert share * len(keys) + largest >= len(keys)
        return
    assert sorted([*train, *held_out]) == list(range(len(keys)))
    assert not set(prompt_keys[train]) & set(prompt_keys[held_out])
    assert share * len(keys) <= len(held_out) < share * len(keys) + largest
    order = np.random.default_rng(0).permutation(len(keys))
    assert set(prompt_keys[order][split_by_prompt(prompt_keys[order], share)[1]]) == set(prompt_keys[held_out])


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "hh_harmless_base_test.jsonl.gz").exists(), reason="the HH file is not here")
def test_real_hh_table_accounts_for_every_row() -> None:
    path = str(DATA / "hh_harmless_base_test.jsonl.gz")
    table = load_table(path, byte_tokenizer(), Tokenisation(), "skip")
    report = table.parts[0].report.counts
    assert report["rows"] == 2312
    assert report["skipped: no shared prompt"] == 5
    assert report["skipped: empty chosen"] == 4
    lost = [count for name, count in report.items() if name.startswith(("skipped", "dropped"))]
    assert report["pairs"] + sum(lost) == 2312
    assert len(table) == report["pairs"]
    assert table.longest(np.arange(len(table)))[1] <= 512
    assert report[OLD_TURNS] > 0
    assert report[LAST_TURN] > 0
    assert "prompt truncated" not in report  # never through a header
