"""Pairs of people with a share of their labels flipped on purpose, and how well an audit finds these."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse import auto_cli

from app.commands.audit import LABEL, as_row, hits, pair_histories
from app.core.files import atomic_file
from datamodules.records import PreferencePair
from datamodules.sources.pairs import read_pairs

SHARES = (5, 10)  # percent of the pairs, those that a reader looks at
SIGNALS = ("gaps", "reference", "length")


def main(words: list[str] | None = None) -> None:
    auto_cli(draw, args=words, prog="python -m benchmarks.study.real_pairs")


def draw(
    file: str,
    folder: Path,
    flip_rate: float = 0.2,
    seed: int = 1,
    count: int = 160,
    held_out: int = 96,
    longest: int = 350,
) -> None:
    """Write train.jsonl with flips, and held_out.jsonl without.

    Args:
        count: pairs to train on.
        held_out: pairs of other prompts, at most.
        longest: characters of a pair, at most.
    """
    draws = np.random.default_rng(seed)
    found: dict[tuple[str, frozenset[str | None]], PreferencePair] = {}  # no pair twice, in either direction
    for pair in read_pairs(file, "skip", need_rejected=True):  # which counts unreadable rows
        if len(f"{pair.prompt}{pair.chosen}{pair.rejected}") <= longest:
            found.setdefault((str(pair.prompt), frozenset((pair.chosen, pair.rejected))), pair)
    pairs = list(found.values())
    by_prompt: dict[str, list[PreferencePair]] = {}
    for place in draws.permutation(len(pairs)):
        by_prompt.setdefault(str(pairs[place].prompt), []).append(pairs[place])
    order = [pair for of_prompt in by_prompt.values() for pair in of_prompt]
    train, prompts = order[:count], {str(pair.prompt) for pair in order[:count]}
    others = [pair for pair in order[count:] if str(pair.prompt) not in prompts][:held_out]
    if len(train) < count or not others:
        sys.exit(f"{file} has {len(pairs)} pairs of at most {longest} characters: raise --longest")
    flips = draws.permutation(count) < round(flip_rate * count)
    write(folder / "train.jsonl", train, flips)
    write(folder / "held_out.jsonl", others, np.zeros(len(others), bool))
    print(f"{count} of {len(pairs)} pairs, {flips.sum()} flipped, and {len(others)} held out: {folder}")


def write(path: Path, pairs: Sequence[PreferencePair], flips: np.ndarray) -> None:
    """Write pairs as rows that `data.path` reads, those of `flips` [n] with their responses exchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for pair, flip in zip(pairs, flips.tolist(), strict=True):
            row = as_row(replace(pair, labels={LABEL: False}), flip)  # which turns the mark of a flipped pair
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def found(audit: pd.DataFrame, train: Path) -> dict[str, float]:
    """Return the share of flipped pairs among the most suspicious 5 and 10 %, by signal: `gaps_5` and so on.

    `reference` is the margin of the untrained model. `length` is the better of both directions, chosen with the
    answer known: a signal that cannot beat it has found nothing. Empty without flipped pairs.
    """
    wrong = audit.groupby("pair_id", sort=False)[LABEL].first().to_numpy(bool)
    if not wrong.any():
        return {}
    histories = pair_histories(audit)
    rows = pd.read_json(train, lines=True, dtype={"pair_id": str}).set_index("pair_id").loc[histories.pair_id]
    longer = (rows.chosen.str.len() - rows.rejected.str.len()).to_numpy(float)
    scores = {
        "gaps": (histories.mislabelled.to_numpy(float),),
        "reference": (-histories.reference_margin.to_numpy(float),),
        "length": (longer, -longer),
    }
    return {
        f"{name}_{percent}": max(
            hits(each, wrong, round(percent / 100 * len(wrong))).mean() for each in scores[name]
        )
        for name in SIGNALS
        for percent in SHARES
    }


if __name__ == "__main__":
    main()
