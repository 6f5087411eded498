"""Pairs of people with a share of their labels flipped on purpose, and how well an audit finds these.

python -m benchmarks.study.real_pairs FILE FOLDER     train.jsonl with flips, and held_out.jsonl without
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from app.commands.audit import LABEL, as_row
from app.commands.suspects import hits, pair_histories
from app.core.files import atomic_file
from datamodules.records import PreferencePair
from datamodules.sources.pairs import read_pairs

SHARES = {"5": 0.05, "10": 0.1}  # of the pairs that a reader looks at
SIGNALS = ("gaps", "reference", "length")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.real_pairs",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flip_rate", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=160, help="pairs to train on")
    parser.add_argument("--held_out", type=int, default=96, help="pairs of other prompts, at most")
    parser.add_argument("--longest", type=int, default=350, help="characters of a pair, at most")
    options = parser.parse_args(words)
    draws = np.random.default_rng(options.seed)
    pairs = drawn(options.file, options.longest, draws)
    train = pairs[: options.count]
    prompts = {str(pair.prompt) for pair in train}
    held_out = [pair for pair in pairs[options.count :] if str(pair.prompt) not in prompts][: options.held_out]
    if len(train) < options.count or not held_out:
        sys.exit(f"{options.file} has {len(pairs)} pairs of at most {options.longest} characters: raise --longest")
    flips = draws.permutation(len(train)) < round(options.flip_rate * len(train))
    write(options.folder / "train.jsonl", train, flips)
    write(options.folder / "held_out.jsonl", held_out, np.zeros(len(held_out), bool))
    print(
        f"{len(train)} of {len(pairs)} pairs, {flips.sum()} flipped, and {len(held_out)} held out: {options.folder}"
    )


def drawn(file: str, longest: int, draws: np.random.Generator) -> list[PreferencePair]:
    """Return the distinct pairs of at most `longest` characters in a drawn order, those of a prompt together.

    Unreadable rows are counted.
    """
    found: dict[tuple[str, frozenset[str | None]], PreferencePair] = {}
    for pair in read_pairs(file, "skip", need_rejected=True):
        if len(f"{pair.prompt}{pair.chosen}{pair.rejected}") <= longest:
            found.setdefault((str(pair.prompt), frozenset((pair.chosen, pair.rejected))), pair)
    pairs = list(found.values())
    order = [pairs[place] for place in draws.permutation(len(pairs))]
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(str(pair.prompt) for pair in order))}
    return sorted(order, key=lambda pair: prompts[str(pair.prompt)])


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
        f"{name}_{percent}": max(hits(each, wrong, round(share * len(wrong))).mean() for each in scores[name])
        for name in SIGNALS
        for percent, share in SHARES.items()
    }


if __name__ == "__main__":
    main()
