"""The formats of rows: `data.format` names one. Each has an example row and converts its fields to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from app.method.ranges import is_finite
from datamodules.records import BadRow, LeftOut, decoded, has_value, missing, text, typed, wrong_type
from datamodules.sources.messages import ASSISTANT, question_prompt, refuse_media, spoken

PreferredBy = Literal["better", "safer"]
Row = Mapping[str, object]
Convert = Callable[[Row, Any], Row]  # the second argument is the `Source`
_SIDES = ("chosen", "rejected")
_VERDICTS = "0 1 -1 0.0 1.0 -1.0 true false desirable undesirable chosen rejected good bad"
_VERDICT = ("kto_tag", "kto_label", "desirable", "is_desirable")  # columns that hold nothing else
_ANSWERS = ("completion", "output", "response", "messages", "conversations")


def rename(row: Row, own_names: Mapping[str, str]) -> Row:
    """Return the row with `own_names` (theirs → ours) renamed; a further column of our name gets `_in_data`."""
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
    """Return the fields of a row with the dialogue, or with the prompt, in `messages` or `conversations`."""
    name = first_of(row, "messages|conversations")
    if not has_value(row, *_SIDES):
        return rename(row, {name: "response"})
    chosen = spoken(row["chosen"], "chosen")
    whole = not isinstance(chosen, str) and chosen[0].role != "assistant"  # as in UltraFeedback
    return row if whole else rename(row, {name: "prompt"})


def alpaca(row: Row, source: Any) -> Row:
    """Return the fields of a row whose prompt is `instruction` and `input` after the turns of `history`."""
    instruction = first_of(row, "instruction|INSTRUCTION")
    prompt = text(row[instruction], instruction)
    if has_value(row, "input") and text(row["input"], "input").strip():
        prompt += f"\n{row['input']}"
    fields = without(row, instruction, "input", "history")
    fields["prompt"] = _with_history(row.get("history"), prompt)
    if not has_value(row, *_SIDES):
        answer = first_of(row, "output|response|RESPONSE")
        sides = row[answer]
        fields = without(fields, answer)
        if isinstance(sides, list) and len(sides) == 2:  # as in older files, the better one first
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
    return lambda row, source: own({**without(row, *_SIDES), "response": "?"}, source)


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
    ("completions", "labels"): ("stepwise supervision", "labels of single steps; write chosen and rejected"),
    ("input_ids",): ("tokens, not text", "input_ids; give the text"),
    ("prompt", "answers"): ("ranked answers", "answers; write the two that you mean as chosen and rejected"),
}


def refuse_unusable(row: Row, prompts_only: bool) -> None:
    """Raise BadRow for a row of a known form that is for another task or holds more than text."""
    refuse_media(row)
    if prompts_only or has_value(row, "chosen"):
        return
    if has_value(row, *_ANSWERS) and str(row.get("label")).strip().lower() in _VERDICTS.split():
        raise BadRow("unpaired preference", _KTO.format("label"))
    for name in _VERDICT:
        if has_value(row, name):
            raise BadRow("unpaired preference", _KTO.format(name))
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

    The prompt has the form that the authors gave their models (arXiv 2009.01325). Raises LeftOut for a news article
    (a part of the validation split).
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

    `labels` is 1 if comment A is preferred, 0 for B. The columns of a comment (`score_A`, …) get the name of its
    side (`score_chosen`, …). Raises LeftOut if the preferred comment has too small a multiple of the other's score.
    """
    chosen, rejected = "AB" if zero_or_one(row, "labels") == 1 else "BA"
    if number(row, f"score_{chosen}") < number(row, f"score_{rejected}"):
        raise BadRow("scores contradict the label", f"comment {chosen} is preferred and scores less")
    pair = {
        "prompt": question_prompt(row["history"], "history"),
        "chosen": spaced(row[f"human_ref_{chosen}"], f"human_ref_{chosen}"),
        "rejected": spaced(row[f"human_ref_{rejected}"], f"human_ref_{rejected}"),
    }
    if (ratio := number(row, "score_ratio")) < source.min_score_ratio:
        raise LeftOut(f"score_ratio below {source.min_score_ratio:g}", f"{ratio:g}")
    sides = {f"_{chosen}": "_chosen", f"_{rejected}": "_rejected"}
    labels = without(row, "history", "human_ref_A", "human_ref_B", "labels")
    return {**{name[:-2] + sides.get(name[-2:], name[-2:]): value for name, value in labels.items()}, **pair}


