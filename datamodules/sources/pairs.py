"""The pairs of a source: a row in any format of the registry becomes a pair, or is counted with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from app.core.errors import UserError
from datamodules.records import Message, PreferencePair, Prompt
from datamodules.sources.conversions import refuse_unusable
from datamodules.sources.files import LocalFiles
from datamodules.sources.messages import TEMPLATE_FIELDS, spoken, template_fields, with_system
from datamodules.sources.prompts import split_transcript
from datamodules.sources.registry import FORMATS, PROMPTS, Format, Row, nearest
from datamodules.sources.rows import BadRow, LeftOut, RowReport, kind, missing, text, typed
from datamodules.sources.source import OF_FORMATS, HubDataset, Source, close

OnBadRow = Literal["error", "skip"]
_OWN_FIELDS = ("pair_id", "prompt", "chosen", "rejected", "response", *TEMPLATE_FIELDS)


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


def read_row(
    row: object, default_id: str, source: Source, need_rejected: bool = False, prompts_only: bool = False
) -> tuple[PreferencePair, list[str]]:
    """Return the pair of one row in any format, and the columns and options that have no use.

    `need_rejected`: a demonstration is a bad row. `prompts_only`: rows without an answer are read too, and answers
    are ignored. Raises BadRow, or LeftOut if the settings of `source` leave the row out.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object with fields", f"found {kind(row)}")
    row = _own_names(row, source.columns or {})
    format = _format_of(row, source.format, need_rejected, prompts_only)
    fields = format.convert(row, source)
    if need_rejected and "rejected" not in fields:
        raise BadRow("missing field", f"rejected; as {format.name} it is for supervised fine-tuning; {_found(row)}")
    if "system" not in fields and "system_prompt" in fields:
        fields = {"system" if name == "system_prompt" else name: value for name, value in fields.items()}
    ignored = [name for name, value in fields.items() if name not in _OWN_FIELDS and not is_label(value)]
    if "chosen" in fields and not missing(fields.get("response")):
        ignored.append("response")
    ignored += [
        f"data.{name}, which is for {its}"
        for name, its in OF_FORMATS.items()
        if format.name != its and getattr(source, name) != getattr(Source, name)
    ]
    return _pair(fields, default_id, format.name), ignored


