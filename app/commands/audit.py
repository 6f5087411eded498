"""The command `beta-dpo audit`, which lists the likely mislabelled pairs of a run and its outliers, with texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from app.errors import UserError
from app.files import atomic_file
from app.intervals import bootstrap_mean, wilson
from app.method.ranges import PositiveInt
from app.mistakes import checked_command
from app.run_folder import PairTexts, grouping_labels, read_audit
from app.suspects import hits, pair_histories

LABEL = "flipped"


@checked_command
def audit(run: str, out: str = "suspects.jsonl", count: PositiveInt = 100) -> None:
    """List the likely mislabelled pairs and the outliers of RUN, and write them with their texts to OUT.

    If the data has a column `flipped`, the command prints precision and recall of the list and of two baselines:
    the length difference of the two responses, and a random list.

    Args:
        run: log folder of a run with `PairAudit`.
        out: the .jsonl or .csv file to write; it appears only when complete.
        count: number of pairs to list of each kind, at most; the most suspicious come first.
    """
    if not out.endswith((".jsonl", ".csv")):
        raise UserError(f"out must end in .jsonl or .csv, not {out!r}.")
    rows = read_audit(Path(run))
    histories = pair_histories(rows)
    pairs = PairTexts(Path(run))
    print(how_often_seen(histories))
    lists = [suspects(histories, kind, count) for kind in ("mislabelled", "outlier")]
    listed = pd.concat(lists, ignore_index=True)
    texts = pd.DataFrame([pairs.texts(pair_id) for pair_id in listed.pair_id])
    with atomic_file(out) as temporary:
        write(pd.concat([listed, texts], axis="columns"), temporary, out)
    print(f"{len(lists[0])} likely mislabelled pairs and {len(lists[1])} outliers: {out}")
    if not len(lists[0]):
        print(why_no_suspects(rows))
    for label in grouping_labels(rows):
        label = f"label_{label}" if f"label_{label}" in histories else label
        Console().print(suspects_by(label, histories, lists[0]))
    if LABEL in rows:
        wrong = rows.groupby("pair_id", sort=False)[LABEL].first().to_numpy().astype(bool)
        if wrong.any():
            extra = np.array(pairs.extra_tokens_of_rejected(histories.pair_id.tolist()))
            Console().print(comparison(histories.mislabelled.to_numpy(), extra, wrong, min(count, len(wrong))))


def why_no_suspects(rows: pd.DataFrame) -> str:
    """Return the reason why no pair is listed: the policy had learned nothing, or the gaps support every label."""
    if rows.groupby("step").gap.mean().max() <= 0:
        return "No pair looks mislabelled: the mean gap never rose above 0, so nothing had been learned yet."
    return "No pair looks mislabelled: once the mean gap was above 0, every pair's gaps spoke for its label."


def suspects_by(label: str, histories: pd.DataFrame, listed: pd.DataFrame) -> Table:
    """Return the share of likely mislabelled pairs for each value of a label, the highest first."""
    table = Table(title=f"likely mislabelled pairs by {label}, share of its pairs [95 % interval]")
    for column in (label, "pairs", "listed", "share"):
        table.add_column(column)
    suspicious = histories.pair_id.isin(listed.pair_id)
    groups = {value: suspicious[histories[label].eq(value)] for value in histories[label].dropna().unique()}
    for value, found in sorted(groups.items(), key=lambda group: -group[1].mean()):
        share = wilson(float(found.mean()), len(found))
        table.add_row(str(value), str(len(found)), str(int(found.sum())), str(share))
    return table


def how_often_seen(histories: pd.DataFrame) -> str:
    """Return one line on how often the pairs were seen and dropped, which is the evidence for the scores."""
    seen, dropped = histories.times_seen, histories.times_dropped
    often = f"{seen.min()}" if seen.min() == seen.max() else f"{seen.min()} to {seen.max()}"
    once = "; one look at a pair is weak evidence, above all early in the run" if seen.max() == 1 else ""
    share = dropped.sum() / seen.sum()
    return f"{len(histories)} pairs, each seen {often} time(s), dropped {share:.1%} of the times{once}."


def suspects(histories: pd.DataFrame, kind: str, count: int) -> pd.DataFrame:
    """Return the `count` pairs with the highest score of this kind, without pairs whose score is not positive."""
    ranked = histories.sort_values(kind, ascending=False, kind="stable").head(count)
    ranked = ranked[ranked[kind] > 0]
    return ranked.assign(listed_as=kind)[["listed_as", *histories.columns]]


def write(listed: pd.DataFrame, file: Path, name: str) -> None:
    if name.endswith(".csv"):
        listed.to_csv(file, index=False)
    else:
        listed.to_json(file, orient="records", lines=True, force_ascii=False)


def comparison(scores: np.ndarray, extra_tokens: np.ndarray, wrong: np.ndarray, count: int) -> Table:
    """Return a table of precision and recall for lists of `count` pairs and of as many pairs as have wrong labels.

    The length baseline ranks by |y_l| − |y_w| in the better of its two directions, which a user could not know. The
    expected precision of a random list is the share of wrong labels.
    """
    total = int(wrong.sum())
    table = Table(title=f"finding the {total} flipped of {len(wrong)} pairs [95 % interval]")
    for column in ("list", "pairs", "precision", "recall"):
        table.add_column(column)
    for size in dict.fromkeys((count, total)):
        by_length = max((hits(sign * extra_tokens, wrong, size) for sign in (1, -1)), key=np.mean)
        for name, found in (("audit", hits(scores, wrong, size)), ("length", by_length)):
            table.add_row(name, str(size), str(bootstrap_mean(found)), f"{found.sum() / total:.3f}")
        table.add_row("random (expected)", str(size), f"{wrong.mean():.3f}", f"{size / len(wrong):.3f}")
    return table
