"""The formats of rows: `data.format` names one, and `make docs` writes the table in docs/data.md from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datamodules.sources.conversions import (
    Convert,
    alpaca,
    asked,
    conversation,
    first_of,
    question,
    renamed,
    unchanged,
)
from datamodules.sources.messages import spoken
from datamodules.sources.prompts import ASSISTANT
from datamodules.sources.published import (
    PKU_FIELDS,
    SHP_FIELDS,
    TLDR_FIELDS,
    Row,
    pku_saferlhf_pair,
    shp_pair,
    tldr_pair,
    ultrafeedback_pair,
)
from datamodules.sources.rows import missing

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True, eq=False)
class Format:
    """One format of rows. A row needs a value in each of `fields` (`a|b`: in one of them); `optional` may be empty.

    `named_by`: the programs or datasets that use it. `example`: a row. `convert` returns the fields of a pair.
    Without `data.format`, this format applies only to rows for which `when` is true.
    """

    name: str
    fields: tuple[str, ...]
    named_by: str
    example: Row
    convert: Convert = unchanged
    optional: tuple[str, ...] = ()
    when: Callable[[Row], bool] = lambda row: True

    @property
    def is_pair(self) -> bool:
        """Return whether its rows have two answers, as preference optimisation needs."""
        return len(self.fields) > 2 or "rejected" in self.fields

    def lacking(self, row: Row) -> list[str]:
        """Return the needed fields that have no value in a row."""
        return [name for name in self.fields if not any(_holds(row, either) for either in name.split("|"))]


def _holds(row: Row, name: str) -> bool:
    # a row with one null side is a damaged pair, not a demonstration
    sides = _SIDES if name in _SIDES and name in row else (name,)
    return any(not missing(row.get(side)) for side in sides)


def _without_own_fields(row: Row) -> bool:
    return "chosen" not in row  # otherwise somebody has converted the published form


_TURN = {"role": "user", "content": "2 + 2?"}
_YES, _NO = ({"role": "assistant", "content": answer} for answer in ("4", "5"))
_HUMAN, _GPT, _GPT_NO = (
    {"from": who, "value": said} for who, said in (("human", "2 + 2?"), ("gpt", "4"), ("gpt", "5"))
)
_TALK = "\n\nHuman: 2 + 2?\n\nAssistant:"
_TLDR: dict[str, Any] = {
    "info": {"id": "t3", "subreddit": "cats", "title": "Cat", "post": "My cat sleeps."},
    "summaries": [{"text": " It sleeps."}, {"text": " It barks."}],
    "choice": 0,
}
_SHP = {"history": "2 + 2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1}
_SHP_SCORES = {"score_A": 9, "score_B": 3, "score_ratio": 3.0}
_PKU = {"prompt": "2 + 2?", "response_0": "4", "response_1": "5", "better_response_id": 0, "safer_response_id": 0}
_OURS = "TRL, axolotl"
_LLAMA_FACTORY = "LLaMA-Factory"

# a row has the first of these formats whose fields it has
FORMATS = (
    Format("pairs", ("prompt", *_SIDES), _OURS, {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}),
    Format("pairs", ("prompt", *_SIDES), "TRL", {"prompt": [_TURN], "chosen": [_YES], "rejected": [_NO]}),
    Format(
        "messages",
        ("messages|conversations", *_SIDES),
        "axolotl (`chat_template.default`)",
        {"messages": [_TURN], "chosen": _YES, "rejected": _NO},
        conversation,
    ),
    Format(
        "messages",
        ("messages|conversations", *_SIDES),
        f"{_LLAMA_FACTORY} (ShareGPT)",
        {"conversations": [_HUMAN], "chosen": _GPT, "rejected": _GPT_NO},
        conversation,
    ),
    Format(
        "alpaca",
        ("instruction|INSTRUCTION", *_SIDES),
        _LLAMA_FACTORY,
        {"instruction": "Add.", "input": "2 + 2", "chosen": "4", "rejected": "5"},
        alpaca,
        ("input", "history"),
    ),
    Format(
        "alpaca",
        ("instruction|prompt", "chosen_response", "rejected_response"),
        "axolotl (`chatml.argilla`)",
        {"instruction": "2 + 2?", "chosen_response": "4", "rejected_response": "5"},
        renamed(prompt="instruction|prompt", chosen="chosen_response", rejected="rejected_response"),
    ),
    Format(
        "question",
        ("question|input", *_SIDES),
        "axolotl (`chatml.intel`, `chatml.icr`)",
        {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
        question(renamed(prompt="question|input")),
    ),
    Format(
        "pairs",
        _SIDES,
        "TRL (implicit prompt)",
        {"chosen": [_TURN, _YES], "rejected": [_TURN, _NO]},
        when=lambda row: not isinstance(spoken(row["chosen"], "chosen"), str),
    ),
    Format(
        "hh",
        _SIDES,
        "`Anthropic/hh-rlhf`; `data.subset` takes one of its four subsets",
        {"chosen": f"{_TALK} 4", "rejected": f"{_TALK} 5"},
        when=lambda row: any(ASSISTANT in str(row[side]) for side in _SIDES),
    ),
    Format(
        "messages", ("messages|conversations",), f"TRL, {_LLAMA_FACTORY}", {"messages": [_TURN, _YES]}, conversation
    ),
    Format(
        "messages",
        ("messages|conversations",),
        f"{_LLAMA_FACTORY} (ShareGPT)",
        {"conversations": [_HUMAN, _GPT]},
        conversation,
    ),
    Format(
        "pairs",
        ("prompt", "completion|response|generation"),
        "TRL, axolotl (`metharme`)",
        {"prompt": "2 + 2?", "completion": "4"},
        renamed(response="completion|response|generation"),
    ),
    Format(
        "pairs",
        ("prompt", "chosen"),
        "the chosen side of a pair",
        {"prompt": "2 + 2?", "chosen": "4"},
        when=lambda row: "rejected" not in row,
    ),
    Format(
        "alpaca",
        ("instruction|INSTRUCTION", "output|response|RESPONSE"),
        f"{_LLAMA_FACTORY}, axolotl",
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        alpaca,
        ("input", "history"),
    ),
    Format(
        "question",
        ("question", "answer|response"),
        "axolotl (`alpaca_chat.load_qa`)",
        {"question": "2 + 2?", "answer": "4"},
        question(renamed(prompt="question", response="answer|response")),
    ),
    Format(
        "hh",
        ("chosen",),
        "the chosen side of HH",
        {"chosen": f"{_TALK} 4"},
        when=lambda row: "rejected" not in row and ASSISTANT in str(row["chosen"]),
    ),
    Format(
        "tldr",
        TLDR_FIELDS,
        "`openai/summarize_from_feedback`, `comparisons`",
        _TLDR,
        lambda row, source: tldr_pair(row),
        when=_without_own_fields,
    ),
    Format(
        "shp",
        SHP_FIELDS,
        "`stanfordnlp/SHP`; `data.min_score_ratio` leaves out close calls",
        _SHP | _SHP_SCORES,
        lambda row, source: shp_pair(row, source.min_score_ratio),
        when=_without_own_fields,
    ),
    Format(
        "pku_saferlhf",
        PKU_FIELDS,
        "`PKU-Alignment/PKU-SafeRLHF`; `data.preferred_by` is `better` or `safer`",
        _PKU,
        lambda row, source: pku_saferlhf_pair(row, source.preferred_by),
        when=_without_own_fields,
    ),
    Format(
        "ultrafeedback",
        ("prompt", *_SIDES, "score_chosen", "score_rejected"),
        "`HuggingFaceH4/ultrafeedback_binarized`",
        {
            "prompt": "2 + 2?",
            "chosen": [_TURN, _YES],
            "rejected": [_TURN, _NO],
            "score_chosen": 9.0,
            "score_rejected": 3.0,
        },
        lambda row, source: ultrafeedback_pair(row),
        when=lambda row: False,  # its fields do not distinguish it from any pair in chat messages
    ),
)


def _asks(row: Row) -> bool:
    """Return whether a row holds no pair, and its dialogue, if any, no answer."""
    if any(not missing(row.get(side)) for side in _SIDES):
        return False
    name = first_of(row, "messages|conversations")
    talk = () if missing(row.get(name)) else spoken(row[name], name)
    return isinstance(talk, str) or not talk or talk[-1].role != "assistant"


# what `generate` answers, beside the prompts of the formats above
PROMPTS = tuple(
    Format(name.partition("|")[0], (name,), "prompts alone", {name: "2 + 2?"}, asked(own), when=_asks)
    for name, own in (
        ("prompt", unchanged),
        ("instruction|INSTRUCTION", alpaca),
        ("question", question(renamed(prompt="question"))),
        ("messages|conversations", renamed(prompt="messages|conversations")),
    )
)
NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))
FIELDS = {name for format in FORMATS for either in (*format.fields, *format.optional) for name in either.split("|")}


def markdown_table(formats: tuple[Format, ...] = FORMATS) -> str:
    """Return the registry as the table in docs/data.md."""
    lines = ["| `data.format` | an example row | stage | as in |", "|---|---|---|---|"]
    for format in formats:
        row = json.dumps(format.example, ensure_ascii=False).replace("|", "\\|")
        stage = "preference" if format.is_pair else "SFT"
        lines.append(f"| `{format.name}` | `{row}` | {stage} | {format.named_by} |")
    return "\n".join(lines) + "\n"


def nearest(row: Row, formats: tuple[Format, ...]) -> Format:
    """Return the format with most fields in the row; ties go to the fewest lacking fields, then to the first."""
    lacks = {format: len(format.lacking(row)) for format in formats}
    if all(lacks[format] == len(format.fields) for format in formats):
        return formats[0]
    return max(formats, key=lambda format: (len(format.fields) - lacks[format], -lacks[format]))