def _pair(row: Row, default_id: str, format: str) -> PreferencePair:
    """Return the pair of a row with the names of our fields. Raises BadRow.

    `prompt`, `chosen` and `rejected` are text or chat messages (a list, a single one, or JSON in text); `chosen`
    and `rejected` in messages may repeat the prompt. Without `prompt`: two conversations that differ only in the
    last message, or two HH transcripts (`hh`). `response`, or `chosen` without `rejected`, is a demonstration.
    `system`, `tools` and `chat_template_kwargs` go to the chat template (see `template_fields`).
    """
    first = "chosen" if "chosen" in row or "rejected" in row else "response"
    sides = (first, "rejected") if "rejected" in row else (first,)
    values = [spoken(row[side], side) for side in sides]
    given = None if missing(row.get("prompt")) else spoken(row["prompt"], "prompt")
    hh = format == "hh"
    if not hh and len({isinstance(value, str) for value in values}) > 1:
        raise BadRow("wrong type", "one of chosen and rejected is text, the other one messages")

    def split(value: str | tuple[Message, ...], side: str) -> tuple[Prompt, Message]:
        if hh and given is not None:
            raise BadRow("not an HH transcript", "there is a field prompt, too")
        if hh:
            prompt, response = split_transcript(text(value, side), side)
            return prompt, Message("assistant", response)
        if not isinstance(value, str):
            return _prompt_of(given, value, side), value[-1]
        if given is None:
            null = "prompt" in row
            raise BadRow("empty prompt", "no value") if null else BadRow("missing field", "prompt")
        return given, Message("assistant", value)

    prompts, answers = zip(*map(split, values, sides), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise BadRow("no shared prompt")
    prompt = with_system(prompts[0], row.get("system"))
    if format != "text":
        _check_prompt(prompt)
    for answer, side in zip(answers, sides, strict=True):
        if not answer.content.strip() and not answer.get("tool_calls"):
            raise BadRow(f"empty {side}")
    if answers[0] in answers[1:]:
        raise BadRow("chosen equals rejected")
    fields = [{name: answer[name] for name in answer if name not in ("role", "content")} for answer in answers]
    labels: dict[str, object] = {}
    for name, value in row.items():
        if name not in _OWN_FIELDS and is_label(value):
            value = None if missing(value) else typed(value)
            labels[text(name, "a field's name")] = text(value, name) if isinstance(value, str) else value
    both = len(sides) == 2
    return PreferencePair(
        _pair_id(row, default_id),
        prompt,
        answers[0].content,
        answers[1].content if both else None,
        labels,
        chosen_fields=fields[0],
        rejected_fields=fields[1] if both else {},
        **template_fields(row),
    )


def is_label(value: object) -> bool:
    """Return whether the value of another column is a scalar, which becomes a label of the pair."""
    return value is None or isinstance(value, (bool, int, float, str))


def _prompt_of(prompt: Prompt | None, talk: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """Return all messages before the response at the end of `talk`: those of `prompt` and those of `talk`."""
    if talk[-1].role != "assistant":
        raise BadRow("last turn is not the assistant's", name)
    before = talk[:-1]
    if prompt is None:
        return before
    given = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if not before or before[0].role == "assistant":  # `talk` continues the prompt
        return given + before
    # a system message may precede a prompt that is given as text
    start = 1 if isinstance(prompt, str) and before[0].role == "system" else 0
    if before[start : start + len(given)] != given:
        raise BadRow("no shared prompt", f"{name} does not begin with the field prompt")
    return before


def _check_prompt(prompt: str | tuple[Message, ...]) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("empty prompt")
        return
    if not prompt or not prompt[-1].content.strip():
        raise BadRow("empty prompt")
    if prompt[-1].role not in ("user", "tool"):
        raise BadRow("turns out of order", f"the prompt ends with a {prompt[-1].role} message")
    if any(message.role == "system" for message in prompt[1:]):
        raise BadRow("turns out of order", "a system message is not the first one")


def _pair_id(row: Mapping[str, object], default_id: str) -> str:
    value = row.get("pair_id", default_id)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not text(value, "pair_id").strip():
        raise BadRow("empty pair_id")
    return str(value)


def _own_names(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with the given columns under our names; a column of that name becomes `<name>_in_data`."""
    for own, theirs in columns.items():
        if theirs not in row:
            raise BadRow(
                "missing field",
                f"{theirs!r}, which data.columns names for {own}{close(theirs, row)}; {_found(row)}",
            )
    if not columns:
        return row
    own_name = {theirs: own for own, theirs in columns.items()}
    return {
        own_name.get(name, f"{name}_in_data" if name in columns else name): value for name, value in row.items()
    }


def _format_of(row: Row, named: str, need_rejected: bool, prompts_only: bool) -> Format:
    """Return the format of a row. Raises BadRow with the nearest format and the fields that the row lacks."""
    if named == "auto":
        refuse_unusable(row)
    known = (*PROMPTS, *FORMATS) if prompts_only else FORMATS
    formats = tuple(one for one in known if named in ("auto", one.name))
    if not missing(row.get("rejected")):  # a pair is no demonstration, even if it is damaged
        formats = tuple(one for one in formats if one.is_pair)
    for one in formats:
        if not one.lacking(row) and (named != "auto" or one.when(row)):
            return one
    for one in formats:  # the columns exist but are empty: reading the row names the empty one
        present = all(any(name in row for name in either.split("|")) for either in one.fields)
        if present and (named != "auto" or one.when(row)):
            return one
    asked = [one for one in formats if one.lacking(row) and (one.is_pair or not need_rejected)]
    one = nearest(row, tuple(asked) or formats)
    lacking = [name.partition("|")[0] for name in one.lacking(row)]
    yours = ", ".join(
        f"{name}: {(get_close_matches(name, map(str, row), n=1) or ['YOURS'])[0]}" for name in lacking
    )
    raise BadRow(
        "missing field",
        f"{', '.join(lacking)}; the nearest format is {one.name}: {', '.join(one.fields).replace('|', ' or ')}; "
        f"{_found(row)}" + f"; data.columns: {{{yours}}} says what yours are called" * (not prompts_only),
    )


def _found(row: Row) -> str:
    names = [str(name)[:40] for name, value in row.items()]
    empty = [str(name)[:40] for name, value in row.items() if missing(value)]
    told = ", ".join(names[:12]) + ", …" * (len(names) > 12)
    return f"columns found: {told or 'none'}" + f" (empty: {', '.join(empty[:12])})" * bool(empty)
