"""The panels of groups of pairs and of runs: densities of the gap, and one number with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
import pandas as pd

from app.core.intervals import Estimate, share_over, wilson
from app.report import plot
from app.report.plot import Interval, Line, Panel, axis
from app.report.run import Run
from app.report.run_folder import grouping_labels

DENSITY_POINTS = 160
MOST_VALUES = 8  # drawn per label, the most frequent first
LABELS = {("flipped", True): "flipped on purpose", ("flipped", False): "not flipped"}


def gaps(audit: pd.DataFrame, first: float, last: float, only: str | None = None) -> np.ndarray:
    """Return the finite gaps between two fractions of the run; with `only`, of rows where that column is true."""
    low, high = audit.step.min(), audit.step.max() + 1
    part = audit[audit.step.between(low + first * (high - low), low + last * (high - low), inclusive="left")]
    if only is not None:
        part = part[part[only].eq(True)] if only in part else part.iloc[:0]
    values = part.gap.to_numpy(float)
    return values[np.isfinite(values)]


def filter_densities(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels of the gaps before and after the filter, in the second half of the run."""
    return densities(
        {
            run.name: {
                "all pairs": gaps(run.audit, 0.5, 1),
                "kept": gaps(run.audit, 0.5, 1, "kept"),
                "labels flipped on purpose": gaps(run.audit, 0.5, 1, "flipped"),
            }
            for run in runs
            if run.audit is not None and run.filters
        }
    )


def densities(by_run: Mapping[str, Mapping[str, np.ndarray]]) -> list[Panel]:
    """Return one panel per run with the densities of its groups of gaps, all on the same axes.

    The y axis ends a little above the highest peak of the groups after the first: early gaps form a peak around 0.
    """
    spread = {
        name: {group: of for group, of in groups.items() if len(of) > 1 and of.std() > 1e-9}
        for name, groups in by_run.items()
    }
    spread = {name: groups for name, groups in spread.items() if groups}
    if not spread:
        return []
    everyone = np.concatenate([of for groups in spread.values() for of in groups.values()])
    low, high = np.quantile(everyone, [0.002, 0.998])
    at = np.linspace(low, high, DENSITY_POINTS)
    drawn = {name: {group: density(of, at) for group, of in groups.items()} for name, groups in spread.items()}
    first, second, *_ = groups = list(next(iter(by_run.values())))
    styles = dict(zip(groups, (("run7", (5, 3)), ("run0", plot.SOLID), ("run4", (2, 3))), strict=False))
    peaks = [(group, curve.max()) for found in drawn.values() for group, curve in found.items()]
    top = 1.3 * max([peak for group, peak in peaks if group != first] or [peak for _, peak in peaks])
    panels = []
    for name, found in drawn.items():
        parts = [Line(group, at, y, *styles[group], fill=group in (first, second)) for group, y in found.items()]
        x = axis(alt.X, "gap h, nats", domain=[float(low), float(high)], nice=False)
        picture = plot.lines(parts, x, axis(alt.Y, "density, 1/nat", domain=[0, float(top)]))
        said = "; ".join(f"{g}: {len(of)} pairs, mean {of.mean():.2f} nats" for g, of in spread[name].items())
        panels.append(Panel(name, picture, f"{name}: {said}", "gap"))
    return panels


def density(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return a Gaussian kernel density of `values` at the points `at`, with Silverman's width (robust spread)."""
    quartiles = np.quantile(values, [0.25, 0.75])
    spread = min(values.std(), (quartiles[1] - quartiles[0]) / 1.349) or values.std()
    width = max(0.9 * spread * len(values) ** -0.2, 1e-9)
    # bins finer than the kernel bound the cost for runs with millions of pairs
    edges = np.linspace(values.min(), values.max(), min(4096, int(np.ptp(values) / width * 8) + 2))
    counts, edges = np.histogram(values, edges)
    centres = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-(((at[:, None] - centres[None]) / width) ** 2) / 2)
    return kernel @ counts / (len(values) * width * np.sqrt(2 * np.pi))


