"""The figures of docs/study.md."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from app.core.intervals import Estimate
from app.report.plot import DASHES, SOLID, Interval, Line, axis, intervals, lines, run_colour, side_by_side
from app.report.plot import svg as svg
from benchmarks.study.questions import ARMS, MEASURES, STATIC, Question, Rows
from benchmarks.study.runs import path_of

EMPHASISED = {"dpo": "run7", "beta_dpo": "run0", "flip_weights": "run4"}
VERDICTS = {"better": "good", "worse": "act", "equal within the margin": "link"}


def forest(claim: Question) -> Any:
    """Return the chart of the mean and the interval of every comparison of a claim, by both measures."""
    panels = []
    for measure in ("end", "within"):
        found = [(each.label, getattr(each, measure)) for each in claim.comparisons]
        rows = [
            Interval(label, VERDICTS.get(d.verdict, "quiet"), Estimate(d.mean, d.low, d.high)) for label, d in found
        ]
        panels.append(intervals(rows, "difference in mean true reward", mark=0.0))
    return side_by_side(panels, ("at the end", "within the KL budget"))


def beta_by_gap(rows: Rows) -> Any:
    """Return the chart of reward against static β for each kind of data, with a dot per seed."""
    colours = {"low": "run2", "mixed": "run1", "high": "run3"}
    panels = []
    for measure in MEASURES:
        cells = {data: [rows.cell("dpo", data, beta0=beta)[measure] for beta in STATIC] for data in colours}
        parts = [Line(f"{data} gap", STATIC, [c.mean() for c in cells[data]], colours[data]) for data in colours]
        x = axis(alt.X, "β", type="log", nice=False).axis(values=list(STATIC))
        panel = lines(parts, x, axis(alt.Y, "mean true reward"))
        for data, colour in colours.items():
            seeds = [{"x": b, "y": float(y)} for b, cell in zip(STATIC, cells[data], strict=True) for y in cell]
            dots = alt.Chart(alt.Data(values=seeds)).mark_point(filled=True, opacity=0.4, color=f"var(--{colour})")
            panel += dots.encode(x="x:Q", y="y:Q")
        panels.append(panel)
    return side_by_side(panels, tuple(MEASURES.values()))


def frontier(rows: Rows) -> Any:
    """Return the chart of reward against KL over the checkpoints (means over seeds) of every arm on mixed data."""
    parts = []
    for number, (arm, beta0) in enumerate([*(("dpo", beta) for beta in STATIC), *((arm, None) for arm in ARMS)]):
        path = np.mean([path_of(row) for _, row in rows.cell(arm, beta0=beta0).iterrows()], axis=0)
        label = f"static β = {beta0:g}" if beta0 else f"{arm}, β0 = {rows.chosen(arm)[0]:g}"
        width = 2.4 if arm in EMPHASISED and beta0 in (None, rows.chosen("dpo")[0]) else 1.2
        colour, dash = (
            (EMPHASISED[arm], SOLID) if arm in EMPHASISED else (run_colour(number), DASHES[number % 7 + 1])
        )
        parts.append(Line(label, *path.T, colour, dash, width, dots=True))
    x = axis(alt.X, "KL to the SFT model, nats (linear to 1, then logarithmic)", type="symlog", constant=1)
    return lines(parts, x, axis(alt.Y, "mean true reward"), key="right").properties(width=520, height=380)
