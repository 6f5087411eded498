"""Measure how well each signal of the audit finds labels that were flipped on purpose, pooled over seeds.

Each seed of the controlled task draws its own pairs and flips 15 % of them, and trains β-DPO, and plain DPO with
RE-PO. A run in `--out` is not made again. Pairs of people are question (j) of benchmarks.study.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from app.commands import quickstart
from app.commands.audit import LABEL, SIGNALS, available, hits, pair_histories
from app.core.intervals import wilson
from benchmarks.tables import markdown
from callbacks.pair_audit import read_audit

SHARES = (0.01, 0.05, 0.1)
HEAD = [f"first {share:.0%}: precision, recall" for share in SHARES]
RE_PO = ("--confidence", "AnnotatorReliability")
ARMS: dict[str, tuple[str, ...]] = {"beta_dpo": (), "dpo_re_po": ("--config", "method/dpo", *RE_PO)}


def train(folder: Path, seed: int) -> None:
    """Train the arms of one seed into `folder`."""
    # the quickstart as it was when docs/monitoring.md was written
    words = ["--config", "quickstart", "--model.beta0", "0.1", "--model.optimizer.init_args.lr", "2.2e-5"]
    words += ["--data.pairs", "14080", "--data.broken_share", "0.25", "--model.name", str(folder / "sft-model")]
    if not (folder / "sft-model").exists():
        quickstart.train("sft", seed, folder, "--config", "quickstart_sft")
    for arm, more in ARMS.items():
        if not (folder / arm).exists():
            quickstart.train(arm, seed, folder, *words, *more, "--dashboard", "null")


def area(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Return the probability that a wrong label [n] has a higher score [n] than a right one; a tie counts half."""
    return float(stats.mannwhitneyu(scores[wrong], scores[~wrong]).statistic / (wrong.sum() * (~wrong).sum()))


def calibration(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Return the mean distance of probability and share of wrong labels over ten bins of as many pairs each."""
    bins = np.array_split(np.argsort(scores), 10)
    return float(np.mean([abs(scores[some].mean() - wrong[some].mean()) for some in bins]))


def table(runs: Sequence[Path], arm: str) -> str:
    """Return area, precision and recall of every signal of an arm, pooled over its runs."""
    audits = [read_audit(run) for run in runs]
    histories = [pair_histories(audit) for audit in audits]
    wrongs = [audit.groupby("pair_id", sort=False)[LABEL].first().to_numpy().astype(bool) for audit in audits]
    rows = []
    for name, column in SIGNALS.items():
        if any(history[column].isna().all() for history in histories):
            continue
        scores = [np.nan_to_num(history[column].to_numpy(float), nan=-np.inf) for history in histories]
        both = list(zip(scores, wrongs, strict=True))
        areas = [area(score, wrong) for score, wrong in both]
        error = f"{np.mean([calibration(*each) for each in both]):.3f}" if column.startswith("wrong_by") else "–"
        offered = sum(name in available(history) for history in histories)
        cells = []
        for share in SHARES:
            hit = np.concatenate([hits(score, wrong, max(1, round(len(wrong) * share))) for score, wrong in both])
            cells.append(f"{wilson(hit.mean(), len(hit))}, {hit.sum() / np.concatenate(wrongs).sum():.3f}")
        spread = f"{np.mean(areas):.3f} ({min(areas):.3f}–{max(areas):.3f})"
        rows.append([name, f"{offered} of {len(runs)}", error, spread, *cells])
    return markdown([arm, "offered", "calibration error", "area (lowest–highest)", *HEAD], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[71, 72, 73])
    parser.add_argument("--out", type=Path, default=Path("runs/audit_signals/controlled"))
    options = parser.parse_args()
    for seed in options.seeds:
        train(options.out / str(seed), seed)
    print("\n\n".join(table([options.out / str(seed) / arm for seed in options.seeds], arm) for arm in ARMS))


if __name__ == "__main__":
    main()
