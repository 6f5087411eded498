"""The cache of tables: each is built once per machine; later runs and other ranks open it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from app.cache import fingerprint, locked_entry
from datamodules.sources import OnBadRow, PairStream, PreferredBy, RowFormat, RowReading, SourceAddress, pair_stream
from datamodules.table.stored import TABLE_VERSION, DamagedTable, TokenisedTable, open_table
from datamodules.table.writer import build_table
from datamodules.tokenisation import Tokenisation
from datamodules.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


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
                log.warning("The cached table is damaged and is built anew: %s", damage)
                shutil.rmtree(folder)
        pairs = stream.read()
        return build_table(pairs, tokenizer, settings, folder, getattr(pairs, "report", None))


def load_table(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Tokenisation,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    format: RowFormat = "auto",
    on_bad_row: OnBadRow = "error",
    need_rejected: bool = False,
    min_score_ratio: float = 1.0,
    preferred_by: PreferredBy = "better",
) -> TokenisedTable:
    """Return the table of a file, dataset folder or Hub id, from the cache if its content has not changed.

    See `read_pairs` for the arguments and the errors.
    """
    reading = RowReading(format, need_rejected, min_score_ratio, preferred_by)
    stream = pair_stream(SourceAddress(path, split, subset, revision), reading, on_bad_row)
    return cached_table(stream, tokenizer, settings)
