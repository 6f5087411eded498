"""The pairs of a source: a row in any format of the registry becomes a pair, or is counted with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import chain
from typing import Any, Literal

from app.core.errors import UserError, suggestion
from datamodules.records import (
    BadRow,
    LeftOut,
    Message,
    PreferencePair,
    Prompt,
    RowReport,
    blank,
    has_value,
    kind,
    missing,
    text,
    typed,
)
from datamodules.sources.formats import FORMATS, PROMPTS, Format, Row, refuse_unusable, rename, without
from datamodules.sources.messages import TEMPLATE_FIELDS, split_transcript, spoken, template_fields, with_system
from datamodules.sources.source import OF_FORMATS, Source

OnBadRow = Literal["error", "skip"]
_SIDES = ("chosen", "rejected")
_SCALAR = (bool, int, float, str, type(None))  # a further column of such values is a label
_OWN_FIELDS = ("pair_id", "prompt", "chosen", "rejected", "response", *TEMPLATE_FIELDS)


@dataclass
class PairStream(Iterable[PreferencePair]):
    """A stream of pairs as text, in a fixed order; every iteration starts at the first pair."""

    name: str
    description: Callable[[], dict[str, object]]  # what identifies the pairs in a cache key, in JSON values
    read: Callable[[RowReport], Iterable[PreferencePair]]  # yields the pairs and counts the rows in the report
    rows: Callable[[], int | None] = lambda: None  # their number, if it is known before they are read
    report: RowReport = field(default_factory=RowReport, init=False)  # of the last iteration

    def __iter__(self) -> Iterator[PreferencePair]:
        self.report = RowReport()
        return iter(self.read(self.report))

    def demonstrations(self) -> PairStream:
        """Return the chosen responses alone, so that no rejected one shortens a prompt or drops a pair."""
        read = self.read
        return replace(
            self,
            description=lambda: {"demonstrations": self.description()},
            read=lambda report: (replace(pair, rejected=None, rejected_fields={}) for pair in read(report)),
        )


def read_pairs(
    path: str | Source,
    on_bad_row: OnBadRow = "error",
    *,
    need_rejected: bool = False,
    prompts_only: bool = False,
    **options: Any,
) -> PairStream:
    """Return the pairs of a source (given, or by its `path` and other fields), in order, named by its label.

    A pair's id is its field `pair_id` (text or integer, unique) or `<file or dataset>:<line or row number>`.
    `on_bad_row`: "error" raises UserError at the first bad row, "skip" leaves it out and counts it in the stream's
    `report`. A source that is absent, damaged as a whole, or without a usable row is a UserError in both modes.
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

    def read(report: RowReport) -> Iterator[PreferencePair]:
        seen: set[str] = set()
        first_bad = ""
        for location, row in opened.rows():
            report.counts["rows"] += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                pair, ignored = read_row(row, location, source, need_rejected, prompts_only)
                if pair.pair_id in seen:
                    raise BadRow("repeated pair_id", pair.pair_id)
            except BadRow as bad:
                if on_bad_row == "error" and not isinstance(bad, LeftOut):
                    raise UserError(f"{location}: {bad}; correct the row or set data.on_bad_row: skip.") from None
                report.note(f"skipped: {bad.reason}", location)
                first_bad = first_bad or f"{location}: {bad}"
                continue
            seen.add(pair.pair_id)
            report.counts.update(["pairs", *(f"with no use for {name}" for name in ignored)])
            yield pair
        if not report.counts["rows"]:
            raise UserError(f"{opened.name} holds no row: check data.path.")
        if not report.counts["pairs"]:
            raise UserError(f"{opened.name} holds no usable row ({report.summary()}). The first: {first_bad}.")

    return PairStream(source.label, description, read, opened.count)


