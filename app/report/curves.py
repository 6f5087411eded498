"""The panels of curves over the optimizer step, and of β against the gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from app.core.intervals import digits, span
from app.report import plot
from app.report.plot import Line, Panel, axis
from app.report.run import Run

MOST_POINTS = 400  # drawn per curve; longer curves are averaged over groups of consecutive points
SMOOTHING = 25  # the heavy line is a running mean over 1/SMOOTHING of the curve
MOST_DOTS = 500  # per run; more would overlap
STEP = axis(alt.X, "optimizer step", nice=False)
BOUNDS = {"beta/base": "β0", "beta/floor": "floor", "beta/ceiling": "ceiling"}


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
    """Return one run's panel of batch means against M0 ± σ, in the units of M; none without a gap.

    M may be measured in multiples of β0 or come from a reward model.
    """
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
