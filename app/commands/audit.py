"""The command `beta-dpo audit`, which lists the likely mislabelled pairs of a run and its outliers, with texts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.table import Table

from app.cli.mistakes import checked_command
from app.commands.judge import print_table
from app.commands.suspects import SIGNALS, available, hits, pair_histories
from app.core.errors import UserError
from app.core.files import atomic_file, refuse_place
from app.core.intervals import span, wilson
from app.method.ranges import PositiveInt
from app.report.run import PairTexts, grouping_labels
from callbacks.pair_audit import read_audit
from datamodules.records import PreferencePair

LABEL = "flipped"
FAR = 2.0  # from M0 in σ, on average over the steps of a pair: of normal gaps, one in twenty is farther


@checked_command
def audit(
    run: str,
    out: str | None = None,
    count: PositiveInt = 100,
    by: Literal["best", "reference", "gaps", "posterior", "dropped"] = "best",
    clean: str | None = None,
    swap: bool = False,
) -> None:
    """List the likely mislabelled pairs and the outliers of RUN, and write them with their texts to OUT.

    If the data has a column `flipped`, the command prints precision and recall of every signal and of two
    baselines: the length difference of the two responses, and a random list.

    Args:
        run: log folder of a run with `PairAudit`.
        out: the .jsonl or .csv file to write, suspects.jsonl in RUN by default; it appears only when complete.
        count: number of pairs to list of each kind, at most; the most suspicious come first.
        by: the signal that ranks likely mislabelled pairs; `best` takes the first that the run has of the
            reference's own margin, the gaps, RE-PO's posterior, and how often the filter dropped the pair, which is
            the order of their precision on the controlled task.
        clean: a .jsonl file for the training data, as its source has it, without the listed mislabelled pairs.
        swap: keep these pairs in the clean data, with their responses exchanged.
    """
    if swap and clean is None:
        raise UserError("swap exchanges responses in the clean data: give its file by --clean.")
    out = out or str(Path(run, "suspects.jsonl"))
    if clean is not None and Path(clean).absolute() == Path(out).absolute():
        raise UserError(f"clean: {clean} is the file of the list too: give another one.")
    rows = read_audit(Path(run))
    histories = pair_histories(rows)
    pairs = PairTexts(Path(run))
    read = [str(path) for path in pairs.data.files("train")] if hasattr(pairs.data, "files") else []
    replaced = refuse_place("out", out, (".jsonl", ".csv"), *read)
    clean_replaced = "" if clean is None else refuse_place("clean", clean, (".jsonl",), *read)
    print(how_often_seen(histories))
    if unseen := len(pairs.rows) - len(histories):
        print(f"Never seen, so nothing is said of them: {unseen} of {len(pairs.rows)} pairs.")
    signals = available(histories)
    if by not in ("best", "gaps", *signals):
        raise UserError(f"by: the run has no usable signal {by!r}; it has {', '.join(signals) or 'none'}.")
    signal = next(iter(signals), "gaps") if by == "best" else by
    if signal in signals:
        better = [name for name in list(SIGNALS)[: list(SIGNALS).index(signal)] if name not in signals]
        without = f"; the run has no usable {' or '.join(better)}" if better else ""
        print(f"Ranked by {signal}: {signals[signal]}{without}.")
    worst, outliers = suspects(histories, SIGNALS[signal], count), suspects(histories, "outlier", count)
    listed = pd.concat({"mislabelled": worst, "outlier": outliers}, names=["listed_as"]).reset_index("listed_as")
    texts = pd.DataFrame(map(pairs.texts, listed.pair_id), index=listed.index)
    with atomic_file(out) as temporary:
        found = pd.concat([listed, texts], axis="columns")
        if out.endswith(".csv"):
            found.to_csv(temporary, index=False)
        else:
            found.to_json(temporary, orient="records", lines=True, force_ascii=False)
    print(f"{len(worst)} likely mislabelled pairs and {len(outliers)} outliers: {out}{replaced}")
    if signal == "reference" and len(worst):
        print(
            f"The reference takes about {worst.wrong_by_reference.sum():.0f} of these {len(worst)} to be really "
            "mislabelled; a smaller --count lists the likeliest alone."
        )
    if not len(worst):
        why = "once the mean gap was above 0, every pair's gaps spoke for its label"
        if signal == "reference":
            why = "the reference prefers the labelled response of every pair"
        elif rows.groupby("step").gap.mean().max() <= 0:
            why = "the mean gap never rose above 0, so nothing had been learned yet"
        print(f"No pair looks mislabelled: {why}.")
    for label in grouping_labels(rows):
        print_table(suspects_by(f"label_{label}" if f"label_{label}" in histories else label, histories, worst))
    if LABEL in rows:
        labels = rows.groupby("pair_id")[LABEL].first()[histories.pair_id]
        known = labels.isin([True, False]).to_numpy()  # 1 and 0 too
        if not known.all():
            print(f"{(~known).sum()} pairs have neither true nor false in `{LABEL}`: they are not in the table.")
        wrong = labels[known].to_numpy().astype(bool)
        if wrong.any():
            extra = np.array(pairs.extra_tokens_of_rejected(histories.pair_id[known].tolist()))
            scores = {f"audit by {name}": histories[SIGNALS[name]].to_numpy(float)[known] for name in signals}
            print_table(comparison(scores, extra, wrong, min(count, len(wrong))))
    if clean is not None:
        write_clean(clean, pairs, set(worst.pair_id), swap, clean_replaced)


def how_often_seen(histories: pd.DataFrame) -> str:
    """Return one line on how often the pairs were seen and dropped, which is the evidence for the scores."""
    seen = histories.times_seen
    once = "; one look at a pair is weak evidence, above all early in the run" if seen.max() == 1 else ""
    share = histories.times_dropped.sum() / seen.sum()
    return f"{len(histories)} pairs, each seen {span(seen)} time(s), dropped {share:.1%} of the times{once}."


def suspects(histories: pd.DataFrame, score: str, count: int) -> pd.DataFrame:
    """Return the `count` pairs with the highest `score` above that of a pair that nothing speaks against."""
    listed = histories[score] > (FAR if score == "outlier" else 0)
    if score == SIGNALS["reference"]:  # a probability, above 0 for every pair
        listed &= histories.reference_margin < 0
    return histories[listed].sort_values(score, ascending=False, kind="stable").head(count)


def suspects_by(label: str, histories: pd.DataFrame, listed: pd.DataFrame) -> Table:
    """Return the share of likely mislabelled pairs for each value of a label, the highest first."""
    title = f"likely mislabelled pairs by {label}, share of its pairs [95 % interval]"
    table = Table(label, "pairs", "listed", "share", title=title)
    by_value = histories.pair_id.isin(listed.pair_id).groupby(histories[label], sort=False)
    shares = by_value.agg(["size", "sum", "mean"])
    for value, size, found, share in shares.sort_values("mean", ascending=False, kind="stable").itertuples():
        table.add_row(str(value), str(size), str(found), str(wilson(share, size)))
    return table


def write_clean(file: str, pairs: PairTexts, worst: set[str], swap: bool, replaced: str) -> None:
    """Write the training data to `file` as JSON lines, without the pairs `worst` or with them swapped.

    Raises UserError if sources have weights, or a pair is not in them, as a replaced one of a gap mixture.
    """
    if any(source.weight is not None for source in getattr(pairs.data, "sources", ())):
        raise UserError("clean: data.path gives its sources weights, which one file cannot hold: take them out.")
    written, found = 0, set()
    with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for stream in pairs.data.streams("train") or ():
            for own in stream:
                pair = replace(own, pair_id=f"{stream.name}/{own.pair_id}") if pairs.data.mixed else own
                wrong = pair.pair_id in worst
                found |= {pair.pair_id} & worst
                if not wrong or swap:
                    lines.write(json.dumps(as_row(pair, wrong), ensure_ascii=False) + "\n")
                    written += 1
        if found != worst:
            raise UserError(
                f"clean: {len(worst - found)} of the listed pairs are not in the sources, as those of a gap "
                "mixture: audit a run without data.gap_mixture."
            )
    changed = f"{len(worst)} with their responses exchanged" if swap else f"without {len(worst)}"
    print(f"{written} pairs of the training data, {changed}: {file}{replaced}")


def as_row(pair: PreferencePair, swapped: bool) -> dict[str, Any]:
    """Return a pair as a row that `data.path` reads; answers are messages only where they have more than text.

    If it is swapped, so are the labels of its sides (`chosen_reward`, `score_rejected`) and the mark `flipped`.
    """
    more = bool(pair.chosen_fields or pair.rejected_fields)
    answers = [[pair.answer(side)] if more else getattr(pair, side) for side in ("chosen", "rejected")]
    labels = pair.labels
    if swapped:
        answers.reverse()
        other = {"chosen": "rejected", "rejected": "chosen"}
        labels = {re.sub("chosen|rejected", lambda side: other[side[0]], n): value for n, value in labels.items()}
        if (mark := labels.get(LABEL)) in (0, 1):
            labels[LABEL] = int(not mark) if type(mark) is int else not mark
    own = {"tools": pair.tools, "chat_template_kwargs": dict(pair.template_kwargs)}
    return {
        "pair_id": pair.pair_id,
        "prompt": pair.prompt if isinstance(pair.prompt, str) else list(pair.prompt),
        "chosen": answers[0],
        "rejected": answers[1],
        **{name: value for name, value in own.items() if value},
        **labels,
    }


def comparison(scores: dict[str, np.ndarray], extra_tokens: np.ndarray, wrong: np.ndarray, count: int) -> Table:
    """Return a table of precision and recall of every signal for lists of several lengths.

    The lengths, ascending, are `count` pairs, 1, 5 and 10 % of all, and as many as have wrong labels. The length
    baseline ranks by |y_l| − |y_w| in the better of its two directions, which a user could not know. The expected
    precision of a random list is the share of wrong labels.
    """
    total = int(wrong.sum())
    title = f"finding the {total} flipped of {len(wrong)} pairs in the first n of each list [95 % interval]"
    table = Table("first n", "list", "precision", "recall", title=title)
    shares = {f"{percent} % of all": max(1, round(len(wrong) * percent / 100)) for percent in (1, 5, 10)}
    why: dict[int, list[str]] = {}  # by length
    for name, size in {"--count": count, **shares, "as many as flipped": total}.items():
        why.setdefault(size, []).append(name)
    for size, names in sorted(why.items()):
        by_length = max((hits(sign * extra_tokens, wrong, size) for sign in (1, -1)), key=np.mean)
        lists = {name: hits(np.nan_to_num(score, nan=-np.inf), wrong, size) for name, score in scores.items()}
        first = f"{size}: {', '.join(names)}"  # beside the first row of its group
        for name, found in {**lists, "length": by_length}.items():
            table.add_row(first, name, str(wilson(found.mean(), size)), f"{found.sum() / total:.3f}")
            first = ""
        expected = (f"{wrong.mean():.3f}", f"{size / len(wrong):.3f}")
        table.add_row(first, "random (expected)", *expected, end_section=True)
    return table
