"""Reading preference pairs from a file or the Hub, with a full account of every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from app.errors import UserError
from datamodules.records import PreferencePair
from datamodules.sources.files import SUFFIXES, LocalFile
from datamodules.sources.formats import RowFormat, RowReading, read_row
from datamodules.sources.hub import HubDataset
from datamodules.sources.pku_saferlhf import PreferredBy
from datamodules.sources.report import BadRow, LeftOut, RowReport

OnBadRow = Literal["error", "skip"]


class Source(Protocol):
    """Where rows come from."""

    name: str  # stands in the pair ids: `<name>:<row number>`

    def fingerprint(self) -> str:
        """A hash that changes with the content."""
        ...

    def rows(self) -> Iterator[tuple[int, object]]:
        """(row number from 1, the row's fields, or a BadRow where it cannot be read)."""
        ...


@dataclass(frozen=True)
class SourceAddress:
    """Where to find rows: a file, a dataset folder or a Hub id, and which part of it.

    `subset` is the name of a configuration, or else a folder of the data set; `revision` a branch, tag or
    commit of a Hub id.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


def open_source(address: SourceAddress) -> Source:
    """The source at `address`. A file is one split, so any other than "train" is refused. Raises UserError."""
    path = address.path
    local = Path(path).expanduser()
    if local.name.endswith(SUFFIXES):
        for name, given in {"split": address.split != "train", "subset": address.subset}.items():
            if given:
                raise UserError(
                    f"{path} is one file without splits or subsets: "
                    f"leave out the {name} {getattr(address, name)!r} or give a Hub id."
                )
        if address.revision is None:
            return LocalFile(local)
    if local.is_file() and not local.name.endswith(SUFFIXES):
        raise UserError(f"{path} is of no known kind: data.path takes {', '.join(SUFFIXES)}, or a Hub id.")
    if address.revision is not None and (local.exists() or local.name.endswith(SUFFIXES)):
        raise UserError(f"{path} is on this machine and has no revision: leave out data.revision.")
    if local.is_dir():
        return HubDataset(str(local), address.split, address.subset)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise UserError(f"There is no file or folder {path!r}: check the path that you gave.")
    return HubDataset(path, address.split, address.subset, address.revision)


class PairReader(Iterator[PreferencePair]):
    """Iterates once over the pairs of a source; `report` counts the rows meanwhile."""

    def __init__(
        self,
        source: Source,
        reading: RowReading,
        on_bad_row: OnBadRow,
    ) -> None:
        self.report = RowReport()
        self._source = source
        self._reading = reading
        self._skip = on_bad_row == "skip"
        self._pairs = self._read()

    def __next__(self) -> PreferencePair:
        return next(self._pairs)

    def _read(self) -> Iterator[PreferencePair]:
        seen: set[str] = set()
        for number, row in self._source.rows():
            self.report.rows += 1
            location = f"{self._source.name}:{number}"
            try:
                if isinstance(row, BadRow):
                    raise row
                pair, ignored = read_row(row, location, self._reading)
                if pair.pair_id in seen:
                    raise BadRow("repeated pair_id", pair.pair_id)
            except BadRow as bad:
                if not self._skip and not isinstance(bad, LeftOut):
                    raise UserError(f"{location}: {bad}; mend the row or set data.on_bad_row: skip.") from None
                self.report.skip(bad.reason, location)
                continue
            seen.add(pair.pair_id)
            self.report.pairs += 1
            self.report.ignored_fields.update(ignored)
            yield pair
        if not self.report.rows:
            raise UserError(f"{self._source.name} holds no row: check data.path.")
        if not self.report.pairs:
            raise UserError(
                f"{self._source.name} holds no usable row ({self.report.summary()}): check data.format."
            )


def read_pairs(
    path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    format: RowFormat = "auto",
    on_bad_row: OnBadRow = "error",
    need_rejected: bool = False,
    min_score_ratio: float = 1.0,
    preferred_by: PreferredBy = "better",
) -> PairReader:
    """The pairs of a local file, dataset folder or Hub id, in their order; see `pair_from_row` for the forms.

    A pair's id is its field `pair_id` (text or integer, unique) or `<name of the source>:<line or row number>`.
    `on_bad_row`: "error" raises at the first bad row, "skip" leaves it out and counts it in the reader's
    `report`. For the others see `SourceAddress` and `RowReading`. Raises UserError, also for a source without a
    single usable row and, in both modes, for a file that is damaged as a whole.
    """
    reading = RowReading(format, need_rejected, min_score_ratio, preferred_by)
    return PairReader(open_source(SourceAddress(path, split, subset, revision)), reading, on_bad_row)
