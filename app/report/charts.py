"""The charts of the report, and the figure for a slide, which is made of four of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from app.report import plot
from app.report.curves import accuracy, band, beta, curves, response
from app.report.groups import densities, dropped, filter_densities, gaps, quality, speed
from app.report.plot import Panel
from app.report.run import Run


class Chart(NamedTuple):
    """A heading, an explanation and pictures."""

    anchor: str
    title: str
    text: str
    panels: list[Panel]


def all_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts that at least one of the runs can fill."""
    charts = [
        Chart(
            "quality",
            "What the policy is worth",
            "Numbers with 95 % intervals over pairs or prompts. The intervals hold for this one training run: "
            "another seed differs by more than they tell. Where two of them overlap widely, do not call one run "
            "better.",
            quality(runs),
        ),
        Chart(
            "beta",
            "β over the run",
            "One β per step for the whole batch; the heavy line is a running mean. The dotted lines are β0 and the "
            "bounds of β. A β that lies on a bound no longer follows the data.",
            beta(runs),
        ),
        Chart(
            "response",
            "β against the gap of the batch",
            "One dot a step. β rises with the gap, but what counts is the distance to the running mean, which "
            "moves: hence a cloud and no line. Dots in a row at the bottom: β is at its floor. A flat row at β0 is "
            "a run without a β schedule.",
            response(runs),
        ),
        Chart(
            "band",
            "Gap of the batch against its running mean",
            "The coloured line is the mean gap of each batch, the area the running mean M0 ± σ that filter and β "
            "compare it with. A batch above M0 raises β, one below lowers it. The gap grows as the policy learns, "
            "and M0 lags.",
            [panel for number, run in enumerate(runs) for panel in band(run, number)],
        ),
        Chart(
            "density",
            "Reward gaps before and after training",
            "How the gaps h of single pairs are spread (the paper's reward discrepancy), measured before each "
            "pair's own step. An untrained policy has all of them at 0; a good run moves the bulk to the right of "
            "0. What stays on the left is mislabelled, or not learned yet. A long tail on either side pulls a β "
            "that follows the mean. The peak of the first quarter is cut off.",
            densities(
                {
                    run.name: {
                        "first quarter of the steps": gaps(run.audit, 0, 0.25),
                        "last quarter": gaps(run.audit, 0.75, 1),
                    }
                    for run in runs
                    if run.audit is not None
                }
            ),
        ),
        Chart(
            "kept",
            "Reward gaps before and after the filter",
            "The second half of the run: the gaps of all pairs, and of those that the filter kept to train on. It "
            "should cut both tails and leave the middle.",
            filter_densities(runs),
        ),
        Chart(
            "accuracy",
            "Reward accuracy",
            "Share of pairs with a positive gap; a tie counts half, so a run begins at 0.5. Lines are training "
            "pairs, measured before their own step, with whatever labels are wrong among them. Dots are held-out "
            "pairs.",
            accuracy(runs),
        ),
        Chart(
            "filter",
            "Who is dropped",
            "The share of each group that the filter left out of training, over the whole run, with 95 % "
            "intervals over pairs. Groups are the label columns of the data that have few values. A useful filter "
            "drops mislabelled pairs more often than others.",
            [panel for number, run in enumerate(runs) for panel in dropped(run, number)],
        ),
        Chart(
            "drift",
            "Drift from the reference",
            "How far the probability of the chosen (thick) and the rejected (thin) responses has moved from the "
            "reference, and the KL to it along these responses. Training only asks that rejected falls below "
            "chosen. When chosen falls as well, probability leaks to answers that nobody has rated.",
            [
                *curves(
                    runs,
                    {"train/log_ratio_chosen": "chosen", "train/log_ratio_rejected": "rejected"},
                    "log-ratio, nats",
                    "displacement: log π − log π_ref",
                    raw=False,
                ),
                *curves(
                    runs,
                    {"train/kl_chosen": "chosen", "train/kl_rejected": "rejected"},
                    "KL, nats",
                    "KL to the reference per response",
                    raw=False,
                    domainMin=0,
                ),
            ],
        ),
        Chart(
            "speed",
            "Throughput",
            "The median step, and the range of the middle 80 % of steps: time of the step itself, without "
            "loading and validation. Only runs on the same idle machine can be compared.",
            [panel for unit in ("pairs per second", "tokens per second") for panel in speed(runs, unit)],
        ),
    ]
    return [chart for chart in charts if chart.panels]


def figure(run: Run) -> bytes:
    """Return the PNG of a run with an audit: β, the gap and its running band, gaps kept and dropped, accuracy."""
    panels = [*beta([run]), *band(run, 0), *filter_densities([run]), *accuracy([run])]
    titles = ("β follows the gap of the kept pairs", "reward gap", "gaps in the second half", "reward accuracy")
    return plot.png(plot.side_by_side([p.picture for p in panels], titles))
