"""Tables on disk: each is built once per machine; later runs and other ranks open it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from app.core.cache import DamagedEntry, cached, fingerprint
from app.core.errors import UserError
from app.core.files import Parts, atomic_file, atomic_folder, file_hash
from datamodules.records import PreferencePair
from datamodules.sources.messages import answer_keys, near_key, prompt_key
from datamodules.sources.pairs import PairStream
from datamodules.sources.rows import RowReport
from datamodules.table import SCHEMA, PairTable, Part, label_kind
from datamodules.tokenisation import Tokenisation, tokenise_pairs
from datamodules.tokenizer import tokenizer_fingerprint

log = logging.getLogger(__name__)

TABLE_VERSION = 11  # raise if a change of reading, tokenising or the schema changes the content of tables
FILES = ("pairs.arrow", "table.json")  # the rows; their checksum and what else is known of them
UNKNOWN = "text that the tokenizer does not know"
_FOUND = b"found"  # the metadata of a batch in a part: what became of its pairs
_PAIRS_PER_BATCH = 1024
_BATCHES_PER_PART = 16
_BEFORE_PROCESSES = 8  # batches that take less time than processes take to start


class Tokenised(NamedTuple):
    """A batch of pairs as rows of a table, with what became of the pairs and the types of their labels."""

    rows: pa.RecordBatch
    read: int
    report: RowReport
    kinds: dict[str, list[str]]


def cached_table(stream: PairStream, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation) -> PairTable:
    """Return the table of `stream` from the cache; build it first if it is missing or damaged.

    Raises UserError if the cache folder cannot be written or no pair remains.
    """
    described = [TABLE_VERSION, stream.description(), tokenizer_fingerprint(tokenizer), asdict(settings)]
    build = partial(build_table, stream, tokenizer, settings)
    return cached("tables", fingerprint(described), open_table, build)


def open_table(folder: Path) -> PairTable:
    """Return the table in `folder`, mapped into memory. Raises DamagedEntry."""
    columns, meta = read_rows(folder, FILES, SCHEMA)
    try:
        report = RowReport(Counter(meta["report"]), meta["examples"])
        return PairTable(columns, meta["label_kinds"], [Part(len(columns), report)])
    except KeyError as error:
        raise DamagedEntry(f"{folder} lacks {error}") from error


def build_table(
    stream: PairStream, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation, folder: Path
) -> None:
    """Tokenise the pairs of `stream` into the new `folder`; the table's report includes that of the stream.

    The next call for the same folder resumes the work of a killed process after its last finished part. Raises
    UserError if no pair remains, FileExistsError if the folder exists and is not empty.
    """
    parts = Parts(folder.with_suffix(".parts"), described := stream.description())
    try:
        report = _tokenise_parts(stream, tokenizer, settings, parts)
        kinds: defaultdict[str, set[str]] = defaultdict(set)
        meta: dict[str, Any] = {}

        def batches() -> Iterator[pa.RecordBatch]:
            written = 0
            for batch in chain.from_iterable(map(_read_part, parts)):
                report.extend(batch.report)
                for name, types in batch.kinds.items():
                    kinds[name].update(types)
                yield batch.rows
                written += len(batch.rows)
            if not written:
                told = "; ".join(report.lines())
                raise UserError(f"No pair is left after tokenisation ({told}): check the data settings.")
            if stream.description() != described:
                raise UserError(f"{stream.name} has changed while it was read: wait until it is complete.")
            report.counts["pairs"] = written
            meta.update(report=report.counts, examples=report.examples, label_kinds=by_name(kinds))

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
                    found = [batch.read, batch.report.counts, batch.report.examples, batch.kinds]
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
        read, counts, examples, kinds = json.loads(found[_FOUND])
        yield Tokenised(rows, read, RowReport(Counter(counts), examples), kinds)


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
    return Tokenised(record_batch(rows, SCHEMA), len(pairs), report, by_name(kinds))


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


def by_name(kinds: Mapping[str, set[str]]) -> dict[str, list[str]]:
    return {name: sorted(types) for name, types in kinds.items()}


def record_batch(rows: Sequence[Sequence[object]], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as a batch of columns."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


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
