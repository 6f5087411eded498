"""The panels of the report: curves over the step, β against the gap, densities, numbers with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from app.core.intervals import Estimate, digits, share_over, span, wilson
from app.report import plot
from app.report.plot import Interval, Line, Panel, axis
from app.report.run import Run, grouping_labels

MOST_POINTS = 400  # drawn per curve; longer curves are averaged over groups of consecutive points
SMOOTHING = 25  # the heavy line is a running mean over 1/SMOOTHING of the curve
MOST_DOTS = 500  # per run; more would overlap
STEP = axis(alt.X, "optimizer step", nice=False)
BOUNDS = {"beta/base": "β0", "beta/floor": "floor", "beta/ceiling": "ceiling"}
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


def thinned(curve: pd.Series) -> pd.Series:
    """Return `curve` with at most MOST_POINTS points, each the mean of equally many (at the end fewer) points."""
    group = np.arange(len(curve)) // -(-len(curve) // MOST_POINTS)
    return curve.groupby(group).mean().set_axis(curve.index.to_series().groupby(group).mean())


def smoothed(curve: pd.Series) -> pd.Series:
    """Return a centred running mean over 1/SMOOTHING of the points, over fewer at the ends; NaN is ignored."""
    return curve.rolling(len(curve) // SMOOTHING // 2 * 2 + 1, center=True, min_periods=1).mean()


def beta(runs: Sequence[Run]) -> list[Panel]:
    """Return the panel of the β used, with β0 and the bounds."""
    return curves(runs, {"beta/used": ""}, "β used", rules=bounds(runs), domainMin=0)


def accuracy(runs: Sequence[Run]) -> list[Panel]:
    """Return the panel of the accuracy of training pairs, with dots for held-out pairs."""
    tags = {"train/reward_accuracy": "", "val/reward_accuracy": "held-out pairs"}
    return curves(runs, tags, "share ranked right", "training and held-out pairs", domainMax=1)


def drift(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels of the log-ratios and of the KL to the reference, of both responses."""
    ratios, kl = ({f"train/{name}_{side}": side for side in ("chosen", "rejected")} for name in ("log_ratio", "kl"))
    return [
        *curves(runs, ratios, "log-ratio, nats", "displacement: log π − log π_ref", raw=False),
        *curves(runs, kl, "KL, nats", "KL to the reference per response", raw=False, domainMin=0),
    ]


def curves(
    runs: Sequence[Run],
    tags: Mapping[str, str],
    unit: str,
    title: str = "",
    raw: bool = True,
    rules: Iterable[tuple[float, str]] = (),
    **scale: float,
) -> list[Panel]:
    """Return the panel of the curves `tags` of all runs, smoothed over the unsmoothed ones if `raw`; none without.

    `tags` maps a curve to its name beside the run's: the second is thin, in another dash; one of held-out pairs is
    dots, as is one of too few values for a line. `rules` are drawn across the panel.
    """
    parts = []
    for number, run in enumerate(runs):
        for place, (tag, name) in enumerate(tags.items()):
            if tag not in run.curves:
                continue
            curve, validation = thinned(run.curves[tag]), tag.startswith("val/")
            mean = curve if validation else smoothed(curve)
            parts.append(
                Line(
                    f"{run.name}, {name}" if name else run.name,
                    mean.index,
                    mean.to_numpy(),
                    plot.run_colour(number),
                    (2, 4) if validation else plot.DASHES[(number + 2 * place) % 8],
                    width=0 if validation else 1.2 if place else 2.4,
                    faint=curve.to_numpy() if raw and not validation else None,
                    dots=validation or len(mean) < 3,
                )
            )
    said = "; ".join(f"{part.name} ends at {digits(part.y[-1])}" for part in parts)
    thick = raw and any(len(part.x) >= 2 * SMOOTHING for part in parts)  # shorter curves are drawn as they are
    y = axis(alt.Y, f"{unit} (thick: smoothed)" if thick else unit, **scale)
    return panel(title, parts, STEP, y, f"{unit} over the run: {said}", rules)


