"""The charts over the optimizer step: β, the gap and its band, displacement and KL, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from app.report import svg
from app.report.chart import Chart, Panel, readout, smoothed, style_of, thinned
from app.report.run import Curve, Run

STEP = "optimizer step"
BETA_RULES = {"beta/base": "β0", "beta/floor": "floor", "beta/ceiling": "ceiling"}


class Drawn(NamedTuple):
    """A thinned curve of a panel, and its running mean."""

    name: str
    style: str
    weight: str
    curve: Curve
    mean: Curve


def beta_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the β used by every run, with β0 and the bounds."""
    panel = curves_panel(runs, ["beta/used"], "β used", low=0.0, rules=BETA_RULES)
    if panel is None:
        return None
    return Chart(
        "beta",
        "β over the run",
        "One β per step for the whole batch; the heavy line is a running mean. The dotted lines are β0 and the "
        "bounds of β. A β that lies on a bound no longer follows the data.",
        [panel],
        key_of(runs, ["beta/used"]),
    )


def band_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the batch's mean gap and the running mean ± σ, one panel per run."""
    panels = [panel for number, run in enumerate(runs) if (panel := band_panel(run, number))]
    if not panels:
        return None
    return Chart(
        "band",
        "Gap of the batch against its running mean",
        "The line is the mean gap of each batch, the area the running mean M0 ± σ that filter and β compare it "
        "with. A batch above M0 raises β, one below lowers it. The gap grows as the policy learns, and M0 lags "
        "behind it.",
        panels,
    )


def band_panel(run: Run, number: int) -> Panel | None:
    """Return one run's panel of batch means and band, in the units of M; None without a gap.

    M may be measured in multiples of β0 or come from a reward model.
    """
    batch = run.curve("band/batch_mean") or run.curve("gap/mean")
    if batch is None:
        return None
    drawn = thinned(batch)
    mean, std = run.curve("gap/running_mean"), run.curve("gap/running_std")
    parts: list[Markup] = []
    named = [("batch mean", drawn)]
    values: list[float] = list(drawn.values)
    if mean is not None and std is not None:
        centre = thinned(mean)
        lower = thinned(Curve(mean.steps, mean.values - std.values)).values
        upper = thinned(Curve(mean.steps, mean.values + std.values)).values
        values += [*lower, *upper]
        named += [("M0", centre), ("M0 − σ", Curve(centre.steps, lower)), ("M0 + σ", Curve(centre.steps, upper))]
    x, y = svg.horizontal(drawn.steps, margin=0.0), svg.vertical(values)
    parts.append(svg.axes(x, y, STEP, "gap, nats"))
    if len(named) > 1:
        parts.append(svg.area(x, y, centre.steps, lower, upper, style_of(number)))
        parts.append(svg.line(x, y, centre.steps, centre.values, "plain"))
    parts.append(svg.rule(0.0, "zero", y=y))
    parts.append(svg.line(x, y, drawn.steps, drawn.values, f"{style_of(number)} solid thin"))
    label = f"{run.name}: mean gap per batch, from {drawn.values[0]:.3g} to {drawn.values[-1]:.3g} nats"
    title = run.name if len(named) > 1 else f"{run.name} (keeps no running mean)"
    return Panel(title, svg.drawing(label, *parts), readout(x, "step", named))


