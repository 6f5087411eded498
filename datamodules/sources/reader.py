"""Streams of preference pairs from a source; their report accounts for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from app.core.errors import UserError
from datamodules.records import PreferencePair
from datamodules.sources.files import LocalFiles
from datamodules.sources.pairs import read_row
from datamodules.sources.rows import BadRow, LeftOut, RowReport
from datamodules.sources.source import HubDataset, Source

OnBadRow = Literal["error", "skip"]


@dataclass
class PairStream(Iterable[PreferencePair]):
    """A stream of pairs as text, in a fixed order; every iteration starts at the first pair.

    `description` returns the part of the cache key that identifies the pairs, in JSON values: content hash, format,
    seed of a generator, …. `read` yields the pairs and counts the rows in the report that it is given; `report` is
    that of the last iteration. `rows` returns the number of rows if that is known before they are read.
    """

    name: str
    description: Callable[[], dict[str, object]]
    read: Callable[[RowReport], Iterable[PreferencePair]]
    rows: Callable[[], int | None] = lambda: None
    report: RowReport = field(default_factory=RowReport, init=False)

    def __iter__(self) -> Iterator[PreferencePair]:
        self.report = RowReport()
        return iter(self.read(self.report))


def _read(
    opened: LocalFiles | HubDataset,
    read: Callable[[object, str], tuple[PreferencePair, list[str]]],
    on_bad_row: OnBadRow,
    report: RowReport,
) -> Iterator[PreferencePair]:
    seen: set[str] = set()
    first_bad = ""
    for location, row in opened.rows():
        report.counts["rows"] += 1
        try:
            if isinstance(row, BadRow):
                raise row
            pair, ignored = read(row, location)
            if pair.pair_id in seen:
                raise BadRow("repeated pair_id", pair.pair_id)
        except BadRow as bad:
            if on_bad_row == "error" and not isinstance(bad, LeftOut):
                raise UserError(f"{location}: {bad}; correct the row or set data.on_bad_row: skip.") from None
            report.note(f"skipped: {bad.reason}", location)
            first_bad = first_bad or f"{location}: {bad}"
            continue
        seen.add(pair.pair_id)
        report.counts.update(["pairs", *(f"field ignored: {name}" for name in ignored)])
        yield pair
    if not report.counts["rows"]:
        raise UserError(f"{opened.name} holds no row: check data.path.")
    if not report.counts["pairs"]:
        raise UserError(f"{opened.name} holds no usable row ({report.summary()}). The first: {first_bad}.")


def read_pairs(
    path: str | Source,
    on_bad_row: OnBadRow = "error",
    *,
    need_rejected: bool = False,
    prompts_only: bool = False,
    **options: Any,
) -> PairStream:
    """Return the pairs of a source, in order, named by its label. Raises UserError if the source does not exist.

    The source is given, or its `path` and, as `options`, its other fields. A pair's id is its field `pair_id` (text
    or integer, unique) or `<file or dataset>:<line or row number>`. `on_bad_row`: "error" raises at the first bad
    row, "skip" leaves it out and counts it in the stream's `report`. Reading raises UserError for a source without
    a usable row and, in both modes, for a file that is damaged as a whole. For the other arguments see `read_row`.
    """
    source = Source(path, **options) if isinstance(path, str) else path
    opened = source.open()

    def description() -> dict[str, object]:
        return {
            "name": opened.name,  # part of the pair ids
            "content": opened.fingerprint(),
            "on_bad_row": on_bad_row,
            "need_rejected": need_rejected,
            "prompts_only": prompts_only,
            "columns": source.columns or {},
            **{name: getattr(source, name) for name in ("format", "min_score_ratio", "preferred_by")},
        }

    read = partial(read_row, source=source, need_rejected=need_rejected, prompts_only=prompts_only)
    return PairStream(source.label, description, partial(_read, opened, read, on_bad_row), opened.count)
