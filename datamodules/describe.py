"""Descriptions of a table of pairs for the log: its content, losses and oddities."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer

from datamodules.gap_mixture import GapMixedTable
from datamodules.rewards import RewardedTable
from datamodules.table import JoinedTables, PairTable, TokenisedTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shown(
    table: PairTable, row: int, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], trained: Sequence[str]
) -> list[str]:
    """Return a pair as it is trained, in readable lines: the prompt, and the sides in `trained`.

    Texts are quoted, so that special tokens and line breaks are visible. A response that ends with none of the ids
    `stops` is reported as cut.
    """
    (pair_id,) = table.pair_ids([row])
    lines = [f"pair {pair_id}"]
    for side, ids in table[row]._asdict().items():
        if ids is None or side not in ("prompt", *trained):
            continue
        lines.append(f"  {side:<9}{len(ids):>5} tokens  {_quoted(tokenizer.decode(ids))}")
        if side != "prompt":
            last = _quoted(tokenizer.decode(ids[-1:]))
            ended = int(ids[-1]) in stops
            lines[-1] += f"  trained up to {last}" + ("" if ended else ": it has no end, for it was cut")
    return lines


def describe(table: PairTable, rows: np.ndarray) -> list[str]:
    """Return one line per table: its number of pairs, and what reading and tokenising left out."""
    if isinstance(table, GapMixedTable):
        own, replaced = table.parts
        samples = [f"samples: {line}" for line in describe(replaced.table, np.arange(len(replaced.table)))]
        return [*describe(own.table, rows), *samples, table.note]
    if isinstance(table, RewardedTable):
        (line,) = describe(table.parts[0].table, rows)
        left_out = int((~table.scored).sum())
        return [line + f"; {left_out} left out, the reward model's chat template refuses them" * bool(left_out)]
    if isinstance(table, JoinedTables):
        counts = np.bincount(table.part_of(rows), minlength=len(table.parts)).tolist()
        sources = [
            f"{part.labels.get('source')}: {count} of its {line}"
            for part, count in zip(table.parts, counts, strict=True)
            for line in describe(part.table, np.arange(len(part.table)))
        ]
        return [f"{len(rows)} pairs of {len(sources)} sources", *sources]
    assert isinstance(table, TokenisedTable)
    counts_by_reason = [
        f"{count} {reason}" + (f" (first: {', '.join(table.examples[reason])})" if reason in table.examples else "")
        for reason, count in table.report.items()
        if reason not in ("pairs", "rows")
    ]
    if any("truncated" in reason for reason in table.report):
        counts_by_reason.append("data.max_length and data.max_prompt_length set the limits")
    return ["; ".join([f"{len(rows)} pairs", f"{table.report['rows']} rows read", *counts_by_reason])]


def repeats(table: PairTable, rows: np.ndarray) -> tuple[str, str]:
    """Return a message on repeated pairs and one on contradicting pairs, each empty if there are none."""
    pairs = np.column_stack([table.prompt_keys[rows], table.answer_keys[rows]])  # [n, 3]
    if not len(rows):
        return "", ""
    _, first, number = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[number.reshape(-1)] != np.arange(len(rows)))
    known = {row.tobytes() for row in pairs[first]}
    swapped = np.ascontiguousarray(pairs[:, [0, 2, 1]])
    against = np.array([n for n, row in enumerate(swapped) if row.tobytes() in known], dtype=np.int64)
    twice = f"{len(again)} pairs repeat an earlier one (first: {_named(table, rows[again])})" if len(again) else ""
    contradiction = (
        f"{len(against)} pairs contradict another one: the same prompt, chosen and rejected swapped "
        f"(first: {_named(table, rows[against])}); all stay, take out those that are wrong"
    )
    return twice, contradiction if len(against) else ""


def shared_prompts(trained: tuple[PairTable, np.ndarray], held_out: tuple[PairTable, np.ndarray]) -> str:
    """Return a message if prompts of held-out pairs are trained on, else an empty text."""
    table, rows = held_out
    shared = rows[np.isin(table.prompt_keys[rows], trained[0].prompt_keys[trained[1]])]
    if not len(shared):
        return ""
    return (
        f"{len(shared)} of {len(rows)} pairs have a prompt that is trained on (first: {_named(table, shared)}): "
        "they tell little of new prompts; data.validation_share holds out whole prompts"
    )


def cut_responses(table: PairTable, max_length: int) -> str:
    """Return a message if more than 5 % of the responses are cut, else an empty text."""
    leaves = list(_leaves(table))
    counts = sum((Counter(leaf.report) for leaf in leaves), Counter())
    cut = counts["chosen truncated"] + counts["rejected truncated"]
    responses = sum(int((leaf.chosen_lengths > 0).sum() + (leaf.rejected_lengths > 0).sum()) for leaf in leaves)
    if cut <= 0.05 * responses:
        return ""
    return (
        f"{cut / responses:.0%} of the responses are cut to data.max_length {max_length} and have no end: "
        "raise data.max_length, and data.micro_batch_tokens to at least twice of it"
    )


def pairs_seen(pairs: int, batch_size: int, trainer: Trainer) -> tuple[str, bool]:
    """Return a message on how many pairs a `fit` sees within the trainer's limits, and whether it sees all."""
    batches = -(-pairs // batch_size)
    limit = trainer.limit_train_batches
    per_epoch = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    steps = min(trainer.max_steps if trainer.max_steps != -1 else math.inf, epochs * per_epoch)
    seen = int(min(pairs, steps * batch_size))
    option = "trainer.limit_train_batches" if per_epoch < batches else "trainer.max_steps or trainer.max_epochs"
    passes = "" if steps == math.inf or seen < pairs else f", {steps / max(1, batches):.3g} times"
    told = "no limit of steps" if steps == math.inf else f"{steps} steps of {batch_size}"
    return f"{seen} of {pairs} pairs will be seen{passes} ({told}; {option} decides)", seen == pairs


def _leaves(table: PairTable) -> Iterator[TokenisedTable]:
    if isinstance(table, TokenisedTable):
        yield table
    elif isinstance(table, JoinedTables):
        for part in table.parts[:1] if isinstance(table, GapMixedTable) else table.parts:
            yield from _leaves(part.table)


def _named(table: PairTable, rows: np.ndarray) -> str:
    return ", ".join(table.pair_ids(rows[:3]))


def _quoted(text: str | list[str]) -> str:
    return json.dumps(text, ensure_ascii=False)
