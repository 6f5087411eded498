"""The questions and answer files of benchmarks whose own programs judge: AlpacaEval, Arena-Hard and MT-bench.

Sources of the forms: README of tatsu-lab/alpaca_eval (`model_outputs`), `gen_answer.py` of lmarena/arena-hard-auto
(version 2: `uid`, `prompt`), and `fastchat/llm_judge/gen_api_answer.py` of lm-sys/FastChat.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

from app.core.errors import UserError
from datamodules.records import Message, PreferencePair
from datamodules.sources.source import Source

Form = Literal["jsonl", "alpaca_eval", "arena_hard", "mt_bench"]
ENDINGS = {"jsonl": ".jsonl", "alpaca_eval": ".json", "arena_hard": ".jsonl", "mt_bench": ".jsonl"}
# the fields of a question: its id, and its text or (MT-bench) the texts of its turns
QUESTIONS = {
    "alpaca_eval": ("", "instruction"),
    "arena_hard": ("uid", "prompt"),
    "mt_bench": ("question_id", "turns"),
}


def read_questions(
    form: Form, path: str, split: str, subset: str | None, count: int | None
) -> list[PreferencePair]:
    """Return the first `count` questions of a benchmark as chats, with the labels `question` and `turns`."""
    name, field = QUESTIONS[form]
    items, seen = [], list[Any]()
    for place, value in islice(Source(path, split=split, subset=subset).open().rows(), count):
        row: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {}
        turns = row.get(field) if form == "mt_bench" else [row.get(field)]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise UserError(f"{place} is no question of {form}: {field} must hold text.")
        own = row.get(name)
        if name and own is None:
            raise UserError(f"{place} is no question of {form}: it has no {name}.")
        if name and own in seen:
            raise UserError(f"{place} repeats the {name} {own!r}: give each question its own.")
        seen.append(own)
        labels = {"question": own, "turns": turns}
        items.append(PreferencePair(place, (Message("user", turns[0]),), "", None, labels))
    if not items:
        raise UserError(f"{path} holds no question.")
    return items


def further_turns(items: Sequence[PreferencePair], rows: Iterable[Mapping[str, Any]]) -> list[PreferencePair]:
    """Return the questions that have a further turn, after the answers `rows` to this one."""
    answers = {row["prompt_id"]: row["response"] for row in rows}
    found = []
    for item in items:
        turns: Any = item.labels["turns"]
        said = (len(item.prompt) + 1) // 2
        if said < len(turns) and item.pair_id in answers:
            answered = (Message("assistant", answers[item.pair_id]), Message("user", turns[said]))
            found.append(replace(item, prompt=(*item.prompt, *answered)))
    return found


def answer_file(form: Form, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a benchmark's file of answers; `rows` hold a sample of each turn, in order."""
    # without `tstamp` of the two others, so that the same command writes the same bytes
    if form == "alpaca_eval":
        found = [{"instruction": row["turns"][0], "output": row["response"], "generator": name} for row in rows]
        return json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        answer_id = f"{name}-{row['question']}"
        if form == "arena_hard":
            said = {"role": "assistant", "content": {"answer": row["response"]}}
            lines[row["prompt_id"]] = {
                "uid": row["question"],
                "model": name,
                "ans_id": answer_id,
                "messages": [*row["prompt"], said],
                "metadata": {"token_len": row["tokens"]} if "tokens" in row else {},
            }
        else:
            own = {"question_id": row["question"], "answer_id": answer_id, "model_id": name}
            line = lines.setdefault(row["prompt_id"], own | {"choices": [{"index": 0, "turns": []}]})
            line["choices"][0]["turns"].append(row["response"])
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
