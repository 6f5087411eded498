"""What a chart of the page consists of, and how long curves are made fit to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from app.report.run import Curve
from app.report.svg import Scale

MOST_POINTS = 400  # drawn of one curve; longer ones are averaged over equal numbers of steps
SMOOTHING = 25  # the heavy line is a mean over this fraction of the run


@dataclass
class Panel:
    """One picture. `readout` holds what the page needs to name the values under the pointer."""

    title: str
    picture: Markup
    readout: dict[str, Any] | None = None


@dataclass
class Chart:
    """A heading, what to see, one or several panels, and the key to their marks: (text, classes) each."""

    anchor: str
    title: str
    text: str
    panels: list[Panel]
    key: list[tuple[str, str]] = field(default_factory=list)


def style_of(number: int) -> str:
    """The classes of a run's marks, by its place among the runs: a colour and a dash."""
    return f"run{number % 8}"


def thinned(curve: Curve) -> Curve:
    """`curve` with at most MOST_POINTS points, each the mean of as many steps."""
    size = -(-len(curve.values) // MOST_POINTS)
    if size <= 1:
        return curve
    starts = np.arange(0, len(curve.values), size)
    counts = np.add.reduceat(np.isfinite(curve.values).astype(float), starts)
    sums = np.add.reduceat(np.nan_to_num(curve.values), starts)
    middles = np.add.reduceat(curve.steps.astype(float), starts) / np.add.reduceat(
        np.ones(len(curve.steps)), starts
    )
    with np.errstate(invalid="ignore"):
        return Curve(middles, sums / counts)


def smoothed(curve: Curve) -> Curve:
    """A centred running mean over 1/SMOOTHING of the points, shorter at the ends; NaN counts as absent."""
    half = max(len(curve.values) // SMOOTHING // 2, 0)
    known = np.isfinite(curve.values).astype(float)
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(curve.values))])
    counts = np.concatenate([[0.0], np.cumsum(known)])
    at = np.arange(len(curve.values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(at))
    with np.errstate(invalid="ignore"):
        return Curve(curve.steps, (sums[last] - sums[first]) / (counts[last] - counts[first]))


def readout(x: Scale, x_name: str, curves: Sequence[tuple[str, Curve]]) -> dict[str, Any]:
    """The numbers behind a panel's curves, for pointer and arrow keys."""
    return {
        "x": x_name,
        "low": x.low,
        "high": x.high,
        "start": x.start,
        "end": x.end,
        "series": [
            {
                "name": name,
                "at": [round(float(step), 4) for step in curve.steps],
                "values": [float(f"{value:.4g}") if np.isfinite(value) else None for value in curve.values],
            }
            for name, curve in curves
        ],
    }
