"""Conversions from the rows of other programs and published data sets to the fields of a pair or demonstration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from datamodules.sources.messages import spoken
from datamodules.sources.prompts import question_prompt
from datamodules.sources.rows import BadRow, LeftOut, decoded, kind, missing, text, typed

PreferredBy = Literal["better", "safer"]
Row = Mapping[str, object]
Convert = Callable[[Row, Any], Row]  # the second argument is the `Source`
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_VERDICTS = ("0", "1", "0.0", "1.0", "true", "false", "desirable", "undesirable", "chosen", "rejected")
_ANSWERS = ("completion", "output", "response")


def unchanged(row: Row, source: Any) -> Row:
    """Return the row as it is, because its fields already have the pair's names."""
    return row


def renamed(**names: str) -> Convert:
    """Return a conversion that renames fields to ours: `own="theirs"` or `own="either|other"`.

    A field that has our name already and a value becomes `<name>_in_data`.
    """

    def convert(row: Row, source: Any) -> Row:
        theirs = {first_of(row, alternatives): own for own, alternatives in names.items()}
        rest = {
            f"{name}_in_data" if name in names else name: value
            for name, value in row.items()
            if name not in theirs and not (name in names and missing(value))
        }
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
    judged = str(row.get("label")).strip().lower() in _VERDICTS
    judged = judged and any(not missing(row.get(name)) for name in (*_ANSWERS, "messages", "conversations"))
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


def field_of(row: Row, name: str) -> object:
    """Return the field `name`. Raises BadRow if the row lacks it."""
    if name not in row:
        raise BadRow("missing field", name)
    return row[name]


def number(row: Row, name: str) -> float:
    """Return the field `name`, which must be a finite number. Raises BadRow."""
    value = typed(field_of(row, name))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not a finite number")
    return value


def zero_or_one(row: Row, name: str) -> int:
    """Return the field `name`, which must be the integer 0 or 1. Raises BadRow."""
    value = typed(field_of(row, name))
    if isinstance(value, bool) or value not in (0, 1):
        raise BadRow("choice is neither 0 nor 1", f"{name} is {str(value)[:30]}")
    assert isinstance(value, (int, float))
    return int(value)


def spaced(value: object, name: str) -> str:
    """Return a response after exactly one space, which separates it from a prompt that ends with a colon."""
    return " " + text(value, name).lstrip()


def tldr_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `openai/summarize_from_feedback`, `comparisons`: two summaries of one post.

    `summaries[choice].text` is chosen. The prompt has the form that the authors gave their models (arXiv
    2009.01325): the post's subreddit, title and text, then "TL;DR:". Labels: `post_id`, `subreddit`,
    `chosen_policy`, `rejected_policy`, the fields of `extra` (`confidence`) and the other columns. Raises LeftOut
    for a news article (a part of the validation split), BadRow for a malformed row.
    """
    info = _mapping(field_of(row, "info"), "info")
    summaries = field_of(row, "summaries")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise BadRow("wrong type", "summaries is not a list of two summaries")
    best = zero_or_one(row, "choice")
    chosen, rejected = (_mapping(summaries[index], f"summaries[{index}]") for index in (best, 1 - best))
    if info.get("post") is None and info.get("article") is not None:
        raise LeftOut("summary of a news article, no TL;DR post")
    subreddit, title, post = (text(field_of(info, name), f"info.{name}") for name in ("subreddit", "title", "post"))
    if not post.strip():
        raise BadRow("empty prompt", "info.post")
    extra = row.get("extra")
    return {
        **{name: value for name, value in row.items() if name not in ("info", "summaries", "choice", "extra")},
        **(extra if isinstance(extra, Mapping) else {}),
        "post_id": info.get("id"),
        "subreddit": subreddit,
        "chosen_policy": chosen.get("policy"),
        "rejected_policy": rejected.get("policy"),
        "prompt": f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
        "chosen": spaced(field_of(chosen, "text"), "text of the chosen summary"),
        "rejected": spaced(field_of(rejected, "text"), "text of the rejected summary"),
    }


def shp_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `stanfordnlp/SHP`: a Reddit post and two comments, preferred by their scores.

    `labels` is 1 if comment A is preferred, 0 for B. The prompt is the post as a Human turn of an HH transcript.
    Labels: all other columns; those of one comment (`score_A`, …) are renamed to its side (`score_chosen`, …).
    Raises LeftOut if `score_ratio`, the preferred comment's score over the other's, is less than the source's
    `min_score_ratio`, and BadRow for a malformed row or scores that contradict `labels`.
    """
    chosen, rejected = "AB" if zero_or_one(row, "labels") == 1 else "BA"
    if number(row, f"score_{chosen}") < number(row, f"score_{rejected}"):
        raise BadRow("scores contradict the label", f"comment {chosen} is preferred and scores less")
    ratio = number(row, "score_ratio")
    pair = {
        "prompt": question_prompt(field_of(row, "history"), "history"),
        "chosen": spaced(field_of(row, f"human_ref_{chosen}"), f"human_ref_{chosen}"),
        "rejected": spaced(field_of(row, f"human_ref_{rejected}"), f"human_ref_{rejected}"),
    }
    if not ratio >= source.min_score_ratio:
        raise LeftOut(f"score_ratio below {source.min_score_ratio:g}", f"{ratio:g}")
    sides = {f"_{chosen}": "_chosen", f"_{rejected}": "_rejected"}
    used = ("history", "human_ref_A", "human_ref_B", "labels")
    labels = {name[:-2] + sides.get(name[-2:], name[-2:]): row[name] for name in row if name not in used}
    return {**labels, **pair}


def pku_saferlhf_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `PKU-Alignment/PKU-SafeRLHF`: two responses, one better and one safer.

    `source.preferred_by` selects the id of the chosen response. The prompt is the question as a Human turn of an HH
    transcript. Labels: `better_is_chosen`, `safer_is_chosen` and all other columns; those of one response are
    renamed to its side (`is_response_0_safe` to `is_chosen_safe`, …). Raises BadRow.
    """
    ids = {name: zero_or_one(row, f"{name}_response_id") for name in ("better", "safer")}
    best = ids[source.preferred_by]
    sides = {f"response_{best}": "chosen", f"response_{1 - best}": "rejected"}
    used = ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id")
    labels: dict[str, object] = {f"{name}_is_chosen": response == best for name, response in ids.items()}
    for name, value in row.items():
        if name not in used:
            for response, side in sides.items():
                name = name.replace(response, side)
            labels[name] = value
    responses = {side: spaced(field_of(row, response), response) for response, side in sides.items()}
    return {**labels, "prompt": question_prompt(field_of(row, "prompt"), "prompt"), **responses}


def ultrafeedback_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `HuggingFaceH4/ultrafeedback_binarized`: two conversations with scores.

    `chosen` and `rejected` are messages that repeat the prompt. Pairs with equal scores stay, because they are part
    of the published data. Labels: `prompt_id`, both scores and the other columns, but not `messages`, which repeats
    `chosen`. Raises BadRow, also if the rejected response has the higher score.
    """
    for side in ("chosen", "rejected"):
        if not isinstance(field_of(row, side), list):
            raise BadRow("wrong type", f"{side} is {kind(row[side])}, not a list of messages")
    field_of(row, "prompt")
    if number(row, "score_chosen") < number(row, "score_rejected"):
        raise BadRow("scores contradict the label", "score_rejected is higher than score_chosen")
    return {name: value for name, value in row.items() if name != "messages"}


def _mapping(value: object, name: str) -> Row:
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not an object with fields")
    return value
