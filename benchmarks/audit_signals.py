"""Measure how well each signal of the audit finds labels that were flipped on purpose, pooled over seeds.

python -m benchmarks.audit_signals                                            # the controlled task, 15 % flipped
python -m benchmarks.audit_signals --pairs hh.jsonl.gz --count 200            # the model's own margin, 20 % flipped

Each seed of the controlled task draws its own pairs and flips, and trains β-DPO, and plain DPO with RE-PO. On pairs
of people nothing is trained: `predict` scores the pairs once, and each seed flips a fifth of them; what training
adds there is a question of benchmarks.study. A run or score in `--out` is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from app.commands import quickstart
from app.commands.audit import LABEL
from app.commands.suspects import SIGNALS, available, hits, pair_histories
from app.core.intervals import wilson
from app.report.run_folder import read_audit
from benchmarks.study.real_pairs import drawn, write
from benchmarks.tables import markdown

SHARES = (0.01, 0.05, 0.1)
HEAD = [f"first {share:.0%}: precision, recall" for share in SHARES]
RE_PO = ("--confidence", "AnnotatorReliability")
ARMS: dict[str, tuple[str, ...]] = {"beta_dpo": (), "dpo_re_po": ("--config", "method/dpo", *RE_PO)}


def train(folder: Path, seed: int) -> None:
    """Train the arms of one seed into `folder`."""
    # the quickstart as it was when docs/monitoring.md was written
    words = ["--model.beta0", "0.1", "--model.optimizer.init_args.lr", "2.2e-5"]
    words += ["--data.pairs", "14080", "--data.broken_share", "0.25", "--model.name", str(folder / "sft-model")]
    if not (folder / "sft-model").exists():
        quickstart.train("quickstart_sft", "sft", folder / "sft-model", [], seed, folder)
    for arm, more in ARMS.items():
        if not (folder / arm).exists():
            quickstart.fit("quickstart", arm, [*words, *more, "--dashboard", "null"], seed, folder)


def area(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Return the probability that a wrong label [n] has a higher score [n] than a right one; a tie counts half."""
    ranks = pd.Series(scores).rank().to_numpy()[wrong]
    count = len(ranks)
    return float((ranks.sum() - count * (count + 1) / 2) / (count * (len(wrong) - count)))


def calibration(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Return the mean distance of probability and share of wrong labels over ten bins of as many pairs each."""
    bins = np.array_split(np.argsort(scores), 10)
    return float(np.mean([abs(scores[some].mean() - wrong[some].mean()) for some in bins]))


def measured(run: Path) -> dict[str, tuple[bool, float, float, list[np.ndarray], int]]:
    """Return of every signal: whether it is offered, area, calibration, hits per share, number of wrong labels."""
    audit = read_audit(run)
    histories = pair_histories(audit)
    wrong = audit.groupby("pair_id", sort=False)[LABEL].first().to_numpy().astype(bool)
    found = {}
    for name, column in SIGNALS.items():
        if histories[column].notna().any():
            scores = np.nan_to_num(histories[column].to_numpy(float), nan=-np.inf)
            lists = [hits(scores, wrong, max(1, round(len(wrong) * share))) for share in SHARES]
            error = calibration(scores, wrong) if column.startswith("wrong_by") else float("nan")
            found[name] = name in available(histories), area(scores, wrong), error, lists, int(wrong.sum())
    return found


def table(folders: list[Path], arm: str) -> str:
    """Return area, precision and recall of every signal of an arm, pooled over the seeds' folders."""
    runs = [measured(folder / arm) for folder in folders]
    rows = []
    for name in runs[0]:
        usable, areas, errors, lists, wrong = zip(*(run[name] for run in runs), strict=True)
        error = "–" if np.isnan(errors).any() else f"{np.mean(errors):.3f}"
        rows.append([name, f"{sum(usable)} of {len(runs)}", error, *pooled_row(areas, lists, sum(wrong))])
    return markdown([arm, "offered", "calibration error", "area (lowest–highest)", *HEAD], rows)


def reference_alone(folder: Path, options: argparse.Namespace) -> str:
    """Return how often the model prefers people's choice, and the table of its margin per token as a signal."""
    data, file = folder / "pairs.jsonl", folder / "scores.parquet"
    if not file.exists():
        pairs = drawn(options.pairs, options.longest, np.random.default_rng(options.seeds[0]))[: options.count]
        write(data, pairs, np.zeros(len(pairs), bool))
        words = ["--config", "own_pairs", "--config", "loss/simpo", "--model.name", options.model]
        words += ["--data.path", str(data), "--data.validation_share", "0", "--trainer.accelerator", "cpu"]
        quickstart.command("predict", *words, "--scores.path", str(file))
    ids = [json.loads(line)["pair_id"] for line in data.open(encoding="utf-8")]
    scores = pd.read_parquet(file).set_index("pair_id").loc[ids]
    chosen, rejected = (scores[f"policy_{s}_logp"] / scores[f"{s}_tokens"] for s in ("chosen", "rejected"))
    margin = (chosen - rejected).to_numpy()
    areas, lists, count = [], [], round(0.2 * len(margin))
    for seed in options.seeds:
        wrong = np.random.default_rng(seed).permutation(len(margin)) < count
        doubt = np.where(wrong, margin, -margin)
        areas.append(area(doubt, wrong))
        lists.append([hits(doubt, wrong, max(1, round(len(wrong) * share))) for share in SHARES])
    row = pooled_row(areas, lists, count * len(areas))
    head = f"The model prefers the choice of people in {(margin > 0).mean():.1%} of {len(margin)} pairs.\n\n"
    return head + markdown(["", "area (lowest–highest)", *HEAD], [["reference", *row]])


def pooled_row(areas: Sequence[float], lists: Sequence[Sequence[np.ndarray]], wrong: int) -> list[str]:
    """Return the cells of a signal: its area, then precision and recall of the lists of all seeds together."""
    pooled = [np.concatenate(found) for found in zip(*lists, strict=True)]
    cells = [f"{wilson(hit.mean(), len(hit))}, {hit.sum() / wrong:.3f}" for hit in pooled]
    return [f"{np.mean(areas):.3f} ({min(areas):.3f}–{max(areas):.3f})", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[71, 72, 73])
    parser.add_argument("--pairs", help="a file of pairs; none: the controlled task")
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--count", type=int, default=160, help="pairs of people")
    parser.add_argument("--longest", type=int, default=350, help="characters of a pair, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/audit_signals"))
    options = parser.parse_args()
    task = options.out / (Path(options.pairs).name.split(".")[0] if options.pairs else "controlled")
    if options.pairs:
        print(reference_alone(task, options))
        return
    folders = [task / str(seed) for seed in options.seeds]
    for folder, seed in zip(folders, options.seeds, strict=True):
        train(folder, seed)
    print("\n\n".join(table(folders, arm) for arm in ARMS))


if __name__ == "__main__":
    main()
