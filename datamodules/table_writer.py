"""Tables on disk: each is built once per machine; later runs and other ranks open it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from app.core.cache import DamagedEntry, cached, fingerprint
from app.core.errors import UserError
from app.core.files import atomic_folder, file_hash
from datamodules.sources.prompts import answer_keys, prompt_key
from datamodules.sources.reader import PairStream
from datamodules.sources.rows import RowReport
from datamodules.table import SCHEMA, PairTable, Part, label_kind
from datamodules.tokenisation import Tokenisation, tokenise_pairs
from datamodules.tokenizer import tokenizer_fingerprint

TABLE_VERSION = 5  # raise if a change of reading, tokenising or the schema changes the content of tables
FILES = ("pairs.arrow", "table.json")  # the rows; their checksum and what else is known of them
_PAIRS_PER_BATCH = 1024


def cached_table(stream: PairStream, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation) -> PairTable:
    """Return the table of `stream` from the cache; build it first if it is missing or damaged.

    Raises UserError if the cache folder cannot be written or no pair remains.
    """
    described = [TABLE_VERSION, dict(stream.description), tokenizer_fingerprint(tokenizer), asdict(settings)]
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

    Raises UserError if no pair remains, FileExistsError if the folder exists and is not empty.
    """
    pairs = stream.read()
    report: RowReport | None = getattr(pairs, "report", None)  # which counts rows and pairs meanwhile
    notes = report or RowReport()
    written = 0
    label_kinds: dict[str, set[str]] = {}
    meta: dict[str, Any] = {}

    def batches() -> Iterator[list[tuple[object, ...]]]:
        nonlocal written
        remaining = iter(pairs)
        with tqdm(desc="tokenising", unit=" pairs", delay=3, disable=None) as progress:
            while batch := list(islice(remaining, _PAIRS_PER_BATCH)):
                rows: list[tuple[object, ...]] = []
                for pair, (tokens, told) in zip(batch, tokenise_pairs(batch, tokenizer, settings), strict=True):
                    for note in told:
                        notes.note(note if tokens else f"dropped: {note}", pair.pair_id)
                    if tokens:
                        key = prompt_key(pair.prompt or pair.chosen)  # plain text has no prompt
                        rows.append((pair.pair_id, json.dumps(pair.labels), key, *answer_keys(pair), *tokens))
                        for name, value in pair.labels.items():
                            label_kinds.setdefault(name, set()).add(label_kind(value))
                yield rows
                written += len(rows)
                if report is None:
                    notes.counts["rows"] += len(batch)
                progress.update(len(batch))
        if not written:
            lost = "; ".join(notes.lines())
            raise UserError(f"No pair is left after tokenisation ({lost}): check the data settings.")
        notes.counts["pairs"] = written
        kinds = {name: sorted(found) for name, found in label_kinds.items()}
        meta.update(report=notes.counts, examples=notes.examples, label_kinds=kinds)

    write_rows(folder, FILES, SCHEMA, batches(), meta)


def write_rows(
    folder: Path,
    files: tuple[str, str],
    schema: pa.Schema,
    batches: Iterable[Sequence[Sequence[object]]],
    meta: dict[str, Any],
) -> None:
    """Write batches of rows to the new `folder`, with a checksum and `meta`, which may be filled meanwhile."""
    with atomic_folder(folder) as part:
        with pa.OSFile(str(part / files[0]), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for rows in batches:
                columns = list(zip(*rows, strict=True)) or [()] * len(schema)
                arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
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
