"""The panels of curves over the optimizer step, and of β against the gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import altair as alt
import numpy as np
import pandas as pd

from app.report import plot
from app.report.plot import Line, Panel, axis
from app.report.run import Curve, Run

MOST_POINTS = 400  # drawn per curve; longer curves are averaged over groups of consecutive points
SMOOTHING = 25  # the heavy line is a running mean over 1/SMOOTHING of the curve
MOST_DOTS = 500  # per run; more would overlap
BOUNDS = {"beta/base": "β0", "beta/floor": "floor", "beta/ceiling": "ceiling"}


def thinned(curve: Curve) -> Curve:
    """Return `curve` with at most MOST_POINTS points, each the mean of equally many (at the end fewer) points."""
    group = np.arange(len(curve.values)) // -(-len(curve.values) // MOST_POINTS or 1)
    means = pd.DataFrame({"steps": curve.steps, "values": curve.values}).groupby(group).mean()
    return Curve(means["steps"].to_numpy(), means["values"].to_numpy())


def smoothed(curve: Curve) -> Curve:
    """Return a centred running mean over 1/SMOOTHING of the points, over fewer at the ends; NaN is ignored."""
    width = len(curve.values) // SMOOTHING // 2 * 2 + 1
    return Curve(curve.steps, pd.Series(curve.values).rolling(width, center=True, min_periods=1).mean().to_numpy())


def beta(runs: Sequence[Run]) -> list[Panel]:
    """Return the panel of the β used, with β0 and the bounds."""
    return curves(runs, {"beta/used": ""}, "β used", rules=bounds(runs), domainMin=0)


def accuracy(runs: Sequence[Run]) -> list[Panel]:
    """Return the panel of the accuracy of training pairs, with dots for held-out pairs."""
    return curves(
        runs,
        {"train/reward_accuracy": "", "val/reward_accuracy": "held-out pairs"},
        "share ranked right",
        "training and held-out pairs",
        domainMax=1,
    )


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

    `tags` maps a curve to its name beside the run's: the second is thin, one of held-out pairs is dots. `rules` are
    drawn across the panel.
    """
    parts = []
    for number, run in enumerate(runs):
        for place, (tag, name) in enumerate(tags.items()):
            if (whole := run.curve(tag)) is None:
                continue
            curve = thinned(whole)
            validation = tag.startswith("val/")
            mean = curve if validation else smoothed(curve)
            parts.append(
                Line(
                    f"{run.name}, {name}" if name else run.name,
                    *mean,
                    plot.run_colour(number),
                    (2, 4) if validation else plot.DASHES[number % 8],
                    width=0 if validation else 1.2 if place else 2.4,
                    faint=curve.values if raw and not validation else None,
                    dots=validation,
                )
            )
    if not parts:
        return []
    picture = plot.lines(parts, axis(alt.X, "optimizer step", nice=False), axis(alt.Y, unit, **scale))
    for value, name in rules:
        picture += plot.rule(value, name)
    said = "; ".join(f"{part.name} ends at {part.y[-1]:.3g}" for part in parts)
    return [Panel(title, picture, f"{unit} over the run: {said}", "step")]


def bounds(runs: Sequence[Run]) -> list[tuple[float, str]]:
    """Return β0 and the bounds that are near the β used; runs with equal values share one line."""
    used = [curve.values for run in runs if (curve := run.curve("beta/used")) is not None]
    highest = np.nanmax(np.concatenate(used)) if used else 0.0
    found = {(v, name) for run in runs for tag, name in BOUNDS.items() if (v := run.last(tag)) is not None}
    return [(value, name) for value, name in sorted(found) if value <= 1.05 * highest]


def band(run: Run, number: int) -> list[Panel]:
    """Return one run's panel of batch means against M0 ± σ, in the units of M; none without a gap.

    M may be measured in multiples of β0 or come from a reward model.
    """
    batch = run.curve("band/batch_mean") or run.curve("gap/mean")
    if batch is None:
        return []
    parts = []
    mean, std = run.curve("gap/running_mean"), run.curve("gap/running_std")
    if mean is not None and std is not None:
        edges = [thinned(Curve(mean.steps, mean.values + sign * std.values)).values for sign in (-1, 1)]
        parts.append(Line("running mean M0 ± σ", *thinned(mean), "ink", width=1.6, band=(edges[0], edges[1])))
    drawn = thinned(batch)
    parts.append(Line("mean gap of the batch", *drawn, plot.run_colour(number), width=1.2))
    picture = plot.lines(parts, axis(alt.X, "optimizer step", nice=False), axis(alt.Y, "gap, nats"))
    title = run.name if mean is not None else f"{run.name} (keeps no running mean)"
    said = f"{run.name}: mean gap per batch, from {drawn.values[0]:.3g} to {drawn.values[-1]:.3g} nats"
    return [Panel(title, picture, said, "step")]


def response(runs: Sequence[Run]) -> list[Panel]:
    """Return the panel of each batch's β against its mean gap."""
    parts, said = [], []
    for number, run in enumerate(runs):
        used, gap = run.curve("beta/used"), run.curve("gap/mean")
        if used is not None and gap is not None:
            steps, of_beta, of_gap = np.intersect1d(used.steps, gap.steps, return_indices=True)
            some = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_DOTS)).astype(int))
            values = used.values[of_beta[some]]
            x = gap.values[of_gap[some]]
            parts.append(Line(run.name, x, values, plot.run_colour(number), width=0, dots=True))
            said.append(f"{run.name}: β {np.nanmin(values):.3g} to {np.nanmax(values):.3g}")
    if not parts:
        return []
    picture = plot.lines(parts, axis(alt.X, "mean gap of the batch, nats"), axis(alt.Y, "β used", domainMin=0))
    for value, name in bounds(runs):
        picture += plot.rule(value, name)
    return [Panel("", picture, f"β against the mean gap of the batch. {'; '.join(said)}")]
