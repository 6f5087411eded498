"""The table of tokenised pairs: built once per machine, mapped into memory, joined and labelled without a copy."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from itertools import chain, islice
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from app.core.cache import DamagedEntry, cached, fingerprint
from app.core.errors import UserError
from app.core.files import Parts, atomic_file, atomic_folder, file_hash
from datamodules.records import PreferencePair, RowReport, TokenisedPair
from datamodules.sources.messages import answer_keys, near_key, prompt_key
from datamodules.sources.pairs import PairStream
from datamodules.tokenisation import UNKNOWN, Tokenisation, tokenise_pairs, tokenizer_fingerprint

log = logging.getLogger(__name__)

TABLE_VERSION = 13  # raise if a change of reading, tokenising or the schema changes the content of tables
FILES = ("pairs.arrow", "table.json")  # the rows; their checksum and what else is known of them
_FOUND = b"found"  # the metadata of a batch in a part: what became of its pairs
_PAIRS_PER_BATCH = 1024
_BATCHES_PER_PART = 16
_BEFORE_PROCESSES = 8  # batches that take less time than processes take to start
Rows = Sequence[int] | np.ndarray
_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("labels", pa.string()),  # a JSON object: columns differ from row to row and may mix types
        ("pair_key", pa.int64()),  # of the tokens: `TokenisedPair.key`
        ("prompt_key", pa.int64()),  # equal for equal prompts
        ("near_key", pa.int64()),  # equal also for prompts that differ in case, spaces or punctuation alone
        ("chosen_key", pa.int64()),  # equal for equal texts
        ("rejected_key", pa.int64()),
        ("prompt", _TOKENS),
        ("chosen", _TOKENS),
        ("rejected", _TOKENS),  # null for a demonstration
    ]
)


class Part(NamedTuple):
    """The pairs of one source in a table, and what became of the source's other rows."""

    pairs: int
    report: RowReport
    source: str = ""  # in a mixture


