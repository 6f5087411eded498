"""Conversions from the rows of other programs and published data sets to the fields of a pair or demonstration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from app.method.ranges import is_finite
from datamodules.sources.messages import question_prompt, spoken
from datamodules.sources.rows import BadRow, LeftOut, decoded, has_value, missing, text, typed, wrong_type

PreferredBy = Literal["better", "safer"]
Row = Mapping[str, object]
Convert = Callable[[Row, Any], Row]  # the second argument is the `Source`
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_VERDICTS = ("0", "1", "0.0", "1.0", "true", "false", "desirable", "undesirable", "chosen", "rejected")
_ANSWERS = ("completion", "output", "response", "messages", "conversations")


def rename(row: Row, own_names: Mapping[str, str]) -> Row:
    """Return the row with the columns `own_names` (theirs → ours) under our names.

    A further column that has our name and a value becomes `<name>_in_data`.
    """
    own = set(own_names.values())
    rest = {
        f"{name}_in_data" if name in own else name: value
        for name, value in without(row, *own_names).items()
        if name not in own or not missing(value)
    }
    return {**rest, **{name: row[theirs] for theirs, name in own_names.items()}}


def renamed(**names: str) -> Convert:
    """Return a conversion that renames fields to ours: `own="theirs"` or `own="either|other"`."""
    return lambda row, source: rename(row, {first_of(row, either): own for own, either in names.items()})


def first_of(row: Row, alternatives: str) -> str:
    """Return the first of several names (`a|b`) under which the row has a value, else the first that it has."""
    present = [name for name in alternatives.split("|") if name in row]
    return next((name for name in present if has_value(row, name)), present[0] if present else alternatives)


def without(row: Row, *names: str) -> dict[str, object]:
    """Return the row without some of its fields."""
    return {name: value for name, value in row.items() if name not in names}


def conversation(row: Row, source: Any) -> Row:
    """Return the fields of a row with one answer or two whose `messages` or `conversations` hold the dialogue.

    If the sides are whole conversations themselves, as in UltraFeedback, the row stays as it is.
    """
    name = first_of(row, "messages|conversations")
    if not has_value(row, "chosen", "rejected"):
        return rename(row, {name: "response"})
    chosen = spoken(row["chosen"], "chosen")
    whole = not isinstance(chosen, str) and chosen[0].role != "assistant"
    return row if whole else rename(row, {name: "prompt"})


def alpaca(row: Row, source: Any) -> Row:
    """Return the fields of a row whose prompt is `instruction` and `input` after the turns of `history`.

    `output` may be a list of two answers with the better one first, as in older files. Raises BadRow.
    """
    instruction = first_of(row, "instruction|INSTRUCTION")
    prompt = text(row[instruction], instruction)
    if has_value(row, "input") and text(row["input"], "input").strip():
        prompt += f"\n{row['input']}"
    fields = without(row, instruction, "input", "history")
    fields["prompt"] = _with_history(row.get("history"), prompt)
    if not has_value(row, "chosen", "rejected"):
        answer = first_of(row, "output|response|RESPONSE")
        sides = row[answer]
        fields = without(fields, answer)
        if isinstance(sides, list) and len(sides) == 2:
            fields["chosen"], fields["rejected"] = sides
        else:
            fields["response"] = sides
    return fields


def _with_history(history: object, prompt: str) -> object:
    if isinstance(history, str) and history.strip():
        history = decoded(history, "history")
    if missing(history) or not history:
        return prompt
    turns: list[Any] = history if isinstance(history, list) else [None]
    if any(not isinstance(turn, list | tuple) or len(turn) != 2 for turn in turns):
        raise wrong_type(history, "history", "a list of pairs of question and answer")
    said = [text for turn in turns for text in turn]
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate([*said, prompt])]


def asked(own: Convert) -> Convert:
    """Return a conversion for rows that need no answer: any that there is gives way to one without meaning."""
    return lambda row, source: own({**without(row, "chosen", "rejected"), "response": "?"}, source)


def question(own: Convert) -> Convert:
    """Return a conversion for rows with a question; a row with a passage or choices beside it is a BadRow."""

    def convert(row: Row, source: Any) -> Row:
        for name in ("context", "article", "choices"):
            if has_value(row, name):
                raise BadRow("two fields make the prompt", f"{name} and question: write them as one field prompt")
        return own(row, source)

    return convert


_KTO = "an answer with {}, as for KTO; two answers to one prompt make a pair, chosen and rejected"
_OTHER_TASKS = {  # fields → reason and detail
    ("kto_tag",): ("unpaired preference", _KTO.format("kto_tag")),
    ("completions", "labels"): ("stepwise supervision", "labels of single steps; write chosen and rejected"),
    ("input_ids",): ("tokens, not text", "input_ids; give the text"),
    ("prompt", "answers"): ("ranked answers", "answers; write the two that you mean as chosen and rejected"),
}


def refuse_unusable(row: Row) -> None:
    """Raise BadRow for a row of a known form that is for another task or holds more than text."""
    for name in _MEDIA:
        if has_value(row, name) and row[name] not in ("", []):
            raise BadRow("more than text", f"a field {name}; only text is trained on")
    if has_value(row, "chosen"):
        return
    if has_value(row, *_ANSWERS) and str(row.get("label")).strip().lower() in _VERDICTS:
        raise BadRow("unpaired preference", _KTO.format("label"))
    for fields, reason in _OTHER_TASKS.items():
        if all(has_value(row, name) for name in fields):
            raise BadRow(*reason)


def number(row: Row, name: str) -> float:
    """Return the field `name`, which must be a finite number. Raises BadRow."""
    value = typed(row[name])
    if not is_finite(value):
        raise wrong_type(value, name, "a finite number")
    return value


def zero_or_one(row: Row, name: str) -> int:
    """Return the field `name`, which must be the integer 0 or 1. Raises BadRow."""
    value = typed(row[name])
    if isinstance(value, bool) or value not in (0, 1):
        raise BadRow("choice is neither 0 nor 1", f"{name} is {str(value)[:30]}")
    return int(value == 1)


def spaced(value: object, name: str) -> str:
    """Return a response after exactly one space, which separates it from a prompt that ends with a colon."""
    return " " + text(value, name).lstrip()


def tldr_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `openai/summarize_from_feedback`, `comparisons`: two summaries of one post.

    `summaries[choice].text` is chosen. The prompt has the form that the authors gave their models (arXiv
    2009.01325). Labels: those below, the fields of `extra` (`confidence`) and the other columns. Raises LeftOut for
    a news article (a part of the validation split), BadRow for a malformed row.
    """
    summaries, best = row["summaries"], zero_or_one(row, "choice")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise wrong_type(summaries, "summaries", "a list of two summaries")
    parts = {"info": row["info"], "chosen summary": summaries[best], "rejected summary": summaries[1 - best]}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise wrong_type(part, name, "an object with fields")
    info, chosen, rejected = parts.values()
    if info.get("post") is None and info.get("article") is not None:
        raise LeftOut("summary of a news article, no TL;DR post")
    subreddit, title, post = (text(info.get(name), f"info.{name}") for name in ("subreddit", "title", "post"))
    if not post.strip():
        raise BadRow("empty prompt", "info.post")
    extra = row.get("extra")
    return {
        **without(row, "info", "summaries", "choice", "extra"),
        **(extra if isinstance(extra, Mapping) else {}),
        "post_id": info.get("id"),
        "subreddit": subreddit,
        "chosen_policy": chosen.get("policy"),
        "rejected_policy": rejected.get("policy"),
        "prompt": f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
        "chosen": spaced(chosen.get("text"), "text of the chosen summary"),
        "rejected": spaced(rejected.get("text"), "text of the rejected summary"),
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
        "prompt": question_prompt(row["history"], "history"),
        "chosen": spaced(row[f"human_ref_{chosen}"], f"human_ref_{chosen}"),
        "rejected": spaced(row[f"human_ref_{rejected}"], f"human_ref_{rejected}"),
    }
    if ratio < source.min_score_ratio:
        raise LeftOut(f"score_ratio below {source.min_score_ratio:g}", f"{ratio:g}")
    sides = {f"_{chosen}": "_chosen", f"_{rejected}": "_rejected"}
    labels = without(row, "history", "human_ref_A", "human_ref_B", "labels")
    return {**{name[:-2] + sides.get(name[-2:], name[-2:]): value for name, value in labels.items()}, **pair}