def pku_saferlhf_pair(row: Row, source: Any) -> Row:
    """Return the fields of a row of `PKU-Alignment/PKU-SafeRLHF`: two responses, one better and one safer.

    The columns of a response are renamed to its side (`is_response_0_safe` to `is_chosen_safe`, …).
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

    `messages` repeats the chosen one. Pairs with equal scores stay, because they are part of the published data.
    """
    for side in _SIDES:
        if not isinstance(row[side], list):
            raise wrong_type(row[side], side, "a list of messages")
    if number(row, "score_chosen") < number(row, "score_rejected"):
        raise BadRow("scores contradict the label", "score_rejected is higher than score_chosen")
    return without(row, "messages")


@dataclass(frozen=True, eq=False)
class Format:
    """One format of rows.

    `named_by`: the programs or datasets that use it. `row`: an example; a row of the format has a value in each of
    its fields, `a|b` in one of them, and may have one in `a?`. `convert` returns the fields of a pair. Without
    `data.format`, this format applies only to rows without the column `unless` for which `when` is true.
    """

    name: str
    named_by: str
    row: Row
    convert: Convert = lambda row, source: row
    unless: str = ""
    when: Callable[[Row], bool] = lambda row: True

    @cached_property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for name in self.row if not name.endswith("?"))

    @property
    def example(self) -> Row:
        return {name.rstrip("?").partition("|")[0]: value for name, value in self.row.items()}

    @property
    def is_pair(self) -> bool:
        """Return whether its rows have two answers, as preference optimisation needs."""
        return len(self.fields) > 2 or "rejected" in self.fields

    def applies(self, row: Row) -> bool:
        return not (self.unless and self.unless in row) and self.when(row)

    def lacking(self, row: Row) -> list[str]:
        """Return the needed fields that have no value in a row."""
        lacking = [name for name in self.fields if not has_value(row, *name.split("|"))]
        if has_value(row, *_SIDES):  # a row with one null side is a damaged pair, not a demonstration
            lacking = [name for name in lacking if name not in _SIDES or name not in row]
        return lacking

    def nearness(self, row: Row) -> int:
        """Return what is largest for the format that is nearest to a row: the fields held less those lacking."""
        held = len(self.fields) - (lacking := len(self.lacking(row)))
        return held - lacking if held else -99


