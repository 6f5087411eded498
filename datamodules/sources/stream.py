"""Pairs that can be read again, and what decides them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from datamodules.records import PreferencePair
from datamodules.sources.formats import RowReading
from datamodules.sources.reader import OnBadRow, PairReader, SourceAddress, open_source


@dataclass(frozen=True)
class PairStream:
    """Pairs as text, in an order of their own that never changes.

    `description` tells in JSON values all that decides the pairs: content hash, format, seed of a generator, ….
    `read` starts at the first pair; what it returns may have a `report` (a `RowReport`) of the rows read.
    """

    name: str
    description: Mapping[str, object]
    read: Callable[[], Iterable[PreferencePair]]


def pair_stream(address: SourceAddress, reading: RowReading, on_bad_row: OnBadRow) -> PairStream:
    """The pairs of a file, dataset folder or Hub id. Raises UserError when there is none."""
    source = open_source(address)
    description = {
        "name": source.name,  # stands in the pair ids
        "content": source.fingerprint(),
        "on_bad_row": on_bad_row,
        **asdict(reading),
    }
    return PairStream(source.name, description, lambda: PairReader(source, reading, on_bad_row))
