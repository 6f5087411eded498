"""Conversions from the row formats of other programs to the fields of a pair: `prompt`, `chosen`, `rejected`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datamodules.sources.messages import spoken
from datamodules.sources.published import Row
from datamodules.sources.rows import BadRow, decoded, kind, missing, text, typed

Convert = Callable[[Row, Any], Row]  # the second argument is the `Source`
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ANSWERS = ("completion", "output", "response")


def unchanged(row: Row, source: Any = None) -> Row:
    """Return the row as it is, because its fields already have the pair's names."""
    return row


def renamed(**names: str) -> Convert:
    """Return a conversion that renames fields to ours: `own="theirs"` or `own="either|other"`."""

    def convert(row: Row, source: Any) -> Row:
        theirs = {first_of(row, alternatives): own for own, alternatives in names.items()}
        rest = {name: value for name, value in row.items() if name not in theirs and name not in names}
        return {**rest, **{own: row[name] for name, own in theirs.items()}}

    return convert


def first_of(row: Row, alternatives: str) -> str:
    """Return the first of several names (`a|b`) under which the row has a value, or the first name if none has."""
    names = alternatives.split("|")
    return next((name for name in names if not missing(row.get(name))), names[0])


def conversation(row: Row, source: Any) -> Row:
    """Return the fields of a row with one answer or two whose `messages` or `conversations` hold the dialogue.

    If the sides are whole conversations themselves, as in UltraFeedback, the row stays as it is.
    """
    name = first_of(row, "messages|conversations")
    if missing(row.get("chosen")) and missing(row.get("rejected")):
        return renamed(response=name)({key: row[key] for key in row if key not in ("chosen", "rejected")}, source)
    chosen = spoken(row["chosen"], "chosen")
    if isinstance(chosen, str):  # the answer is text, but the prompt is messages
        return renamed(prompt=name)(row, source)
    return row if chosen[0].role != "assistant" else renamed(prompt=name)(row, source)


def alpaca(row: Row, source: Any) -> Row:
    """Return the fields of a row in the Alpaca format.

    The prompt is `instruction` and `input`, joined by a line break, after the turns of `history`. `output` may be a
    list of two answers with the better one first, as in older files. Raises BadRow.
    """
    instruction = first_of(row, "instruction|INSTRUCTION")
    prompt = text(row[instruction], instruction)
    if not missing(row.get("input")) and text(row["input"], "input").strip():
        prompt += f"\n{row['input']}"
    used = {instruction, "input", "history", "prompt"}
    fields: dict[str, object] = {"prompt": _with_history(row.get("history"), prompt)}
    if missing(row.get("chosen")) and missing(row.get("rejected")):
        answer = first_of(row, "output|response|RESPONSE")
        used |= {answer, "chosen", "rejected"}
        sides = row[answer]
        if isinstance(sides, list) and len(sides) == 2:
            fields |= {"chosen": sides[0], "rejected": sides[1]}
        else:
            fields["response"] = sides
    return {**{name: value for name, value in row.items() if name not in used}, **fields}


def _with_history(history: object, prompt: str) -> object:
    if isinstance(history, str) and history.strip():
        try:
            history = decoded(history)
        except ValueError as error:
            raise BadRow("bad JSON", "history") from error
    if missing(history) or not history:
        return prompt
    if not isinstance(history, list) or any(
        not isinstance(turn, list | tuple) or len(turn) != 2 for turn in history
    ):
        raise BadRow("wrong type", f"history is {kind(history)}, not a list of pairs of question and answer")
    turns = [(role, said) for turn in history for role, said in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": said} for role, said in [*turns, ("user", prompt)]]


def asked(own: Convert) -> Convert:
    """Return a conversion for rows that need no answer: any that there is gives way to one without meaning."""

    def convert(row: Row, source: Any) -> Row:
        rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        return own({**rest, "response": "?"}, source)

    return convert


def question(own: Convert) -> Convert:
    """Return a conversion for rows with a question; a row with a passage or choices beside it is a BadRow."""

    def convert(row: Row, source: Any) -> Row:
        for name in ("context", "article", "choices"):
            if not missing(row.get(name)):
                raise BadRow("two fields make the prompt", f"{name} and question: write them as one field prompt")
        return own(row, source)

    return convert


def refuse_unusable(row: Row) -> None:
    """Raise BadRow for a row of a known form that is for another task or holds more than text."""
    for name in _MEDIA:
        if not missing(row.get(name)) and row[name] not in ("", []):
            raise BadRow("more than text", f"a field {name}; only text is trained on")
    if "chosen" in row and not missing(row["chosen"]):
        return
    label = typed(row.get("label"))
    judged = any(not missing(row.get(name)) for name in _ANSWERS) and (label in (0, 1, "True", "False"))
    if judged or not missing(row.get("kto_tag")):
        raise BadRow(
            "unpaired preference",
            f"an answer with {'label' if judged else 'kto_tag'}, as for KTO; "
            "two answers to one prompt make a pair, chosen and rejected",
        )
    for fields, reason in _OTHER_TASKS.items():
        if all(not missing(row.get(name)) for name in fields):
            raise BadRow(*reason)


_OTHER_TASKS = {
    ("completions", "labels"): ("stepwise supervision", "labels of single steps; write chosen and rejected"),
    ("input_ids",): ("tokens, not text", "input_ids; give the text"),
    ("prompt", "answers"): ("ranked answers", "answers; write the two that you mean as chosen and rejected"),
}
