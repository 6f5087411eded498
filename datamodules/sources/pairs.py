"""Conversion of a row in any format of the registry to a preference pair, or the reason against it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from datamodules.records import Message, PreferencePair, Prompt
from datamodules.sources.conversions import refuse_unusable
from datamodules.sources.messages import TEMPLATE_FIELDS, spoken, template_fields, with_system
from datamodules.sources.prompts import split_transcript
from datamodules.sources.registry import FORMATS, PROMPTS, Format, Row, nearest
from datamodules.sources.rows import BadRow, kind, missing, text, typed
from datamodules.sources.source import Source, close

_OWN_FIELDS = ("pair_id", "prompt", "chosen", "rejected", "response", *TEMPLATE_FIELDS)


def read_row(
    row: object, default_id: str, source: Source, need_rejected: bool = False, prompts_only: bool = False
) -> tuple[PreferencePair, list[str]]:
    """Return the pair of one row in any format, and the columns that cannot be labels.

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
    answers: list[Message] = []
    texts = [value for value in values if isinstance(value, str)]

    hh = format == "hh"
    if hh and given is not None:
        raise BadRow("not an HH transcript", "there is a field prompt, too")
    if hh:
        split = [split_transcript(text(value, side), side) for value, side in zip(values, sides, strict=True)]
        prompts: list[Prompt] = [prompt for prompt, _ in split]
        responses = [response for _, response in split]
    elif not texts:
        talks = [value for value in values if not isinstance(value, str)]
        prompts = [_prompt_of(given, talk, side) for talk, side in zip(talks, sides, strict=True)]
        answers = [talk[-1] for talk in talks]
        responses = [answer.content for answer in answers]
    elif len(texts) < len(values):
        raise BadRow("wrong type", "one of chosen and rejected is text, the other one messages")
    elif given is None:
        raise (
            BadRow("wrong type", "prompt is null, not text")
            if "prompt" in row
            else BadRow("missing field", "prompt")
        )
    else:
        prompts, responses = [given], texts

    if any(prompt != prompts[0] for prompt in prompts):
        raise BadRow("no shared prompt")
    prompt = with_system(prompts[0], row.get("system"))
    if format != "text":
        _check_prompt(prompt)
    more = [{name: answer[name] for name in answer if name not in ("role", "content")} for answer in answers]
    more = more or [{} for _ in sides]
    for response, fields, side in zip(responses, more, sides, strict=True):
        if not response.strip() and not fields.get("tool_calls"):
            raise BadRow(f"empty {side}")
    if responses[0] in responses[1:] and more[0] in more[1:]:
        raise BadRow("chosen equals rejected")
    labels: dict[str, object] = {}
    for name, value in row.items():
        if name not in _OWN_FIELDS and is_label(value):
            value = None if missing(value) else typed(value)
            labels[text(name, "a field's name")] = text(value, name) if isinstance(value, str) else value
    both = len(sides) == 2
    return PreferencePair(
        _pair_id(row, default_id),
        prompt,
        responses[0],
        responses[1] if both else None,
        labels,
        chosen_fields=more[0],
        rejected_fields=more[1] if both else {},
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
