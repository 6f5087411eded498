"""The formats of rows: `data.format` names one, and `make docs` writes the table in docs/data.md from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from datamodules.sources import conversions as to
from datamodules.sources.conversions import Convert, Row
from datamodules.sources.messages import ASSISTANT, spoken
from datamodules.sources.rows import has_value

_SIDES = ("chosen", "rejected")


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

    def has_columns(self, row: Row) -> bool:
        """Return whether a row has the needed fields, with or without values."""
        return not any(row.keys().isdisjoint(name.split("|")) for name in self.fields)

    def nearness(self, row: Row) -> tuple[int, int]:
        """Return what is largest for the format that is nearest to a row: most fields held, then fewest lacking."""
        lacking = len(self.lacking(row))
        held = len(self.fields) - lacking
        return held, -lacking if held else 0


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

_completed = to.renamed(response="completion|response|generation")
_asked = to.question(to.renamed(prompt="question|input"))
_answered = to.question(to.renamed(prompt="question", response="answer|response"))
_argilla = to.renamed(prompt="instruction|prompt", chosen="chosen_response", rejected="rejected_response")


def _transcript(row: Row) -> bool:
    return any(ASSISTANT in str(row.get(side)) for side in _SIDES)


# a row has the first of these formats whose fields it has
FORMATS = (
    Format("pairs", "TRL, axolotl", {"prompt": "2 + 2?", **_PAIR}),
    Format("pairs", "TRL", {"prompt": [_TURN], "chosen": [_YES], "rejected": [_NO]}),
    Format("messages", "axolotl (`chat_template.default`)", _DIALOGUE, to.conversation),
    Format("messages", "LLaMA-Factory (ShareGPT)", _SHAREGPT, to.conversation),
    Format("alpaca", "LLaMA-Factory", {**_ADD, **_PAIR}, to.alpaca),
    Format("alpaca", "axolotl (`chatml.argilla`)", _ARGILLA, _argilla),
    Format("question", "axolotl (`chatml.intel`, `chatml.icr`)", _INTEL, _asked),
    Format(
        "pairs",
        "TRL (implicit prompt)",
        _WHOLE,
        when=lambda row: not isinstance(spoken(row["chosen"], "chosen"), str),
    ),
    Format("hh", "`Anthropic/hh-rlhf`; `data.subset` takes one of its four subsets", _HH, when=_transcript),
    Format("messages", "TRL, LLaMA-Factory", {"messages|conversations": [_TURN, _YES]}, to.conversation),
    Format("messages", "LLaMA-Factory (ShareGPT)", {"conversations|messages": [_HUMAN, _GPT]}, to.conversation),
    Format("pairs", "TRL, axolotl (`metharme`)", _METHARME, _completed),
    Format("pairs", "the chosen side of a pair", {"prompt": "2 + 2?", "chosen": "4"}, unless="rejected"),
    Format("alpaca", "LLaMA-Factory, axolotl", {**_ADD, "output|response|RESPONSE": "4"}, to.alpaca),
    Format("question", "axolotl (`alpaca_chat.load_qa`)", _QA, _answered),
    Format("hh", "the chosen side of HH", {"chosen": f"{_TALK} 4"}, unless="rejected", when=_transcript),
    Format(
        "text",
        "plain text to learn whole, with no prompt; the lines of a .txt file are such rows",
        {"text": "2 + 2 is 4."},
        lambda row, source: {**to.rename(row, {"text": "response"}), "prompt": ""},
        when=lambda row: not has_value(row, "prompt"),  # else the prompt would be lost
    ),
    # with `chosen`, somebody has converted the published form of these three
    Format("tldr", "`openai/summarize_from_feedback`, `comparisons`", _TLDR, to.tldr_pair, "chosen"),
    Format("shp", "`stanfordnlp/SHP`; `data.min_score_ratio` leaves out close calls", _SHP, to.shp_pair, "chosen"),
    Format(
        "pku_saferlhf",
        "`PKU-Alignment/PKU-SafeRLHF`; `data.preferred_by` is `better` or `safer`",
        {"prompt": "2 + 2?", "response_0": "4", "response_1": "5", **_IDS},
        to.pku_saferlhf_pair,
        "chosen",
    ),
    Format(
        "ultrafeedback",
        "`HuggingFaceH4/ultrafeedback_binarized`",
        {"prompt": "2 + 2?", **_WHOLE, "score_chosen": 9.0, "score_rejected": 3.0},
        to.ultrafeedback_pair,
        when=lambda row: False,  # its fields do not distinguish it from any pair in chat messages
    ),
)


def _asks(row: Row) -> bool:
    """Return whether a row holds no pair, and its dialogue, if any, no answer."""
    if has_value(row, *_SIDES):
        return False
    name = to.first_of(row, "messages|conversations")
    talk = spoken(row[name], name) if has_value(row, name) else ""
    return isinstance(talk, str) or talk[-1].role != "assistant"


# what `generate` answers, beside the prompts of the formats above
PROMPTS = tuple(
    Format(name.partition("|")[0], "prompts alone", {name: "2 + 2?"}, to.asked(own), when=_asks)
    for name, own in (
        ("prompt", to.renamed()),
        ("text", to.renamed(prompt="text")),
        ("instruction|INSTRUCTION", to.alpaca),
        ("question", to.question(to.renamed(prompt="question"))),
        ("messages|conversations", to.renamed(prompt="messages|conversations")),
    )
)
NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))
FIELDS = {name for format in FORMATS for either in format.row for name in either.rstrip("?").split("|")}
