"""The charts of single pairs and batches: densities of the gap, and β against the gap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from app.report import svg
from app.report.chart import Chart, Panel, readout, style_of
from app.report.curve_charts import BETA_RULES, key_of, rules_across
from app.report.run import Curve, Run

POINTS = 160  # per drawn density
MOST_DOTS = 500  # per run; more would overlap


class Group(NamedTuple):
    """A group of pairs whose gaps are drawn as one density."""

    name: str
    style: str
    gaps: np.ndarray


def training_density_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the gap distribution early and late in training."""
    return densities(
        {
            run.name: [
                Group("first quarter of the steps", "early", gaps(run.audit, 0, 0.25)),
                Group("last quarter", "late", gaps(run.audit, 0.75, 1)),
            ]
            for run in runs
            if run.audit is not None
        },
        "density",
        "Reward gaps before and after training",
        "How the gaps h of single pairs are spread (the paper's reward discrepancy), measured before each pair's "
        "own step. An untrained policy has all of them at 0; a good run moves the bulk to the right of 0. What "
        "stays on the left is mislabelled, or not learned yet. A long tail on either side pulls a β that follows "
        "the mean. The peak of the first quarter is cut off.",
    )


def filter_density_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the gap distribution before and after the filter."""
    return densities(
        {
            run.name: [
                Group("all pairs", "early", gaps(run.audit, 0.5, 1)),
                Group("kept", "late", gaps(run.audit, 0.5, 1, "kept")),
                Group("labels flipped on purpose", "wrong", gaps(run.audit, 0.5, 1, "flipped")),
            ]
            for run in runs
            if run.audit is not None and run.filters
        },
        "kept",
        "Reward gaps before and after the filter",
        "The second half of the run: the gaps of all pairs, and of those that the filter kept to train on. It "
        "should cut both tails and leave the middle.",
    )


def gaps(audit: pd.DataFrame, first: float, last: float, only: str | None = None) -> np.ndarray:
    """Return the finite gaps between two fractions of the run; with `only`, of rows where that column is true."""
    low, high = audit.step.min(), audit.step.max() + 1
    part = audit[audit.step.between(low + first * (high - low), low + last * (high - low), inclusive="left")]
    if only is not None:
        part = part[part[only].eq(True)] if only in part else part.iloc[:0]
    values = part.gap.to_numpy(float)
    return values[np.isfinite(values)]


def densities(by_run: dict[str, list[Group]], anchor: str, title: str, text: str) -> Chart | None:
    """Return a chart with one panel per run, all on the same axes; None if no group has a spread."""
    spread = {
        name: [group for group in groups if len(group.gaps) > 1 and group.gaps.std() > 1e-9]
        for name, groups in by_run.items()
    }
    by_run = {name: groups for name, groups in spread.items() if groups}
    if not by_run:
        return None
    everyone = np.concatenate([group.gaps for groups in by_run.values() for group in groups])
    low, high = np.quantile(everyone, [0.002, 0.998])
    at = np.linspace(low, high, POINTS)
    curves = {name: [density(group.gaps, at) for group in groups] for name, groups in by_run.items()}
    x = svg.horizontal(at, margin=0.0)
    # early in training the gaps form one high peak around 0; the axis cuts it off to keep the rest visible
    peaks = {group.style: 0.0 for groups in by_run.values() for group in groups}
    for name, groups in by_run.items():
        for group, curve in zip(groups, curves[name], strict=True):
            peaks[group.style] = max(peaks[group.style], float(curve.max()))
    tallest = max([peak for style, peak in peaks.items() if style != "early"] or peaks.values())
    y = svg.vertical([], low=0.0, high=1.3 * tallest)
    panels = []
    for name, groups in by_run.items():
        parts = [svg.axes(x, y, "gap h, nats", "density, 1/nat"), svg.rule(0.0, "zero", x=x)]
        for group, whole in zip(groups, curves[name], strict=True):
            curve = np.minimum(whole, y.high)
            if group.style != "wrong":
                parts.append(svg.area(x, y, at, np.zeros_like(at), curve, group.style))
            parts.append(svg.line(x, y, at, curve, group.style))
        means = "; ".join(f"{g.name}: {len(g.gaps)} pairs, mean {g.gaps.mean():.2f} nats" for g in groups)
        named = [(group.name, Curve(at, curve)) for group, curve in zip(groups, curves[name], strict=True)]
        panels.append(Panel(name, svg.drawing(f"{name}: {means}", *parts), readout(x, "gap", named)))
    key = dict.fromkeys((group.name, group.style) for groups in by_run.values() for group in groups)
    return Chart(anchor, title, text, panels, list(key))


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


def response_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of each batch's β against its mean gap."""
    drawn = []
    for number, run in enumerate(runs):
        beta, gap = run.curve("beta/used"), run.curve("gap/mean")
        if beta is not None and gap is not None:
            steps, of_beta, of_gap = np.intersect1d(beta.steps, gap.steps, return_indices=True)
            some = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_DOTS)).astype(int))
            drawn.append((run, number, gap.values[of_gap[some]], beta.values[of_beta[some]]))
    if not drawn:
        return None
    x = svg.horizontal(np.concatenate([gap for _, _, gap, _ in drawn]))
    y = svg.vertical(np.concatenate([beta for *_, beta in drawn]), low=0.0)
    parts = [svg.axes(x, y, "mean gap of the batch, nats", "β used")]
    parts += [svg.dots(x, y, gap, beta, style_of(number)) for _, number, gap, beta in drawn]
    parts += rules_across(runs, BETA_RULES, y)
    said = "; ".join(f"{run.name}: β {np.nanmin(b):.3g} to {np.nanmax(b):.3g}" for run, _, _, b in drawn)
    return Chart(
        "response",
        "β against the gap of the batch",
        "One dot a step. β rises with the gap, but what counts is the distance to the running mean, which moves: "
        "hence a cloud and no line. Dots in a row at the bottom: β is at its floor. A flat row at β0 is a run "
        "without a β schedule.",
        [Panel("", svg.drawing(f"β against the mean gap of the batch. {said}", *parts))],
        key_of(runs, ["beta/used"]),
    )
