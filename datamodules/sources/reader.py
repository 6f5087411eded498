"""Reader of preference pairs from files or the Hub; its report accounts for every row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal, Protocol

from app.errors import UserError
from datamodules.records import PreferencePair
from datamodules.sources.files import LocalFiles, readable
from datamodules.sources.formats import RowFormat, RowReading, close, read_row
from datamodules.sources.hub import HubDataset, folder_source
from datamodules.sources.pku_saferlhf import PreferredBy
from datamodules.sources.report import BadRow, LeftOut, RowReport

OnBadRow = Literal["error", "skip"]


class Source(Protocol):
    """A source of rows."""

    name: str

    def fingerprint(self) -> str:
        """Return a hash that changes with the content."""
        ...

    def rows(self) -> Iterator[tuple[str, object]]:
        """Yield (file or dataset and row number from 1, fields of the row, or a BadRow if it cannot be read)."""
        ...


@dataclass(frozen=True)
class SourceAddress:
    """The address of rows: a file, a pattern of files (`data/*.csv`), a folder or a Hub id, and a part of it.

    `subset` is a configuration or a folder of the dataset; `revision` is a branch, tag or commit of a Hub id.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


def open_source(address: SourceAddress) -> Source:
    """Return the source at `address`. Raises UserError, also for a split or subset of a file."""
    path = address.path
    local = Path(path).expanduser()
    if local.is_dir():
        _refuse_revision(address)
        return folder_source(local, address.split, address.subset)
    several = glob(str(local), recursive=True) if has_magic(path) and not local.exists() else None
    if several is None and not readable(local) and not local.is_file():
        if _HUB_ID.fullmatch(path) and Path(path).parts[0] not in _folders_here():
            return HubDataset(path, address.split, address.subset, address.revision)
        raise UserError(
            f"There is no file or folder {path!r}{_near(local)}: check data.path. A Hub id is `owner/name`."
        )
    if several is not None and not (several := sorted(name for name in several if Path(name).is_file())):
        raise UserError(f"No file is called {path}: check the pattern that you gave.")
    if several is None and not local.is_file():
        raise UserError(f"There is no file {path}{_near(local)}: check the path that you gave.")
    for name, given in {"split": address.split != "train", "subset": address.subset}.items():
        if given:
            raise UserError(
                f"{path} is one file without splits or subsets: "
                f"leave out the {name} {getattr(address, name)!r} or give a Hub id."
            )
    _refuse_revision(address)
    return LocalFiles([local] if several is None else [Path(name) for name in several])


_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def _refuse_revision(address: SourceAddress) -> None:
    if address.revision is not None:
        raise UserError(f"{address.path} is on this machine and has no revision: leave out data.revision.")


def _folders_here() -> set[str]:
    return {entry.name for entry in Path().iterdir() if entry.is_dir()}


def _near(path: Path) -> str:
    """Return " (did you mean …?)" if a file has a similar name, else an empty text."""
    return close(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""


class PairReader(Iterator[PreferencePair]):
    """An iterator over the pairs of a source; `report` counts the rows while they are read."""

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
        first_bad = ""
        for location, row in self._source.rows():
            self.report.rows += 1
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
                first_bad = first_bad or f"{location}: {bad}"
                continue
            seen.add(pair.pair_id)
            self.report.pairs += 1
            self.report.ignored_fields.update(ignored)
            yield pair
        if not self.report.rows:
            raise UserError(f"{self._source.name} holds no row: check data.path.")
        if not self.report.pairs:
            raise UserError(
                f"{self._source.name} holds no usable row ({self.report.summary()}). The first: {first_bad}."
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
    columns: Mapping[str, str] | None = None,
) -> PairReader:
    """Return the pairs of local files, a folder or a Hub id, in order; see the registry for the formats.

    A pair's id is its field `pair_id` (text or integer, unique) or `<file or dataset>:<line or row number>`.
    `on_bad_row`: "error" raises at the first bad row, "skip" leaves it out and counts it in the reader's `report`.
    For the other arguments see `SourceAddress` and `RowReading`. Raises UserError, also for a source without a
    usable row and, in both modes, for a file that is damaged as a whole.
    """
    reading = RowReading(format, need_rejected, min_score_ratio, preferred_by, columns or {})
    return PairReader(open_source(SourceAddress(path, split, subset, revision)), reading, on_bad_row)
