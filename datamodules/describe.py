"""Descriptions of a table of pairs for the log: its content, losses and oddities."""

from __future__ import annotations

import logging
import math

import numpy as np
import pandas as pd
from lightning.pytorch import Trainer
from pandas.util import hash_pandas_object

from datamodules.gap_mixture import GapMixedTable
from datamodules.table import PairTable, Part
from datamodules.tokenisation import UNKNOWN

ALIKE = "but for case, spaces or punctuation"
_SCORES = ("score", "rating", "reward")  # in the names of labels that grade a response


def describe(table: PairTable, rows: np.ndarray) -> list[str]:
    """Return one line per source: its number of pairs, and what reading and tokenising left out."""
    counts = np.bincount(table.part_of(rows), minlength=len(table.parts)).tolist()
    lines = [_of_part(part, count) for part, count in zip(table.parts, counts, strict=True)]
    if table.parts[0].source:
        sources = [f"{part.source}: {line}" for part, line in zip(table.parts, lines, strict=True)]
        lines = [f"{len(rows)} pairs of {len(sources)} sources", *sources]
    if isinstance(table, GapMixedTable):
        samples = describe(table.samples, np.arange(len(table.samples)))
        lines += [*(f"samples: {line}" for line in samples), table.note]
    return lines


def _of_part(part: Part, count: int) -> str:
    of_all = "" if count == part.pairs else f" of {part.pairs}"
    told = [f"{count}{of_all} pairs", f"{part.report.counts['rows']} rows read", *part.report.lines()]
    if any("truncated" in reason for reason in part.report.counts):
        told.append("data.max_length and data.max_prompt_length set the limits")
    return "; ".join(told)


def remarks(table: PairTable, rows: np.ndarray, max_length: int, trained: bool) -> list[tuple[int, str]]:
    """Return what is unusual in the pairs of a split, each with its level of logging; most only if `trained`."""
    found = [(logging.WARNING, cut_responses(table, max_length)), (logging.WARNING, unknown_text(table))]
    if trained:
        names = table.label_names
        twice, contradicted, spaced = repeats(table, rows)
        found += [
            (logging.INFO, f"columns kept as labels: {', '.join(names)}" if names else ""),
            (logging.INFO, twice),
            (logging.INFO, against_scores(table, rows)),
            (logging.WARNING, contradicted),
            (logging.WARNING, spaced),
        ]
    return [(level, said) for level, said in found if said]


def repeats(table: PairTable, rows: np.ndarray) -> tuple[str, str, str]:
    """Return messages on pairs that are repeated, contradict others, or differ in outer spaces alone, if any."""
    keys = pd.DataFrame({name: table.keys(name, rows) for name in ("prompt", "chosen", "rejected")})
    pairs, swapped = (
        hash_pandas_object(keys[["prompt", *sides]], index=False)
        for sides in (("chosen", "rejected"), ("rejected", "chosen"))
    )
    # answers that differ in outer spaces alone have one key
    equal = (keys.chosen == keys.rejected).to_numpy()
    against = ~equal & swapped.isin(pairs).to_numpy()
    other = "another one: the same prompt, chosen and rejected swapped"
    spaces = "responses that differ in outer spaces alone"
    return (
        _told(table, rows[pairs.duplicated().to_numpy()], "repeat", "an earlier one"),
        _told(table, rows[against], "contradict", other, "; all stay, take out those that are wrong"),
        _told(table, rows[equal], "have", spaces, ": they teach nothing else, so take them out"),
    )


def against_scores(table: PairTable, rows: np.ndarray) -> str:
    """Return a message on pairs whose rejected response has the higher score in the data, else an empty text."""
    told = []
    for name in table.label_names:
        other = name.replace("chosen", "rejected")
        if other == name or other not in table.label_names or not any(word in name for word in _SCORES):
            continue
        scores = table.values(rows, name, other)
        below = [all(isinstance(each, int | float) for each in both) and both[0] < both[1] for both in scores]
        told.append(_told(table, rows[below], "have", f"a {name} below the {other}", "; all stay"))
    return "; ".join(filter(None, told))