_TURN = {"role": "user", "content": "2 + 2?"}
_YES, _NO = ({"role": "assistant", "content": answer} for answer in ("4", "5"))
_HUMAN = {"from": "human", "value": "2 + 2?"}
_GPT, _GPT_NO = ({"from": "gpt", "value": said} for said in ("4", "5"))
_TALK = "\n\nHuman: 2 + 2?\n\nAssistant:"
_PAIR: Row = {"chosen": "4", "rejected": "5"}
_WHOLE: Row = {"chosen": [_TURN, _YES], "rejected": [_TURN, _NO]}
_DIALOGUE: Row = {"messages|conversations": [_TURN], "chosen": _YES, "rejected": _NO}
_SHAREGPT: Row = {"conversations|messages": [_HUMAN], "chosen": _GPT, "rejected": _GPT_NO}
_HH: Row = {"chosen": f"{_TALK} 4", "rejected": f"{_TALK} 5"}
_ADD: Row = {"instruction|INSTRUCTION": "Add.", "input?": "2 + 2"}  # every `alpaca` row may have `history`, too
_ARGILLA: Row = {"instruction|prompt": "2 + 2?", "chosen_response": "4", "rejected_response": "5"}
_INTEL: Row = {"system?": "Be brief.", "question|input": "2 + 2?", **_PAIR}
_QA: Row = {"question": "2 + 2?", "answer|response": "4"}
_METHARME: Row = {"prompt": "2 + 2?", "completion|response|generation": "4"}
_POST: Row = {"id": "t3", "subreddit": "cats", "title": "Cat", "post": "My cat sleeps."}
_TLDR: Row = {"info": _POST, "summaries": [{"text": " It sleeps."}, {"text": " It barks."}], "choice": 0}
_SCORES: Row = {"score_A": 9, "score_B": 3, "score_ratio": 3.0}
_SHP: Row = {"history": "2 + 2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1, **_SCORES}
_IDS: Row = {"better_response_id": 0, "safer_response_id": 0}

_completed = renamed(response="completion|response|generation")
_asked = question(renamed(prompt="question|input"))
_answered = question(renamed(prompt="question", response="answer|response"))
_argilla = renamed(prompt="instruction|prompt", chosen="chosen_response", rejected="rejected_response")


def _transcript(row: Row) -> bool:
    return any(ASSISTANT in str(row.get(side)) for side in _SIDES)


# a row has the first of these formats whose fields it has
FORMATS = (
    Format("pairs", "TRL, axolotl", {"prompt": "2 + 2?", **_PAIR}),
    Format("pairs", "TRL", {"prompt": [_TURN], "chosen": [_YES], "rejected": [_NO]}),
    Format("messages", "axolotl (`chat_template.default`)", _DIALOGUE, conversation),
    Format("messages", "LLaMA-Factory (ShareGPT)", _SHAREGPT, conversation),
    Format("alpaca", "LLaMA-Factory", {**_ADD, **_PAIR}, alpaca),
    Format("alpaca", "axolotl (`chatml.argilla`)", _ARGILLA, _argilla),
    Format("question", "axolotl (`chatml.intel`, `chatml.icr`)", _INTEL, _asked),
    Format(
        "pairs",
        "TRL (implicit prompt)",
        _WHOLE,
        when=lambda row: not isinstance(spoken(row["chosen"], "chosen"), str),
    ),
    Format("hh", "`Anthropic/hh-rlhf`; `data.subset` takes one of its four subsets", _HH, when=_transcript),
    Format("messages", "TRL, LLaMA-Factory", {"messages|conversations": [_TURN, _YES]}, conversation),
    Format("messages", "LLaMA-Factory (ShareGPT)", {"conversations|messages": [_HUMAN, _GPT]}, conversation),
    Format("pairs", "TRL, axolotl (`metharme`)", _METHARME, _completed),
    Format("pairs", "the chosen side of a pair", {"prompt": "2 + 2?", "chosen": "4"}, unless="rejected"),
    Format("alpaca", "LLaMA-Factory, axolotl", {**_ADD, "output|response|RESPONSE": "4"}, alpaca),
    Format("question", "axolotl (`alpaca_chat.load_qa`)", _QA, _answered),
    Format("hh", "the chosen side of HH", {"chosen": f"{_TALK} 4"}, unless="rejected", when=_transcript),
    Format(
        "text",
        "plain text to learn whole, with no prompt; the lines of a .txt file are such rows",
        {"text": "2 + 2 is 4."},
        lambda row, source: {**rename(row, {"text": "response"}), "prompt": ""},
        when=lambda row: not has_value(row, "prompt"),  # else the prompt would be lost
    ),
    # with `chosen`, somebody has converted the published form of these three
    Format("tldr", "`openai/summarize_from_feedback`, `comparisons`", _TLDR, tldr_pair, "chosen"),
    Format("shp", "`stanfordnlp/SHP`; `data.min_score_ratio` leaves out close calls", _SHP, shp_pair, "chosen"),
    Format(
        "pku_saferlhf",
        "`PKU-Alignment/PKU-SafeRLHF`; `data.preferred_by` is `better` or `safer`",
        {"prompt": "2 + 2?", "response_0": "4", "response_1": "5", **_IDS},
        pku_saferlhf_pair,
        "chosen",
    ),
    Format(
        "ultrafeedback",
        "`HuggingFaceH4/ultrafeedback_binarized`",
        {"prompt": "2 + 2?", **_WHOLE, "score_chosen": 9.0, "score_rejected": 3.0},
        ultrafeedback_pair,
        when=lambda row: False,  # its fields do not distinguish it from any pair in chat messages
    ),
)


def _asks(row: Row) -> bool:
    """Return whether a row holds no pair, and its dialogue, if any, no answer."""
    if has_value(row, *_SIDES):
        return False
    name = first_of(row, "messages|conversations")
    talk = spoken(row[name], name) if has_value(row, name) else ""
    return isinstance(talk, str) or talk[-1].role != "assistant"


# what `generate` answers, beside the prompts of the formats above
PROMPTS = tuple(
    Format(name.partition("|")[0], "prompts alone", {name: "2 + 2?"}, asked(own), when=_asks)
    for name, own in (
        ("prompt", renamed()),
        ("text", renamed(prompt="text")),
        ("instruction|INSTRUCTION", alpaca),
        ("question", question(renamed(prompt="question"))),
        ("messages|conversations", renamed(prompt="messages|conversations")),
    )
)
NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))
FIELDS = {name for format in FORMATS for either in format.row for name in either.rstrip("?").split("|")}
