"""The command `beta-dpo audit`, which lists the likely mislabelled pairs of a run and its outliers, with texts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from rich.table import Table

from app.cli.mistakes import checked_command
from app.commands.judge import print_table
from app.core.errors import UserError
from app.core.files import atomic_file, refuse_place
from app.core.intervals import span, wilson
from app.method.dynamic_beta import RunningMoments
from app.method.ranges import PositiveInt
from app.method.reference_flips import fitted
from app.report.run import PairTexts, grouping_labels
from callbacks.pair_audit import read_audit
from datamodules.records import PreferencePair

LABEL = "flipped"
LAST = "reference_margin"  # of our own columns; those after it are labels of the data
FAR = 2.0  # from M0 in σ, on average over the steps of a pair: of normal gaps, one in twenty is farther
# the column of the score by the name of the signal, the best first as measured (docs/monitoring.md)
SIGNALS = {
    "reference": "wrong_by_reference",
    "gaps": "mislabelled",
    "posterior": "wrong_by_posterior",
    "dropped": "dropped_share",
}


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

    If the data has a column `flipped`, it prints precision and recall of every signal, of lengths and of chance.

    Args:
        run: log folder of a run with `PairAudit`.
        out: the .jsonl or .csv file to write, suspects.jsonl in RUN by default; it appears only when complete.
        count: number of pairs to list of each kind, at most; the most suspicious come first.
        by: the signal that ranks likely mislabelled pairs: the reference's own margin, the gaps, RE-PO's posterior,
            how often the filter dropped the pair; `best` takes the first, the most precise, that the run has.
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
    read = [str(path) for path in getattr(pairs.data, "files", ())]
    replaced = refuse_place("out", out, (".jsonl", ".csv"), *read)
    clean_replaced = "" if clean is None else refuse_place("clean", clean, (".jsonl",), *read)
    seen = histories.times_seen
    once = "; one look at a pair is weak evidence, above all early in the run" if seen.max() == 1 else ""
    share = histories.times_dropped.sum() / seen.sum()
    print(f"{len(histories)} pairs, each seen {span(seen)} time(s), dropped {share:.1%} of the times{once}.")
    if unseen := len(pairs.rows) - len(histories):
        print(f"Never seen, so nothing is said of them: {unseen} of {len(pairs.rows)} pairs.")
    signals = available(histories)
    right = histories.reference_margin.dropna() > 0
    doubt = f" Its reference prefers {right.mean():.0%} of the labelled responses, not clearly more than chance."
    doubt = "" if "reference" in signals or not len(right) else doubt
    if by not in ("best", "gaps", *signals):
        has = f"it has {', '.join(signals) or 'none'}.{doubt if by == 'reference' else ''}"
        raise UserError(f"by: the run has no usable signal {by!r}; {has}")
    signal = next(iter(signals), "gaps") if by == "best" else by
    if signal in signals:
        better = [name for name in list(SIGNALS)[: list(SIGNALS).index(signal)] if name not in signals]
        without = f"; the run has no usable {' or '.join(better)}" if better else ""
        print(f"Ranked by {signal}: {signals[signal]}{without}.{doubt}")
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
        really = f"about {worst.wrong_by_reference.sum():.0f} of these {len(worst)} to be really mislabelled"
        print(f"The reference takes {really}; a smaller --count lists the likeliest alone.")
    if not len(worst):
        why = "once the mean gap was above 0, every pair's gaps spoke for its label"
        if signal == "reference":
            why = "the reference prefers the labelled response of every pair"
        elif rows.groupby("step").gap.mean().max() <= 0:
            why = "the mean gap never rose above 0, so nothing had been learned yet"
        print(f"No pair looks mislabelled: {why}.")
    for label in histories.columns[histories.columns.get_loc(LAST) + 1 :]:
        print_table(suspects_by(label, histories, worst))
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
    values = histories[label].astype(object).where(histories[label].notna(), "no value")
    shares = histories.pair_id.isin(listed.pair_id).groupby(values, sort=False).agg(["size", "sum", "mean"])
    for value, size, found, share in shares.sort_values("mean", ascending=False, kind="stable").itertuples():
        table.add_row(str(value), str(size), str(found), str(wilson(share, size)))
    return table


def write_clean(file: str, pairs: PairTexts, worst: set[str], swap: bool, replaced: str) -> None:
    """Write the training data to `file` as JSON lines, without the pairs `worst` or with them swapped."""
    if any(source.weight is not None for source in getattr(pairs.data, "sources", ())):
        raise UserError("clean: data.path gives its sources weights, which one file cannot hold: take them out.")
    written, found, streams = 0, set[str](), pairs.data.streams("train") or ()
    with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for stream in streams:
            for own in stream:
                pair = replace(own, pair_id=f"{stream.name}/{own.pair_id}") if pairs.data.mixed else own
                wrong = pair.pair_id in worst
                found |= {pair.pair_id} & worst
                if not wrong or swap:
                    lines.write(json.dumps(as_row(pair, wrong), ensure_ascii=False) + "\n")
                    written += 1
        if found != worst:
            absent = f"{len(worst - found)} of the listed pairs are not in the sources, as those of a gap mixture"
            raise UserError(f"clean: {absent}: audit a run without data.gap_mixture.")
    changed = f"{len(worst)} with their responses exchanged" if swap else f"without {len(worst)}"
    print(f"{written} pairs of the training data, {changed}: {file}{replaced}")
    for stream in streams:
        if lost := stream.report.lines():
            print(f"{file} lacks, of {stream.name}: {'; '.join(lost)}")


def as_row(pair: PreferencePair, swapped: bool) -> dict[str, Any]:
    """Return a pair as a row for `data.path`; `swapped` exchanges answers, the labels of sides, and `flipped`."""
    chat = not isinstance(pair.prompt, str)  # in a message, an answer that is messages in JSON stays text
    answers = [[pair.answer(side)] if chat else getattr(pair, side) for side in ("chosen", "rejected")]
    labels = pair.labels
    if swapped:
        answers.reverse()
        other = {"chosen": "rejected", "rejected": "chosen"}
        labels = {re.sub("chosen|rejected", lambda side: other[side[0]], n): value for n, value in labels.items()}
        if (mark := labels.get(LABEL)) in (0, 1):
            labels[LABEL] = int(not mark) if type(mark) is int else not mark
    own = {"tools": pair.tools, "chat_template_kwargs": dict(pair.template_kwargs)}
    return labels | {
        "pair_id": pair.pair_id,
        "prompt": list(pair.prompt) if chat else pair.prompt,
        "chosen": answers[0],
        "rejected": answers[1],
        **{name: value for name, value in own.items() if value},
    }


def comparison(scores: dict[str, np.ndarray], extra_tokens: np.ndarray, wrong: np.ndarray, count: int) -> Table:
    """Return a table of precision and recall of every signal, of the length and of chance, by length of list."""
    total = int(wrong.sum())
    title = f"finding the {total} flipped of {len(wrong)} pairs in the first n of each list [95 % interval]"
    table = Table("first n", "list", "precision", "recall", title=title)
    shares = {f"{percent} % of all": max(1, round(len(wrong) * percent / 100)) for percent in (1, 5, 10)}
    why: dict[int, list[str]] = {}  # by length
    for name, size in {"--count": count, **shares, "as many as flipped": total}.items():
        why.setdefault(size, []).append(name)
    for size, names in sorted(why.items()):
        # the better of its two directions, which a user could not know
        by_length = max((hits(sign * extra_tokens, wrong, size) for sign in (1, -1)), key=np.mean)
        lists = {name: hits(np.nan_to_num(score, nan=-np.inf), wrong, size) for name, score in scores.items()}
        first = f"{size}: {', '.join(names)}"  # beside the first row of its group
        for name, found in {**lists, "length": by_length}.items():
            table.add_row(first, name, str(wilson(found.mean(), size)), f"{found.sum() / total:.3f}")
            first = ""
        expected = (f"{wrong.mean():.3f}", f"{size / len(wrong):.3f}")
        table.add_row(first, "random (expected)", *expected, end_section=True)
    return table


def pair_histories(audit: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair, in order of first appearance, from an audit with one row per pair and step.

    Gaps are in nats; a pair is dropped in a step that does not train on it. The scores, higher for more suspicious
    pairs, are:

    * `mislabelled`: Σ −2·max(M0, 0)·h/σ², in nats. If the gaps of correctly labelled pairs are normal with mean M0
      and deviation σ, those of swapped pairs have mean −M0, and this is the log-likelihood ratio of the two. A
      policy with M0 ≤ 0 has not learned the labels yet, so that step has no weight.
    * `outlier`: the mean of |h − M0|/σ; 0 if no step of the pair counts.
    * `wrong_by_posterior`: 1 − the mean confidence of RE-PO in the label; NaN without RE-PO.
    * `wrong_by_reference`: the probability of a flipped label by `app.method.reference_flips`, or NaN.

    M0 and σ are running moments of the gaps themselves, so that all arms, plain DPO too, are scored alike. A step
    without a finite gap or a known σ counts as seen alone. The last columns are the labels of the data that group
    its pairs (an annotator, a language), with the prefix `label_` if the name is taken.
    """
    seen = audit.sort_values("step", kind="stable")
    for name in ("reference_margin", "label_confidence"):  # audits of version 0.1 lack them
        seen[name] = pd.to_numeric(seen[name]) if name in seen else np.nan
    gap = seen.gap.astype(float)
    running, moments = RunningMoments(), {}
    for step, gaps in gap.groupby(seen.step):
        found = running.update(torch.tensor(gaps[np.isfinite(gaps)].to_numpy()))
        moments[step] = found.mean, found.std or 0.0
    mean, std = (seen.step.map({step: both[place] for step, both in moments.items()}) for place in (0, 1))
    known = gap.where(np.isfinite(gap) & (std > 1e-6))
    seen = seen.assign(
        evidence=-2 * mean.clip(lower=0) * known / std**2,
        distance=(known - mean).abs() / std,
        dropped=~seen.kept.astype(bool),
    )
    columns = {
        "times_seen": ("step", "size"),
        "times_dropped": ("dropped", "sum"),
        "first_step": ("step", "first"),
        "last_step": ("step", "last"),
        "first_gap": ("gap", "first"),
        "last_gap": ("gap", "last"),
        "mislabelled": ("evidence", "sum"),
        "outlier": ("distance", "mean"),
        "wrong_by_posterior": ("label_confidence", lambda confidence: 1.0 - confidence.mean()),
        "wrong_by_reference": ("reference_margin", "first"),
        "dropped_share": ("dropped", "mean"),
        LAST: ("reference_margin", "first"),
    }
    # not of `seen`, whose columns may have their names
    labels = audit.groupby("pair_id")[grouping_labels(audit)].first()
    own = {name: name for name in labels}
    for name in own:
        while own[name] in {*columns, "listed_as", *(other for label, other in own.items() if label != name)}:
            own[name] = f"label_{own[name]}"
    labels = labels.rename(columns=own)
    histories = seen.groupby("pair_id", sort=False).agg(**columns).join(labels)
    margins = torch.tensor(histories.reference_margin.to_numpy(float))
    fit = fitted(margins[torch.isfinite(margins)], None, 500)
    histories["wrong_by_reference"] = np.nan if fit is None else fit.probability(margins).numpy()
    return histories.reset_index().fillna({"outlier": 0.0})


