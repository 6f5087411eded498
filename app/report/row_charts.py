"""The charts of one number with its interval per run or group: quality, dropped pairs, speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from app.intervals import Estimate, share_over, wilson
from app.report import svg
from app.report.chart import Chart, Panel, style_of
from app.report.run import Run
from app.run_folder import grouping_labels

ROW, ABOVE, BELOW = 48, 6, 40
MOST_VALUES = 8  # drawn per label, the most frequent first


NAMES = {("flipped", True): "flipped on purpose", ("flipped", False): "not flipped"}


class Row(NamedTuple):
    """A dot with its interval."""

    name: str
    style: str
    estimate: Estimate


def rows_panel(
    title: str,
    rows: Sequence[Row],
    unit: str,
    low: float | None = None,
    high: float | None = None,
    mark: float | None = None,
    mark_name: str = "",
    decimals: int = 3,
) -> Panel | None:
    """Return a panel with a dot and an interval per row, its name and numbers above; None without rows.

    `mark` is the value of a line to compare with.
    """
    if not rows:
        return None
    height = ABOVE + ROW * len(rows) + BELOW
    ends = [value for row in rows for value in row.estimate] + ([] if mark is None else [mark])
    x = svg.Scale(*svg.span(ends, 0.08, low, high), 24, svg.RIGHT - 18)
    base = ABOVE + ROW * len(rows)
    parts = []
    for value, text in zip(x.ticks(), svg.numbers(x.ticks()), strict=True):
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{base + 15}" text-anchor="middle">{text}</text>')
    if mark is not None:
        unit += f"; dotted: {mark_name}"
    parts.append(f'<text class="axis" x="200" y="{base + 34}" text-anchor="middle">{escape(unit)}</text>')
    said = []
    for number, row in enumerate(rows):
        top = ABOVE + ROW * number
        mean, first, last = (f"{value:,.{decimals}f}" for value in row.estimate)
        text = f"{mean} [{first}, {last}]"
        said.append(f"{row.name} {text}")
        parts.append(f'<text class="row" x="12" y="{top + 15}">{escape(row.name)}</text>')
        parts.append(f'<text class="value" x="{svg.RIGHT - 6}" y="{top + 15}" text-anchor="end">{text}</text>')
        y = top + 31
        parts += [lane_line(x(value), y, "grid") for value in x.ticks()]
        if mark is not None:
            parts.append(lane_line(x(mark), y, "rule bound"))
        parts.append(
            f'<line class="whisker {row.style}" x1="{x(row.estimate.low):.1f}" x2="{x(row.estimate.high):.1f}" '
            f'y1="{y}" y2="{y}"/><circle class="dot {row.style}" cx="{x(row.estimate.mean):.1f}" cy="{y}" r="5"/>'
        )
    picture = svg.drawing(f"{title}: {'; '.join(said)}", Markup("".join(parts)), height=height)
    return Panel(title, picture)


def lane_line(x: float, y: float, style: str) -> str:
    """Return a short vertical line at the height of a row's dot, clear of the row's text."""
    return f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{y + 8}"/>'


def shortened(text: str) -> str:
    """Return `text`, cut to 20 characters so that it fits beside the numbers of its row."""
    return text if len(text) <= 20 else f"{text[:19]}…"


def quality_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of held-out accuracy and of the samples' quality, with intervals."""
    held_out = {
        "reward accuracy on held-out pairs": "val/reward_accuracy",
        "held-out pairs that the policy itself ranks right": "val/policy_accuracy",
    }
    panels = []
    for title, tag in held_out.items():
        rows = [
            Row(run.name, style_of(number), wilson(mean, round(pairs)))
            for number, run in enumerate(runs)
            if (mean := run.last(tag)) is not None and (pairs := run.last("val/pairs"))
        ]
        before = next((value for run in runs if (value := run.last("val/reference_accuracy")) is not None), None)
        mark, name = (before, "the SFT model") if tag == "val/policy_accuracy" else (0.5, "before training")
        panels.append(rows_panel(title, rows, "share of pairs", mark=mark, mark_name=name))
    for name, unit in (
        ("win rate", "share of prompts"),
        ("mean true reward", "reward of an answer"),
        ("malformed share", "share of answers"),
        ("KL to the reference", "nats per answer"),
    ):
        rows = [
            Row(run.name, style_of(number), run.samples[name])
            for number, run in enumerate(runs)
            if name in run.samples
        ]
        reference = next((run.baseline[name].mean for run in runs if name in run.baseline), None)
        mark, mark_name = (0.5, "a draw") if name == "win rate" else (reference, "the SFT model")
        title = "win rate over the SFT model" if name == "win rate" else f"sampled answers: {name}"
        panels.append(rows_panel(title, rows, unit, mark=mark, mark_name=mark_name))
    drawn = [panel for panel in panels if panel]
    return (
        Chart(
            "quality",
            "What the policy is worth",
            "Numbers with 95 % intervals over pairs or prompts. The intervals hold for this one training run: "
            "another seed differs by more than they tell. Where two of them overlap widely, do not call one run "
            "better.",
            drawn,
        )
        if drawn
        else None
    )


def dropped_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the share dropped by the filter, per label of the data and per ranking by the policy."""
    panels = []
    for number, run in enumerate(runs):
        if run.audit is None or not run.filters:
            continue
        audit = run.audit.assign(policy=np.where(run.audit.gap > 0, "ranked right", "not ranked right"))
        for label in (*grouping_labels(run.audit), "policy"):
            values = audit.groupby(label).pair_id.nunique().nlargest(MOST_VALUES)
            rows = [
                Row(
                    f"{NAMES.get((label, value), shortened(str(value)))}, {count:,} pairs",
                    style_of(number),
                    share_over(
                        audit.pair_id[audit[label].eq(value)].to_numpy(), ~audit.kept[audit[label].eq(value)]
                    ),
                )
                for value, count in values.items()
            ]
            by = "the policy's own ranking" if label == "policy" else label
            title = f"{run.name}: dropped by {by}"
            panels.append(
                rows_panel(
                    title, rows, "share dropped", low=0.0, mark=float((~audit.kept).mean()), mark_name="all pairs"
                )
            )
    drawn = [panel for panel in panels if panel]
    return (
        Chart(
            "filter",
            "Who is dropped",
            "The share of each group that the filter left out of training, over the whole run, with 95 % "
            "intervals over pairs. Groups are the label columns of the data that have few values. A useful filter "
            "drops mislabelled pairs more often than others.",
            drawn,
        )
        if drawn
        else None
    )


def speed_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of throughput: the median step and the middle 80 % of steps."""
    panels = []
    for tag, unit in (
        ("train/pairs_per_second", "pairs per second"),
        ("train/tokens_per_second", "tokens per second"),
    ):
        rows = [
            Row(run.name, style_of(number), Estimate(*np.quantile(curve.part(0, 1), [0.5, 0.1, 0.9]).tolist()))
            for number, run in enumerate(runs)
            if (curve := run.curve(tag)) is not None and len(curve.part(0, 1))
        ]
        panels.append(rows_panel(unit, rows, f"{unit}, 10 % to 90 % of steps", low=0.0, decimals=0))
    drawn = [panel for panel in panels if panel]
    return (
        Chart(
            "speed",
            "Throughput",
            "The median step, and the range of the middle 80 % of steps: time of the step itself, without "
            "loading and validation. Only runs on the same idle machine can be compared.",
            drawn,
        )
        if drawn
        else None
    )
