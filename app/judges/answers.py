"""The answers to compare: those of sample files, or the chosen responses of preference pairs, matched by prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.core.errors import UserError
from app.core.samples import read_samples
from app.judges import Answer
from datamodules.records import Prompt, read_prompt
from datamodules.sources.messages import is_transcript_prompt, prompt_messages
from datamodules.sources.pairs import read_pairs


def aligned(
    ours: str, theirs: str, read: Callable[[str], list[Answer]] | None = None
) -> tuple[list[Answer], list[Answer]]:
    """Return the answers of `ours` and, in the same order, the rival of each from `theirs`.

    If all that `read` (`rival_answers`) gives have one temperature, each is a rival at every temperature; so
    is the only sample of a prompt. Raises UserError for several rivals of an answer, and for files that answer
    different prompts (pairs may have more prompts than `ours`).
    """
    rows, everyone = sampled_answers(ours), (read or rival_answers)(theirs)
    told_apart = [name for name in ("temperature", "sample") if len({rival.get(name) for rival in everyone}) > 1]

    def meeting(row: Answer) -> tuple[Any, ...]:
        return (row["prompt_id"], *(row.get(name) for name in told_apart))

    rivals: dict[tuple[Any, ...], Answer] = {}
    for rival in everyone:
        if rivals.setdefault(meeting(rival), rival) is not rival:
            twice = rival["prompt_id"]
            raise UserError(f"{theirs} answers the prompt {twice!r} twice: keep the answer that is the rival.")
    met = {meeting(row) for row in rows}
    same = met == rivals.keys() if holds_samples(theirs) else met <= rivals.keys()
    if not same or any(rivals[meeting(row)]["prompt"] != row["prompt"] for row in rows):
        cure = "sample both for the same prompts, with the same seed, count, samples and temperatures"
        raise UserError(f"{ours} and {theirs} answer different prompts: {cure}.")
    return rows, [rivals[meeting(row)] for row in rows]


def sampled_answers(path: str) -> list[Answer]:
    """Return the rows of a sample file. UserError for none, a bad or repeated one, and two prompts with one id."""
    rows = [row | {"prompt": read_prompt(row["prompt"])} for row in read_samples(path)]
    if not rows:
        raise UserError(f"{path} holds no answer.")
    prompts: dict[str, Prompt] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        if prompts.setdefault(row["prompt_id"], row["prompt"]) != row["prompt"]:
            raise UserError(f"{path}: the prompt_id {row['prompt_id']!r} has two prompts: give each its own.")
        own = (row["prompt_id"], row.get("temperature"), row.get("sample", row["response"]))
        if own in seen:
            cure = "remove one, or number the samples of a prompt by `sample`"
            raise UserError(f"{path} gives a sample of the prompt {row['prompt_id']!r} twice: {cure}.")
        seen.add(own)
    return rows


def rival_answers(path: str) -> list[Answer]:
    """Return the samples at `path`, or the chosen responses of the preference pairs there (a file or Hub id)."""
    if holds_samples(path):
        return sampled_answers(path)
    reader = read_pairs(path, on_bad_row="skip")
    rows = [{"prompt_id": pair.pair_id, "prompt": pair.prompt, "response": pair.chosen} for pair in reader]
    if not reader.report.complete:
        print(f"{path}: {reader.report.summary()}")
    return rows


def holds_samples(path: str) -> bool:
    """Return whether `path` is a file of samples and not of preference pairs."""
    if not path.endswith(".jsonl") or not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        try:
            first = json.loads(next(filter(bytes.strip, file), b""))
        except ValueError:
            return True  # `read_samples` then raises the error that names the line
    return isinstance(first, dict) and "response" in first and "chosen" not in first


def dialogue_text(prompt: Prompt) -> str:
    """Return a prompt as readable text: plain text unchanged, a dialogue with its speaker before every turn."""
    if isinstance(prompt, str) and not is_transcript_prompt(prompt):
        return prompt.strip()
    try:
        turns = prompt_messages(prompt)
    except ValueError:  # turns that do not alternate
        return str(prompt).strip()
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content.strip()}" for turn in turns)