class PairTable:
    """A read-only table of N tokenised pairs.

    `columns` has those of `SCHEMA`; every further column is a label, and a label of the data with its name becomes
    `<name>_in_data`. `parts` are the sources of the pairs in their order, `report` is on all of them, and `kinds`
    are the types of the values of each label of the data.
    """

    def __init__(self, columns: pa.Table, parts: Sequence[Part]) -> None:
        self.columns = columns
        self.parts = parts
        self.report = RowReport()
        for part in parts:
            self.report.extend(part.report)
        # a column without a value is no label
        self.kinds = {name: found for name, found in self.report.kinds.items() if found != ["NoneType"]}
        self._sides = [columns.column(side) for side in TokenisedPair._fields]

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, index: int) -> TokenisedPair:
        """Return the tokens of pair `index`. Raises IndexError if there is no such pair."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        sides = (side[index].values for side in self._sides)
        arrays = (None if ids is None else ids.to_numpy().astype(np.int64) for ids in sides)
        return TokenisedPair(*arrays)  # type: ignore[arg-type]  # `rejected` alone may be None

    @cached_property
    def side_lengths(self) -> np.ndarray:
        """Return the tokens of prompt, chosen and rejected (0 for a demonstration), [3, N] int64."""
        lengths = [pc.fill_null(pc.list_value_length(side), 0) for side in self._sides]
        return np.stack([column.to_numpy().astype(np.int64) for column in lengths])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each pair, its prompt once, [N] int64."""
        return self.side_lengths.sum(axis=0)

    @cached_property
    def largest_id(self) -> int:
        return max(pc.max(chunk.values).as_py() or 0 for side in self._sides for chunk in side.chunks)

    def keys(self, name: str, indices: Rows | slice = slice(None)) -> np.ndarray:
        """Return the column `<name>_key` of these pairs, [n] int64."""
        return self.columns.column(f"{name}_key").to_numpy()[indices]

    def part_of(self, indices: Rows) -> np.ndarray:
        """Return the number of the part of each of these pairs, [n] int64."""
        return np.searchsorted(np.cumsum([part.pairs for part in self.parts]), indices, side="right")

    def reachable(self, rows: np.ndarray) -> np.ndarray:
        """Return all rows that a loader over `rows` may serve: more than these in a gap mixture."""
        return rows

    def content(self, rows: np.ndarray) -> str:
        """Return a hash of the tokens of all pairs that a loader over `rows` may serve, in their order."""
        return hashlib.blake2b(self.keys("pair", self.reachable(rows)).tobytes(), digest_size=16).hexdigest()

    def longest(self, rows: np.ndarray) -> tuple[int, int]:
        """Return the tokens of the longest reachable pair, and of the longest prompt with one response."""
        prompt, *responses = self.side_lengths[:, self.reachable(rows)]
        pairs, halves = prompt + sum(responses), prompt + np.maximum(*responses)
        return int(pairs.max(initial=0)), int(halves.max(initial=0))

    def taken(self, column: str, indices: Rows) -> list[Any]:
        return self.columns.column(column).take(pa.array(np.asarray(indices, dtype=np.int64))).to_pylist()

    def pair_ids(self, indices: Rows) -> list[str]:
        return self.taken("pair_id", indices)

    @property
    def label_names(self) -> list[str]:
        """Return the names of all labels, those of the data first."""
        added = self.columns.column_names[len(SCHEMA) :]
        return [*(f"{name}_in_data" if name in added else name for name in self.kinds), *added]

    def labels(self, indices: Rows) -> dict[str, list[object]]:
        """Return each label's values for these pairs: None if a row lacks the label, text if types are mixed."""
        rows = [json.loads(text) for text in self.taken("labels", indices)] if self.kinds else []
        columns: list[list[object]] = []
        for name, kinds in self.kinds.items():
            values = [row.get(name) for row in rows]
            present = set(kinds) - {"NoneType"}  # do they fit one Arrow column without rounding?
            if present == {"int", "float"}:
                values = [None if value is None else float(value) for value in values]
            elif not (present <= {"int", "wide integer"} or (len(present) == 1 and "big integer" not in present)):
                values = [None if value is None else str(value) for value in values]
            columns.append(values)
        columns += [self.taken(name, indices) for name in self.columns.column_names[len(SCHEMA) :]]
        return dict(zip(self.label_names, columns, strict=True))

    def values(self, indices: np.ndarray, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield these labels' values for each of the pairs; the labels of all pairs are never in memory at once."""
        for part in np.array_split(indices, len(indices) // 65536 + 1):
            labels = self.labels(part)
            yield from zip(*(labels[name] for name in names), strict=True)

    def with_labels(self, **labels: pa.Array | pa.ChunkedArray) -> PairTable:
        """Return the table with further labels, each with a value [N] for every pair."""
        columns = self.columns
        for name, values in labels.items():
            columns = columns.append_column(name, values)
        return PairTable(columns, self.parts)

    def named(self, source: str) -> PairTable:
        """Return the table as one source of a mixture: the label `source` names it, and so do the pairs' ids."""
        ids = pc.binary_join_element_wise(f"{source}/", self.columns.column("pair_id"), "")
        columns = self.columns.set_column(0, "pair_id", ids).append_column("source", pa.repeat(source, len(self)))
        return PairTable(columns, [part._replace(source=source) for part in self.parts])


def joined(tables: Sequence[PairTable]) -> PairTable:
    """Return the pairs of several tables with the same columns as one table."""
    parts = [part for table in tables for part in table.parts]
    return PairTable(pa.concat_tables([table.columns for table in tables]), parts)


def label_kind(value: object) -> str:
    """Return the name of a value's type; an integer beyond 53 bits is "wide", one beyond 64 bits "big"."""
    if isinstance(value, int) and abs(value) > 2**53:
        return "wide integer" if -(2**63) <= value < 2**63 else "big integer"
    return type(value).__name__


class Tokenised(NamedTuple):
    """A batch of pairs as rows of a table, with what became of the pairs."""

    rows: pa.RecordBatch
    read: int
    report: RowReport


def cached_table(stream: PairStream, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation) -> PairTable:
    """Return the table of `stream` from the cache; build it first if it is missing or damaged. Raises UserError."""
    described = [TABLE_VERSION, stream.description(), tokenizer_fingerprint(tokenizer), asdict(settings)]
    build = partial(build_table, stream, tokenizer, settings)
    return cached("tables", fingerprint(described), open_table, build)


def open_table(folder: Path) -> PairTable:
    """Return the table in `folder`, mapped into memory. Raises DamagedEntry."""
    columns, meta = read_rows(folder, FILES, SCHEMA)
    report = RowReport(Counter(meta["report"]), meta["examples"], meta["label_kinds"])
    return PairTable(columns, [Part(len(columns), report)])


def build_table(
    stream: PairStream, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation, folder: Path
) -> None:
    """Tokenise the pairs of `stream` into the new `folder`; resume what a killed process began there.

    The table's report includes that of the stream. Raises UserError if no pair remains.
    """
    parts = Parts(folder.with_suffix(".parts"), described := stream.description())
    try:
        report = _tokenise_parts(stream, tokenizer, settings, parts)
        meta: dict[str, Any] = {}

        def batches() -> Iterator[pa.RecordBatch]:
            written = 0
            for batch in chain.from_iterable(map(_read_part, parts)):
                report.extend(batch.report)
                yield batch.rows
                written += len(batch.rows)
            if not written:
                told = "; ".join(report.lines())
                raise UserError(f"No pair is left after tokenisation ({told}): check the data settings.")
            if stream.description() != described:
                raise UserError(f"{stream.name} has changed while it was read: wait until it is complete.")
            report.counts["pairs"] = written
            meta.update(report=report.counts, examples=report.examples, label_kinds=report.kinds)

        write_rows(folder, FILES, SCHEMA, batches(), meta)
    except UserError:  # its cure changes the data or the settings, and these parts would never be used
        parts.remove()
        raise
    parts.remove()


def _tokenise_parts(
    stream: PairStream, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation, parts: Parts
) -> RowReport:
    """Tokenise the pairs that no finished part contains; return the report on what the stream read."""
    pairs = iter(stream)
    done, rows = len(parts), stream.rows()
    read = done * _BATCHES_PER_PART * _PAIRS_PER_BATCH
    if done:
        log.info("%s: resumes tokenising at row %d of %s", stream.name, read + 1, rows or "an unknown number")
        deque(islice(pairs, read), maxlen=0)
    with progress_bar("tokenising", read, rows) as progress:
        batches = in_order(iter(lambda: list(islice(pairs, _PAIRS_PER_BATCH)), []), tokenizer, settings)
        for number, first in enumerate(batches, done):
            with (
                atomic_file(parts.path(number)) as temporary,
                pa.OSFile(str(temporary), "wb") as sink,
                pa.ipc.new_file(sink, SCHEMA) as writer,
            ):
                for batch in chain([first], islice(batches, _BATCHES_PER_PART - 1)):
                    found = [batch.read, batch.report.counts, batch.report.examples, batch.report.kinds]
                    writer.write_batch(batch.rows, {_FOUND: json.dumps(found)})
                    read += batch.read
                    progress.update(batch.read)
    stream.report.counts.setdefault("rows", read)  # a generator counts none
    return stream.report


def progress_bar(told: str, done: int, total: int | None = None) -> tqdm:
    """Return a bar of pairs, which a terminal shows after three seconds, and a log once a minute."""
    pause = 0.1 if sys.stderr.isatty() else 60.0
    often = {"delay": 3, "mininterval": pause, "maxinterval": max(pause, 10.0)}
    return tqdm(desc=told, unit=" pairs", initial=done, total=total, **often)


def _read_part(path: Path) -> Iterator[Tokenised]:
    """Yield the batches of a part, mapped into memory."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    for number in range(file.num_record_batches):
        rows, found = file.get_batch_with_custom_metadata(number)
        read, counts, *more = json.loads(found[_FOUND])
        yield Tokenised(rows, read, RowReport(Counter(counts), *more))


def tokenised(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> Tokenised:
    """Tokenise a batch of pairs."""
    rows: list[tuple[object, ...]] = []
    report = RowReport()
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # as GPT-2's, which knows every byte
        unknown = None
    for pair, (tokens, notes) in zip(pairs, tokenise_pairs(pairs, tokenizer, settings), strict=True):
        if tokens is None:
            report.note(f"dropped: {notes[0]}", pair.pair_id)
            continue
        if unknown is not None and any(unknown in ids for ids in tokens if ids is not None):
            notes.append(f"with {UNKNOWN} ({tokenizer.unk_token})")
        for note in notes:
            report.note(note, pair.pair_id)
        prompt = pair.prompt or pair.chosen  # plain text has no prompt
        keys = (tokens.key, prompt_key(prompt), near_key(prompt), *answer_keys(pair))
        rows.append((pair.pair_id, json.dumps(pair.labels), *keys, *tokens))
        for name, value in pair.labels.items():
            kinds[name].add(label_kind(value))
    report.kinds = {name: sorted(types) for name, types in kinds.items()}
    return Tokenised(record_batch(rows, SCHEMA), len(pairs), report)


def in_order(
    batches: Iterator[list[PreferencePair]], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> Iterator[Tokenised]:
    """Yield the batches tokenised, in their order; after the first few by a process for each core, up to 16.

    At most two batches for each process are in memory. One process reads the source, and more would wait for it.
    """
    # a worker of multiprocessing's Pool may have no children
    processes = 1 if current_process().daemon else min(16, len(os.sched_getaffinity(0)))
    for batch in islice(batches, None if processes == 1 else _BEFORE_PROCESSES):
        yield tokenised(batch, tokenizer, settings)
    # no process starts before there is work for it
    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (tokenizer, settings)) as pool:
        ahead: deque[Future[Tokenised]] = deque()
        for batch in batches:
            ahead.append(pool.submit(_tokenised_here, batch))
            if len(ahead) >= 2 * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _begin(*tools: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _begin.tools = tools  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    """End this process, which would wait for work forever, when a signal has killed its parent."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenised_here(pairs: list[PreferencePair]) -> Tokenised:
    return tokenised(pairs, *_begin.tools)  # type: ignore[attr-defined]


def record_batch(rows: Iterable[Sequence[object]], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as a batch of columns."""
    return pa.RecordBatch.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)


def write_rows(
    folder: Path, files: tuple[str, str], schema: pa.Schema, batches: Iterable[pa.RecordBatch], meta: dict[str, Any]
) -> None:
    """Write batches of rows to the new `folder`, with a checksum and `meta`, which may be filled meanwhile."""
    with atomic_folder(folder) as part:
        with pa.OSFile(str(part / files[0]), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        meta = {"checksum": file_hash(part / files[0]), **meta}
        (part / files[1]).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def read_rows(folder: Path, files: tuple[str, str], schema: pa.Schema) -> tuple[pa.Table, dict[str, Any]]:
    """Return what `write_rows` wrote, the rows mapped into memory. Raises DamagedEntry."""
    try:
        meta = json.loads((folder / files[1]).read_text(encoding="utf-8"))
        if meta["checksum"] != file_hash(folder / files[0]):
            raise DamagedEntry(f"{folder / files[0]} does not match its checksum")
        rows = pa.ipc.open_file(pa.memory_map(str(folder / files[0]))).read_all()
        rows.validate()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DamagedEntry(f"{folder} cannot be opened ({error!r})") from error
    if rows.schema != schema:
        raise DamagedEntry(f"{folder / files[0]} has other columns")
    return rows, meta
