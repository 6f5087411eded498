"""The figures of docs/study.md as SVG; the same table gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.questions import ARMS, MEASURES, STATIC, Question, Rows
from benchmarks.study.runs import path_of
from benchmarks.study.verdicts import Difference

SOLID = {"dpo": "tab:gray", "beta_dpo": "tab:blue", "flip_weights": "tab:red"}


def svg(figure: Figure) -> str:
    """Return the SVG text, without a date and with identifiers that are equal in every run."""
    with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "path"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # rounded, because the last digits may differ between machines, and without trailing spaces
    short = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", text.getvalue())
    return "".join(line.rstrip() + "\n" for line in short.splitlines())


def panels(count: int, height: float = 3.4) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(4.6 * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def forest(claim: Question) -> Figure:
    """Draw the mean and the interval of every comparison of a claim, by both measures."""
    figure, axes = panels(2, 1.3 + 0.28 * len(claim.comparisons))
    for axis, measure, title in zip(axes, ("end", "within"), ("at the end", "within the KL budget"), strict=True):
        for place, comparison in enumerate(reversed(claim.comparisons)):
            one: Difference = getattr(comparison, measure)
            colour = {"better": "tab:green", "worse": "tab:red", "equal within the margin": "tab:blue"}.get(
                one.verdict, "tab:gray"
            )
            axis.plot([one.low, one.high], [place, place], color=colour)
            axis.plot(one.mean, place, "o", color=colour)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(claim.comparisons)))
        axis.set_yticklabels([each.label for each in reversed(claim.comparisons)] if axis is axes[0] else [])
        axis.set_ylim(-0.6, len(claim.comparisons) - 0.4)
        axis.set(xlabel="difference in mean true reward", title=title)
    return figure


def beta_by_gap(rows: Rows) -> Figure:
    """Draw reward against static β for each kind of data, with a dot per seed."""
    figure, axes = panels(2)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for data, colour in (("low", "tab:green"), ("mixed", "tab:orange"), ("high", "tab:purple")):
            cells = [rows.cell("dpo", data, beta0=beta)[measure] for beta in STATIC]
            axis.plot(STATIC, [cell.mean() for cell in cells], color=colour, label=data)
            for beta, cell in zip(STATIC, cells, strict=True):
                axis.plot(np.full(len(cell), beta), cell, ".", color=colour, alpha=0.4)
        axis.set_xscale("log")
        axis.set_xticks(STATIC, [f"{beta:g}" for beta in STATIC])
        axis.set(xlabel="β", ylabel="mean true reward", title=title)
    axes[0].legend(title="gap", fontsize=8)
    return figure


def frontier(rows: Rows) -> Figure:
    """Draw reward against KL over the checkpoints (means over seeds) of every arm on mixed data, flip rate .15."""
    figure, (axis,) = panels(1, 4.6)
    figure.set_figwidth(7.5)
    for arm, beta0 in [*(("dpo", beta) for beta in STATIC), *((arm, None) for arm in ARMS)]:
        cell = rows.cell(arm, beta0=beta0)
        path = np.mean([path_of(row) for _, row in cell.iterrows()], axis=0)
        label = f"static β = {beta0:g}" if beta0 else f"{arm}, β0 = {rows.chosen(arm)[0]:g}"
        width = 2.2 if arm in SOLID and beta0 in (None, rows.chosen("dpo")[0]) else 1.0
        line = {"color": SOLID[arm], "linestyle": "-"} if arm in SOLID else {"linestyle": "--"}
        axis.plot(*path.T, marker="o", markersize=3, linewidth=width, label=label, **line)
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set(xlabel="KL to the SFT model, nats (linear to 1, then logarithmic)", ylabel="mean true reward")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