def rows_panel(
    title: str,
    rows: Sequence[tuple[str, int, Estimate]],
    unit: str,
    mark: float | None = None,
    mark_name: str = "",
    decimals: int = 3,
    **scale: float,
) -> list[Panel]:
    """Return a panel with a dot and an interval per row (name, number of the run, estimate); none without rows.

    `mark` is the value of a line to compare with.
    """
    if not rows:
        return []
    bars = [Interval(name, plot.run_colour(number), estimate) for name, number, estimate in rows]
    unit += "" if mark is None else f"; line: {mark_name}"
    said = "; ".join(f"{bar.name} {bar.estimate.text(decimals)}" for bar in bars)
    return [Panel(title, plot.intervals(bars, unit, decimals, mark, **scale), f"{title}: {said}")]


def quality(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels of held-out accuracy and of the samples' quality, with intervals."""
    panels = []
    before = next((value for run in runs if (value := run.last("val/reference_accuracy")) is not None), None)
    for title, tag, mark, mark_name in (
        ("reward accuracy on held-out pairs", "val/reward_accuracy", 0.5, "before training"),
        ("held-out pairs that the policy itself ranks right", "val/policy_accuracy", before, "the SFT model"),
    ):
        rows = [
            (run.name, number, wilson(mean, round(pairs)))
            for number, run in enumerate(runs)
            if (mean := run.last(tag)) is not None and (pairs := run.last("val/pairs"))
        ]
        panels += rows_panel(title, rows, "share of pairs", mark, mark_name)
    for name, unit in (
        ("win rate", "share of prompts"),
        ("mean true reward", "reward of an answer"),
        ("malformed share", "share of answers"),
        ("KL to the reference", "nats per answer"),
    ):
        rows = [(run.name, number, run.samples[name]) for number, run in enumerate(runs) if name in run.samples]
        sft = next((run.baseline[name].mean for run in runs if name in run.baseline), None)
        mark, mark_name = (0.5, "a draw") if name == "win rate" else (sft, "the SFT model")
        title = "win rate over the SFT model" if name == "win rate" else f"sampled answers: {name}"
        panels += rows_panel(title, rows, unit, mark, mark_name)
    return panels


def dropped(run: Run, number: int) -> list[Panel]:
    """Return the panels of the share dropped by the filter, per label of the data and per ranking by the policy."""
    if run.audit is None or not run.filters:
        return []
    audit = run.audit.assign(policy=np.where(run.audit.gap > 0, "ranked right", "not ranked right"))
    everyone = float((~audit.kept).mean())
    panels = []
    for label in (*grouping_labels(run.audit), "policy"):
        rows = []
        pairs = audit.groupby(label).pair_id.nunique()
        for value, count in pairs.nlargest(MOST_VALUES).items():
            of = audit[audit[label].eq(value)]
            name = f"{LABELS.get((label, value), shortened(str(value)))}, {count:,} pairs"
            rows.append((name, number, share_over(of.pair_id.to_numpy(), ~of.kept)))
        by = "the policy's own ranking" if label == "policy" else label
        only = f", {MOST_VALUES} most frequent of {len(pairs)} values" if len(pairs) > MOST_VALUES else ""
        title = f"{run.name}: dropped by {by}{only}"
        panels += rows_panel(title, rows, "share dropped", everyone, "all pairs", domainMin=0)
    return panels


def shortened(text: str) -> str:
    """Return `text`, cut to 20 characters so that it fits beside the numbers of its row."""
    return text if len(text) <= 20 else f"{text[:19]}…"


def speed(runs: Sequence[Run], unit: str) -> list[Panel]:
    """Return the panel of the median step and the middle 80 % of steps."""
    tag = f"train/{unit.replace(' ', '_')}"
    rows = [
        (run.name, number, Estimate(*np.quantile(values, [0.5, 0.1, 0.9]).tolist()))
        for number, run in enumerate(runs)
        if len(values := run.part(tag, 0, 1))
    ]
    return rows_panel(unit, rows, f"{unit}, 10 % to 90 % of steps", decimals=0, domainMin=0)