def _told(table: PairTable, rows: np.ndarray, verb: str, what: str, end: str = "") -> str:
    """Return a message on these pairs with the ids of the first, or an empty text without any."""
    of_one = "has" if verb == "have" else f"{verb}s"
    pairs = f"1 pair {of_one}" if len(rows) == 1 else f"{len(rows)} pairs {verb}"
    return f"{pairs} {what} (first: {_named(table, rows)}){end}" if len(rows) else ""


def shared_prompts(trained: tuple[PairTable, np.ndarray], held_out: tuple[PairTable, np.ndarray]) -> str:
    """Return a message if prompts of held-out pairs are trained on, else an empty text."""
    (table, rows), (other, trained_rows) = held_out, trained
    same, near = (
        pd.Series(table.keys(name, rows)).isin(other.keys(name, trained_rows)).to_numpy()
        for name in ("prompt", "near")
    )
    told = []
    for found, which in ((same, "that is trained on"), (near & ~same, f"like one that is trained on, {ALIKE}")):
        if found.any():
            first = _named(table, rows[found])
            told.append(f"{found.sum()} of {len(rows)} pairs have a prompt {which} (first: {first})")
    if not told:
        return ""
    return "; ".join(told) + ": they tell little of new prompts; data.validation_share holds out whole prompts"


def cut_responses(table: PairTable, max_length: int) -> str:
    """Return a message if more than 5 % of the responses are cut, else an empty text."""
    counts = table.report.counts
    cut = counts["chosen truncated"] + counts["rejected truncated"]
    # without the replaced pairs of a gap mixture, which come last
    responses = int((table.side_lengths[1:, : counts["pairs"]] > 0).sum())
    if cut <= 0.05 * responses:
        return ""
    return (
        f"{cut / responses:.0%} of the responses are cut to data.max_length {max_length} and have no end: "
        "raise data.max_length, and data.micro_batch_tokens to at least twice of it"
    )


def unknown_text(table: PairTable) -> str:
    """Return a message if more than 5 % of the pairs have text unknown to the tokenizer, else an empty text."""
    counts = table.report.counts
    share = sum(count for why, count in counts.items() if UNKNOWN in why) / max(counts["pairs"], 1)
    cure = "each unknown word becomes the same token, or none: take a model of this language and alphabet"
    return f"{share:.0%} of the pairs hold {UNKNOWN}; {cure}" if share > 0.05 else ""


def pairs_seen(pairs: int, batch_size: int, trainer: Trainer) -> tuple[str, bool]:
    """Return a message on how many pairs a `fit` sees within the trainer's limits, and whether as asked for."""
    batches = -(-pairs // batch_size)
    limit = trainer.limit_train_batches
    per_epoch = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    steps = min(trainer.max_steps if trainer.max_steps != -1 else math.inf, epochs * per_epoch)
    seen = int(min(pairs, steps * batch_size))
    option = "trainer.limit_train_batches" if per_epoch < batches else "trainer.max_steps or trainer.max_epochs"
    option = "trainer.fast_dev_run" if trainer.fast_dev_run else option  # type: ignore[attr-defined]
    told = "no limit of steps" if steps == math.inf else f"{steps} steps of {min(batch_size, pairs)}"
    words = f"{seen} of {pairs} pairs will be seen"
    if seen == pairs and steps < math.inf:  # a limited epoch continues where the previous one ended
        passes = f"{steps / max(1, batches):.4g}"
        often = {"1": "once", "2": "twice"}.get(passes, f"{passes} times{' on average' if '.' in passes else ''}")
        words = f"each of {pairs} pairs will be seen {often}"
    if batch_size > pairs:
        option = f"data.batch_size {batch_size} is more than there are; {option}"
    return f"{words} ({told}; {option} decides)", seen == pairs and batch_size <= pairs


def _named(table: PairTable, rows: np.ndarray) -> str:
    return ", ".join(table.pair_ids(rows[:3]))