def read_row(
    row: object, default_id: str, source: Source, need_rejected: bool = False, prompts_only: bool = False
) -> tuple[PreferencePair, list[str]]:
    """Return the pair of one row, and the columns and options that have no use. Raises BadRow or LeftOut.

    `need_rejected`: a demonstration is a bad row. `prompts_only`: rows need no answer, and answers are ignored.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object with fields", f"found {kind(row)}")
    columns = source.columns or {}
    for own, theirs in columns.items():
        if theirs not in row:
            named = f"{theirs!r}, which data.columns names for {own}; {_found(row)}"
            raise BadRow("missing field", f"{named}.{suggestion(theirs, list(map(str, row)))}")
    row = rename(row, {theirs: own for own, theirs in columns.items()}) if columns else row
    format = _format_of(row, source.format, need_rejected, prompts_only)
    fields = format.convert(row, source)
    if "response" in fields and not has_value(fields, *_SIDES):  # the columns of a pair may be there and empty
        fields = without(fields, *_SIDES)
    if need_rejected and "rejected" not in fields:
        cure = "data.columns: {rejected: YOURS} says what yours is called"
        told = f"rejected; as {format.name} it is for supervised fine-tuning; {_found(row)}; {cure}"
        raise BadRow("missing field", told)
    if "system" not in fields and "system_prompt" in fields:
        fields = rename(fields, {"system_prompt": "system"})
    ignored = [name for name, value in fields.items() if name not in _OWN_FIELDS and not isinstance(value, _SCALAR)]
    if "chosen" in fields and has_value(fields, "response"):
        ignored.append("response")
    ignored += [
        f"data.{name}, which is for {its}"
        for name, its in OF_FORMATS.items()
        if format.name != its and getattr(source, name) != getattr(Source, name)
    ]
    return _pair(fields, default_id, format.name), ignored


def _pair(row: Row, default_id: str, format: str) -> PreferencePair:
    """Return the pair of a row with the names of our fields. Raises BadRow.

    `prompt` and the sides are text or chat messages, which may repeat the prompt. Without `prompt`, the sides are
    whole conversations or, in `hh`, transcripts. `response`, or `chosen` without `rejected`, is a demonstration.
    """
    both = "rejected" in row
    sides = ("chosen" if both or "chosen" in row else "response", *["rejected"] * both)
    values = [spoken(row[side], side) for side in sides]
    given = spoken(row["prompt"], "prompt") if has_value(row, "prompt") else None
    found: list[tuple[Prompt, str | Message]]
    if format == "hh":
        if given is not None:
            raise BadRow("not an HH transcript", "there is a field prompt, too")
        found = [split_transcript(text(value, side), side) for value, side in zip(values, sides, strict=True)]
    else:
        if len({isinstance(value, str) for value in values}) > 1:
            raise BadRow("wrong type", "one of chosen and rejected is text, the other one messages")
        if given is None and isinstance(values[0], str):
            raise BadRow("empty prompt", "no value") if "prompt" in row else BadRow("missing field", "prompt")
        found = [_split(value, side, given) for value, side in zip(values, sides, strict=True)]
    if any(prompt != found[0][0] for prompt, _ in found):
        raise BadRow("no shared prompt")
    prompt = with_system(found[0][0], row.get("system"))
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if format != "text" and (not turns or blank(turns[-1].content)):
        raise BadRow("empty prompt")
    if format != "text" and turns[-1].role not in ("user", "tool"):
        raise BadRow("turns out of order", f"the prompt ends with a message of role {turns[-1].role}")
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("turns out of order", "a system message is not the first one")
    answers = [Message("assistant", answer) if isinstance(answer, str) else answer for _, answer in found]
    for answer, side in zip(answers, sides, strict=True):
        if blank(answer.content) and not answer.get("tool_calls"):
            raise BadRow(f"empty {side}")
    if answers[0] in answers[1:]:
        raise BadRow("chosen equals rejected")
    labels: dict[str, object] = {}
    for name, value in row.items():
        if name not in _OWN_FIELDS and isinstance(value, _SCALAR):
            value = None if missing(value) else typed(value)
            labels[text(name, "a field's name")] = text(value, name) if isinstance(value, str) else value
    pair_id = row.get("pair_id", default_id)
    pair_id = str(pair_id) if type(pair_id) is int else text(pair_id, "pair_id")
    if not pair_id.strip():
        raise BadRow("empty pair_id")
    return PreferencePair(
        pair_id,
        prompt,
        answers[0].content,
        answers[1].content if both else None,
        labels,
        chosen_fields=without(answers[0], "role", "content"),
        rejected_fields=without(answers[1], "role", "content") if both else {},
        **template_fields(row),
    )


def _split(talk: str | tuple[Message, ...], side: str, given: Prompt | None) -> tuple[Prompt, str | Message]:
    """Return the prompt and the answer of one side: all messages before the last, and the field `prompt`."""
    if isinstance(talk, str):
        assert given is not None
        return given, talk
    before, answer = talk[:-1], talk[-1]
    if answer.role != "assistant":
        raise BadRow("last turn is not the assistant's", side)
    if given is None:
        return before, answer
    turns = (Message("user", given),) if isinstance(given, str) else given
    if not before or before[0].role == "assistant":  # the side continues the prompt
        return turns + before, answer
    # a system message may precede a prompt that is given as text
    start = 1 if isinstance(given, str) and before[0].role == "system" else 0
    if before[start : start + len(turns)] != turns:
        raise BadRow("no shared prompt", f"{side} does not begin with the field prompt")
    return before, answer


def _format_of(row: Row, named: str, need_rejected: bool, prompts_only: bool) -> Format:
    """Return the format of a row. Raises BadRow with the nearest format and the fields that the row lacks."""
    if named == "auto":
        refuse_unusable(row, prompts_only)
    formats = [*PROMPTS, *FORMATS] if prompts_only else [*FORMATS]
    formats = [one for one in formats if named in ("auto", one.name)]
    if has_value(row, "rejected"):  # a pair is no demonstration, even if it is damaged
        formats = [one for one in formats if one.is_pair]
        if not formats:
            raise BadRow("two answers", f"rejected has a value, and {named} is a format of single answers")
    complete = (one for one in formats if not one.lacking(row))
    # the columns exist but are empty: reading the row names the empty one
    present = (one for one in formats if not any(row.keys().isdisjoint(name.split("|")) for name in one.fields))
    for one in chain(complete, present):
        if named != "auto" or one.applies(row):
            return one
    asked = [one for one in formats if one.lacking(row) and (one.is_pair or not need_rejected)]
    one = max(asked or formats, key=lambda one: one.nearness(row))
    lacking = [name.partition("|")[0] for name in one.lacking(row)]
    known = f"the nearest format is {one.name}: {', '.join(one.fields).replace('|', ' or ')}"
    near = {name: (get_close_matches(name, map(str, row), n=1) or ["YOURS"])[0] for name in lacking}
    alike = Counter(near.values())
    yours = [f"{name}: {found if alike[found] == 1 else 'YOURS'}" for name, found in near.items()]
    cure = "" if prompts_only else f"; data.columns: {{{', '.join(yours)}}} says what yours are called"
    raise BadRow("missing field", f"{', '.join(lacking)}; {known}; {_found(row)}{cure}")


def _found(row: Row) -> str:
    names = [str(name)[:40] for name in row]
    empty = [str(name)[:40] for name in row if not has_value(row, name)]
    told = ", ".join(names[:12]) + ", …" * (len(names) > 12)
    return f"columns found: {told or 'none'}" + f" (empty: {', '.join(empty[:12])})" * bool(empty)