def pku_saferlhf_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `PKU-Alignment/PKU-SafeRLHF`: two responses, one better and one safer.

    `source.preferred_by` selects the id of the chosen response. The prompt is the question as a Human turn of an HH
    transcript. Labels: `better_is_chosen`, `safer_is_chosen` and all other columns; those of one response are
    renamed to its side (`is_response_0_safe` to `is_chosen_safe`, …). Raises BadRow.
    """
    ids = {name: zero_or_one(row, f"{name}_response_id") for name in ("better", "safer")}
    best = ids[source.preferred_by]
    chosen, rejected = f"response_{best}", f"response_{1 - best}"
    labels = without(row, "prompt", chosen, rejected, "better_response_id", "safer_response_id")
    return {
        **{f"{name}_is_chosen": response == best for name, response in ids.items()},
        **{name.replace(chosen, "chosen").replace(rejected, "rejected"): labels[name] for name in labels},
        "prompt": question_prompt(row["prompt"], "prompt"),
        "chosen": spaced(row[chosen], chosen),
        "rejected": spaced(row[rejected], rejected),
    }


def ultrafeedback_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `HuggingFaceH4/ultrafeedback_binarized`: two conversations with scores.

    `chosen` and `rejected` are messages that repeat the prompt; so does `messages`, which is left out. Pairs with
    equal scores stay, because they are part of the published data. Raises BadRow, also if the rejected response has
    the higher score.
    """
    for side in ("chosen", "rejected"):
        if not isinstance(row[side], list):
            raise wrong_type(row[side], side, "a list of messages")
    if number(row, "score_chosen") < number(row, "score_rejected"):
        raise BadRow("scores contradict the label", "score_rejected is higher than score_chosen")
    return without(row, "messages")
