"""Streams of pairs that can be read again, with the values that identify them in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from datamodules.records import PreferencePair
from datamodules.sources.formats import RowReading
from datamodules.sources.reader import OnBadRow, PairReader, SourceAddress, open_source


@dataclass(frozen=True)
class PairStream:
    """A stream of pairs as text, in a fixed order.

    `description` is the part of the cache key that identifies the pairs, in JSON values: content hash, format, seed
    of a generator, …. `read` starts at the first pair; its result may have a `report` (a `RowReport`) of the rows.
    """

    name: str
    description: Mapping[str, object]
    read: Callable[[], Iterable[PreferencePair]]


def pair_stream(address: SourceAddress, reading: RowReading, on_bad_row: OnBadRow) -> PairStream:
    """Return the stream of a file, dataset folder or Hub id. Raises UserError if it does not exist."""
    source = open_source(address)
    description = {
        "name": source.name,  # part of the pair ids
        "content": source.fingerprint(),
        "on_bad_row": on_bad_row,
        **asdict(reading),
    }
    return PairStream(source.name, description, lambda: PairReader(source, reading, on_bad_row))