def panel(
    title: str, parts: Sequence[Line], x: Any, y: Any, said: str, rules: Iterable[tuple[float, str]] = ()
) -> list[Panel]:
    """Return the panel of `parts` with `rules` across it; none without parts. Values are read along the steps."""
    if not parts:
        return []
    picture = plot.lines(parts, x, y)
    for value, name in rules:
        picture += plot.rule(value, name)
    return [Panel(title, picture, said, "step" if x is STEP else "")]


def bounds(runs: Sequence[Run]) -> list[tuple[float, str]]:
    """Return β0 and the bounds that are near the β used; runs with equal values share one line."""
    highest = max((run.curves["beta/used"].max() for run in runs if "beta/used" in run.curves), default=0.0)
    found = {(v, name) for run in runs for tag, name in BOUNDS.items() if (v := run.last(tag)) is not None}
    return [(value, name) for value, name in sorted(found) if value <= 1.05 * highest]


def band(run: Run, number: int) -> list[Panel]:
    """Return one run's panel of batch means against M0 ± σ, in the units of M; none without a gap."""
    batch = run.curves.get("band/batch_mean", run.curves.get("gap/mean"))
    if batch is None:
        return []
    parts, title = [], f"{run.name} (keeps no running mean)"
    if {"gap/running_mean", "gap/running_std"} <= run.curves.keys():
        mean, std = run.curves["gap/running_mean"], run.curves["gap/running_std"]
        low, centre, high = (thinned(curve) for curve in (mean - std, mean, mean + std))
        edges = (low.to_numpy(), high.to_numpy())
        parts.append(Line("running mean M0 ± σ", centre.index, centre.to_numpy(), "ink", width=1.6, band=edges))
        title = run.name
    drawn = thinned(batch)
    parts.append(Line("mean gap of the batch", drawn.index, drawn.to_numpy(), plot.run_colour(number), width=1.2))
    said = f"{run.name}: mean gap per batch, from {digits(drawn.iloc[0])} to {digits(drawn.iloc[-1])} nats"
    return panel(title, parts, STEP, axis(alt.Y, "gap, nats"), said)


def response(runs: Sequence[Run]) -> list[Panel]:
    """Return the panel of each batch's β against its mean gap."""
    parts, said = [], []
    for number, run in enumerate(runs):
        if {"beta/used", "gap/mean"} <= run.curves.keys():
            both = pd.concat([run.curves["gap/mean"], run.curves["beta/used"]], axis=1, join="inner").to_numpy()
            if not len(both):
                continue
            both = both[np.unique(np.linspace(0, len(both) - 1, min(len(both), MOST_DOTS)).astype(int))]
            parts.append(Line(run.name, both[:, 0], both[:, 1], plot.run_colour(number), width=0, dots=True))
            said.append(f"{run.name}: β {span(both[:, 1])}")
    x, y = axis(alt.X, "mean gap of the batch, nats"), axis(alt.Y, "β used", domainMin=0)
    return panel("", parts, x, y, f"β against the mean gap of the batch. {'; '.join(said)}", bounds(runs))


def gaps(audit: pd.DataFrame, first: float, last: float, only: str | None) -> np.ndarray:
    """Return the finite gaps between two fractions of the run; with `only`, of rows where that column is true."""
    low, high = audit.step.min(), audit.step.max() + 1
    part = audit[audit.step.between(low + first * (high - low), low + last * (high - low), inclusive="left")]
    if only is not None:
        part = part[part[only].eq(True)] if only in part else part.iloc[:0]
    return part.gap.dropna().to_numpy(float)


def densities(runs: Sequence[Run], groups: Groups) -> list[Panel]:
    """Return a panel for each run with an audit: the densities of its `groups` of gaps, all on the same axes."""
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
    # a little above the highest peak of the groups after the first, because early gaps form a peak around 0
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
        title = f"{run.name}: share dropped, by {label}{only}"
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
