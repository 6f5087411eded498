"""The parts of a chart on the page, and the functions that thin and smooth long curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from app.report.run import Curve
from app.report.svg import Scale

MOST_POINTS = 400  # drawn per curve; longer curves are averaged over groups of consecutive points
SMOOTHING = 25  # the heavy line is a running mean over 1/SMOOTHING of the curve


@dataclass
class Panel:
    """One picture; with `readout`, the page can show the values under the pointer."""

    title: str
    picture: Markup
    readout: dict[str, Any] | None = None


@dataclass
class Chart:
    """A heading, an explanation, one or several panels, and the key to their marks as (text, classes)."""

    anchor: str
    title: str
    text: str
    panels: list[Panel]
    key: list[tuple[str, str]] = field(default_factory=list)


def style_of(number: int) -> str:
    """Return the CSS class (colour and dash) of the marks of run `number`; there are eight."""
    return f"run{number % 8}"


def thinned(curve: Curve) -> Curve:
    """Return `curve` with at most MOST_POINTS points, each the mean of equally many (at the end fewer) points."""
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
    """Return a centred running mean over 1/SMOOTHING of the points, over fewer at the ends; NaN is ignored."""
    half = max(len(curve.values) // SMOOTHING // 2, 0)
    known = np.isfinite(curve.values).astype(float)
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(curve.values))])
    counts = np.concatenate([[0.0], np.cumsum(known)])
    at = np.arange(len(curve.values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(at))
    with np.errstate(invalid="ignore"):
        return Curve(curve.steps, (sums[last] - sums[first]) / (counts[last] - counts[first]))


def readout(x: Scale, x_name: str, curves: Sequence[tuple[str, Curve]]) -> dict[str, Any]:
    """Return the values of a panel's curves, which the page shows for the pointer and the arrow keys."""
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
