"""Tokenising pairs into tables on disk: each is built once per machine; later runs and other ranks open it."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from tqdm.auto import tqdm

from app.core.cache import fingerprint, locked_entry
from app.core.errors import UserError
from app.core.files import atomic_folder, file_hash
from datamodules.records import PreferencePair
from datamodules.sources import PairStream, RowReport, answer_keys, prompt_key
from datamodules.table import SCHEMA, TABLE_VERSION, DamagedTable, TokenisedTable, label_kind, open_table
from datamodules.tokenisation import Tokenisation, tokenise_pairs
from datamodules.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_PAIRS_PER_BATCH = 1024


def table_fingerprint(
    source: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> str:
    """Return the cache key of a table: a hash of everything that its content depends on.

    `source` describes the source of the pairs in JSON values: content hash, format, seed of a generator, ….
    """
    parts = [TABLE_VERSION, dict(source), tokenizer_fingerprint(tokenizer), asdict(settings)]
    return fingerprint(parts)


def cached_table(stream: PairStream, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation) -> TokenisedTable:
    """Return the table of `stream` from the cache; build it first if necessary.

    Processes that need the same table wait for the one that builds it. A damaged table is rebuilt, with a warning.
    Raises UserError if the cache folder cannot be written.
    """
    with locked_entry("tables", table_fingerprint(stream.description, tokenizer, settings)) as folder:
        if folder.exists():
            try:
                return open_table(folder)
            except DamagedTable as damage:
                log.warning("The cached table is damaged and is built again: %s", damage)
                shutil.rmtree(folder)
        pairs = stream.read()
        return build_table(pairs, tokenizer, settings, folder, getattr(pairs, "report", None))


def build_table(
    pairs: Iterable[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    settings: Tokenisation,
    folder: Path,
    reader_report: RowReport | None = None,
) -> TokenisedTable:
    """Tokenise the stream `pairs` into the new `folder` and return its table.

    The table's report includes `reader_report` (complete once `pairs` has been read): `rows` = `pairs` + all counts
    that start with "skipped" or "dropped". Raises UserError if no pair remains, FileExistsError if the folder
    exists and is not empty.
    """
    counts: Counter[str] = Counter()
    losses = RowReport()  # for its examples
    label_kinds: dict[str, set[str]] = {}
    with atomic_folder(folder) as part:
        with (
            pa.OSFile(str(part / "pairs.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
            tqdm(desc="tokenising", unit=" pairs", delay=3, disable=None) as progress,
        ):
            for batch in _batches(pairs):
                rows: list[tuple[object, ...]] = []
                for pair, (tokens, notes) in zip(batch, tokenise_pairs(batch, tokenizer, settings), strict=True):
                    for note in notes:
                        losses.skip(note if tokens else f"dropped: {note}", pair.pair_id)
                    if tokens:
                        key = prompt_key(pair.prompt)
                        rows.append((pair.pair_id, json.dumps(pair.labels), key, *answer_keys(pair), *tokens))
                        for name, value in pair.labels.items():
                            label_kinds.setdefault(name, set()).add(label_kind(value))
                columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
                arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
                counts.update({"rows": len(batch), "pairs": len(rows)})
                progress.update(len(batch))
        if not counts["pairs"]:
            lost = "; ".join(f"{count} {reason}" for reason, count in losses.skipped.items())
            raise UserError(f"No pair is left after tokenisation ({lost}): check the data settings.")
        examples = dict(losses.examples)
        if reader_report is not None:
            counts["rows"] = reader_report.rows
            counts.update({f"skipped: {reason}": count for reason, count in reader_report.skipped.items()})
            counts.update({f"field ignored: {name}": n for name, n in reader_report.ignored_fields.items()})
            examples |= {f"skipped: {reason}": places for reason, places in reader_report.examples.items()}
        meta = {
            "version": TABLE_VERSION,
            "checksum": file_hash(part / "pairs.arrow"),
            "report": counts + losses.skipped,
            "examples": examples,
            "label_kinds": {name: sorted(kinds) for name, kinds in label_kinds.items()},
        }
        (part / "table.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return open_table(folder)


def _batches(pairs: Iterable[PreferencePair]) -> Iterator[list[PreferencePair]]:
    remaining = iter(pairs)
    while batch := list(islice(remaining, _PAIRS_PER_BATCH)):
        yield batch