def available(histories: pd.DataFrame) -> dict[str, str]:
    """Return why each signal that can rank these pairs can do so, the best signal first."""
    found, margins = {}, histories.reference_margin.dropna()
    agreement = float((margins > 0).mean())  # NaN without a margin
    # by three standard errors, for one that knows nothing of these pairs cannot tell which labels are wrong
    if agreement - 0.5 > 3 * 0.5 / max(len(margins), 1) ** 0.5:
        found["reference"] = f"the reference prefers the labelled response in {agreement:.0%} of the pairs"
    if (histories.mislabelled != 0).any():  # below 0 for a pair whose gaps speak for its label
        found["gaps"] = "the mean gap rose above 0"
    if histories.wrong_by_posterior.notna().any():
        found["posterior"] = "the run estimated the probability of every label (RE-PO)"
    if histories.dropped_share.nunique() > 1:
        found["dropped"] = "the filter dropped some pairs more often than others"
    return found


def hits(scores: np.ndarray, wrong: np.ndarray, listed: int) -> np.ndarray:
    """Return [listed] bool: whether each pair of the highest `scores` [n] is `wrong` [n]; ties keep their order."""
    if not 1 <= listed <= len(scores):
        raise ValueError(f"cannot list {listed} of {len(scores)} pairs")
    return wrong[np.argsort(-np.asarray(scores, float), kind="stable")[:listed]]