def drift_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the log-ratios of both responses and of the KL to the reference."""
    sides = ["train/log_ratio_chosen", "train/log_ratio_rejected"]
    kl = ["train/kl_chosen", "train/kl_rejected"]
    panels = [
        curves_panel(runs, sides, "log-ratio, nats", title="displacement: log π − log π_ref", raw=False),
        curves_panel(runs, kl, "KL, nats", title="KL to the reference per response", low=0.0, raw=False),
    ]
    if not any(panels):
        return None
    return Chart(
        "drift",
        "Drift from the reference",
        "How far the probability of the chosen (thick) and the rejected (thin) responses has moved from the "
        "reference, and the KL to it along these responses. Training only asks that rejected falls below chosen. "
        "When chosen falls as well, probability leaks to answers that nobody has rated.",
        [panel for panel in panels if panel],
        key_of(runs, sides + kl),
    )


def accuracy_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the reward accuracy over the run."""
    training, held_out = "train/reward_accuracy", "val/reward_accuracy"
    panel = curves_panel(
        runs,
        [training],
        "share ranked right",
        high=1.0,
        points=held_out,
        title="training and held-out pairs",
    )
    if panel is None:
        return None
    return Chart(
        "accuracy",
        "Reward accuracy",
        "Share of pairs with a positive gap; a tie counts half, so a run begins at 0.5. Lines are training pairs, "
        "measured before their own step, with whatever labels are wrong among them. Dots are held-out pairs.",
        [panel],
        key_of(runs, [training]),
    )


def curves_panel(
    runs: Sequence[Run],
    tags: Sequence[str],
    y_title: str,
    title: str = "",
    raw: bool = True,
    low: float | None = None,
    high: float | None = None,
    points: str | None = None,
    rules: Mapping[str, str] | None = None,
) -> Panel | None:
    """Return the panel of the curves `tags` of all runs: smoothed and, if `raw`, unsmoothed; the second tag thin.

    `points` names a curve that is drawn as dots. `rules` maps a curve to the name of the line that is drawn across
    the panel at the curve's last value. Returns None if no run has a curve in `tags`.
    """
    drawn = [
        Drawn(
            f"{run.name}, {tag.rsplit('_', 1)[-1]}" if len(tags) > 1 else run.name,
            style_of(number),
            " thin" if place else "",
            thinned(curve),
            smoothed(thinned(curve)),
        )
        for number, run in enumerate(runs)
        for place, tag in enumerate(tags)
        if (curve := run.curve(tag)) is not None
    ]
    if not drawn:
        return None
    dotted = [
        (number, curve) for number, run in enumerate(runs) if points and (curve := run.curve(points)) is not None
    ]
    shown = [one.curve if raw else one.mean for one in drawn] + [curve for _, curve in dotted]
    x = svg.horizontal(np.concatenate([one.curve.steps for one in drawn]), margin=0.0)
    y = svg.vertical(np.concatenate([curve.values for curve in shown]), low=low, high=high)
    parts = [svg.axes(x, y, STEP, y_title), svg.rule(0.0, "zero", y=y)]
    parts += [svg.line(x, y, *one.curve, f"{one.style} raw") for one in drawn if raw]
    parts += [svg.line(x, y, *one.mean, f"{one.style}{one.weight}") for one in drawn]
    for number, curve in dotted:
        inside = np.clip(curve.steps, x.low, x.high)  # the last validation comes after the last step
        parts.append(svg.dots(x, y, inside, curve.values, f"{style_of(number)} ringed", radius=4))
    parts += rules_across(runs, rules or {}, y)
    ends = ", ".join(f"{one.name} ends at {one.mean.values[-1]:.3g}" for one in drawn)
    label = f"{y_title} over the run: {ends}"
    return Panel(title, svg.drawing(label, *parts), readout(x, "step", [(one.name, one.curve) for one in drawn]))


def rules_across(runs: Sequence[Run], rules: Mapping[str, str], y: svg.Scale) -> list[Markup]:
    """Return a named line at the last value of each curve in `rules`; runs with equal values share one line."""
    values = {(value, name) for run in runs for tag, name in rules.items() if (value := run.last(tag)) is not None}
    return [svg.rule(value, "bound", y=y, name=name) for value, name in sorted(values)]


def key_of(runs: Sequence[Run], tags: Sequence[str]) -> list[tuple[str, str]]:
    """Return the name and the CSS class of every run that has one of the curves."""
    return [(run.name, style_of(number)) for number, run in enumerate(runs) if run.curves.keys() & set(tags)]
