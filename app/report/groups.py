"""The panels of groups of pairs and of runs: densities of the gap, and one number with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from app.core.intervals import Estimate, share_over, wilson
from app.report import plot
from app.report.plot import Interval, Line, Panel, axis
from app.report.run import Run, grouping_labels

DENSITY_POINTS = 160
OWN_RANKING = "the policy's own ranking"  # beside the labels of the data
MOST_VALUES = 8  # drawn per label, the most frequent first
LABELS = {("flipped", True): "flipped on purpose", ("flipped", False): "not flipped"}
# name of a group of gaps → the fractions of the run between which it lies, and the column that must be true
Groups = Mapping[str, tuple[float, float, str | None]]
TRAINING: Groups = {"first quarter of the steps": (0, 0.25, None), "last quarter": (0.75, 1, None)}
FILTER: Groups = {
    "all pairs": (0.5, 1, None),
    "kept": (0.5, 1, "kept"),
    "labels flipped on purpose": (0.5, 1, "flipped"),
}
Rows = Sequence[tuple[str, int, Estimate]]  # name of a row, number of the run, estimate
# of the groups in their order
STYLES: tuple[dict[str, Any], ...] = (
    {"colour": "run7", "dash": (5, 3), "fill": True},
    {"colour": "run0", "fill": True},
    {"colour": "run4", "dash": (2, 3)},
)


def gaps(audit: pd.DataFrame, first: float, last: float, only: str | None) -> np.ndarray:
    """Return the finite gaps between two fractions of the run; with `only`, of rows where that column is true."""
    low, high = audit.step.min(), audit.step.max() + 1
    part = audit[audit.step.between(low + first * (high - low), low + last * (high - low), inclusive="left")]
    if only is not None:
        part = part[part[only].eq(True)] if only in part else part.iloc[:0]
    values = part.gap.to_numpy(float)
    return values[np.isfinite(values)]


def densities(runs: Sequence[Run], groups: Groups) -> list[Panel]:
    """Return a panel for each run with an audit: the densities of its `groups` of gaps, all on the same axes.

    The y axis ends a little above the highest peak of the groups after the first: early gaps form a peak around 0.
    """
    found = {}  # run → group → its gaps, of which a density needs two that differ
    for one in runs:
        each = {} if one.audit is None else {name: gaps(one.audit, *group) for name, group in groups.items()}
        if spread := {name: of for name, of in each.items() if len(of) > 1 and of.std() > 1e-9}:
            found[one.name] = spread
    if not found:
        return []
    everyone = np.concatenate([of for spread in found.values() for of in spread.values()])
    low, high = np.quantile(everyone, [0.002, 0.998]).tolist()
    at = np.linspace(low, high, DENSITY_POINTS)
    styles = dict(zip(groups, STYLES, strict=False))
    lines = {
        run: [Line(name, at, density(of, at), **styles[name]) for name, of in spread.items()]
        for run, spread in found.items()
    }
    peaks = [(line.name, float(np.max(line.y))) for some in lines.values() for line in some]
    top = 1.3 * max([peak for name, peak in peaks if name != next(iter(groups))] or [peak for _, peak in peaks])
    x = axis(alt.X, "gap h, nats", domain=[low, high], nice=False)
    y = axis(alt.Y, "density, 1/nat", domain=[0, top])
    panels = []
    for run, spread in found.items():
        said = "; ".join(f"{name}: {len(of)} pairs, mean {of.mean():.2f} nats" for name, of in spread.items())
        panels.append(Panel(run, plot.lines(lines[run], x, y), f"{run}: {said}", "gap"))
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
    rows: Rows,
    unit: str,
    mark: tuple[float | None, str] = (None, ""),
    decimals: int = 3,
    **scale: float,
) -> list[Panel]:
    """Return a panel with a dot and an interval per row; none without rows."""
    if not rows:
        return []
    bars = [Interval(name, plot.run_colour(number), estimate) for name, number, estimate in rows]
    value, name = mark
    unit += "" if value is None else f"; line: {name}"
    said = "; ".join(f"{bar.name} {bar.estimate.text(decimals)}" for bar in bars)
    return [Panel(title, plot.intervals(bars, unit, decimals, value, **scale), f"{title}: {said}")]


def quality(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels of held-out accuracy and of the samples' quality, with intervals."""
    panels = []
    before = next((value for run in runs if (value := run.last("val/reference_accuracy")) is not None), None)
    for title, tag, mark in (
        ("reward accuracy on held-out pairs", "val/reward_accuracy", (0.5, "before training")),
        ("held-out pairs that the policy itself ranks right", "val/policy_accuracy", (before, "the SFT model")),
    ):
        rows = [
            (run.name, number, wilson(mean, round(pairs)))
            for number, run in enumerate(runs)
            if (mean := run.last(tag)) is not None and (pairs := run.last("val/pairs"))
        ]
        panels += rows_panel(title, rows, "share of pairs", mark)
    for name, unit in (
        ("win rate", "share of prompts"),
        ("mean true reward", "reward of an answer"),
        ("malformed share", "share of answers"),
        ("KL to the reference", "nats per answer"),
    ):
        rows = [(run.name, number, run.samples[name]) for number, run in enumerate(runs) if name in run.samples]
        title = f"sampled answers: {name}"
        mark = next((run.baseline[name].mean for run in runs if name in run.baseline), None), "the SFT model"
        if name == "win rate":
            title, mark = "win rate over the SFT model", (0.5, "a draw")
        panels += rows_panel(title, rows, unit, mark)
    return panels


def dropped(run: Run, number: int) -> list[Panel]:
    """Return the panels of the share dropped by the filter, per label of the data and per ranking by the policy."""
    if run.audit is None or not run.filters:
        return []
    ranking = np.where(run.audit.gap > 0, "ranked right", "not ranked right")
    audit = run.audit.assign(**{OWN_RANKING: ranking})
    panels = []
    for label in (*grouping_labels(run.audit), OWN_RANKING):
        rows = []
        pairs = audit.groupby(label).pair_id.nunique()
        drawn = pairs.nlargest(MOST_VALUES)
        for value, count in (drawn.sort_index() if is_numeric_dtype(drawn.index) else drawn).items():
            of = audit[audit[label].eq(value)]
            name = LABELS.get((label, value), str(value))
            name = name if len(name) <= 20 else f"{name[:19]}…"  # fits beside the numbers of its row
            rows.append((f"{name}, {count:,} pairs", number, share_over(of.pair_id.to_numpy(), ~of.kept)))
        only = f", {MOST_VALUES} most frequent of {len(pairs)} values" if len(pairs) > MOST_VALUES else ""
        title = f"{run.name}: dropped by {label}{only}"
        everyone = (float((~audit.kept).mean()), "all pairs")
        panels += rows_panel(title, rows, "share dropped", everyone, domainMin=0)
    return panels


def speed(runs: Sequence[Run], unit: str) -> list[Panel]:
    """Return the panel of the median step and the middle 80 % of steps."""
    tag = f"train/{unit.replace(' ', '_')}"
    rows = [
        (run.name, number, Estimate(*np.quantile(values, [0.5, 0.1, 0.9]).tolist()))
        for number, run in enumerate(runs)
        if len(values := run.part(tag, 0, 1))
    ]
    return rows_panel(unit, rows, f"{unit}, 10 % to 90 % of steps", decimals=0, domainMin=0)
