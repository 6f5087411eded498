"""The charts of the report, and the figure for a slide, which is made of four of them."""

from __future__ import annotations

from collections.abc import Sequence

from app.report import plot
from app.report.curves import accuracy, band, beta, curves, response
from app.report.groups import densities, dropped, filter_densities, gaps, quality, speed
from app.report.plot import Panel
from app.report.run import Run

LOG_RATIOS = {"train/log_ratio_chosen": "chosen", "train/log_ratio_rejected": "rejected"}
KL = {"train/kl_chosen": "chosen", "train/kl_rejected": "rejected"}


def all_panels(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Return the panels of every chart that a run can fill, by the chart's anchor on the page."""
    early_and_late = {
        run.name: {
            "first quarter of the steps": gaps(run.audit, 0, 0.25),
            "last quarter": gaps(run.audit, 0.75, 1),
        }
        for run in runs
        if run.audit is not None
    }
    panels = {
        "quality": quality(runs),
        "beta": beta(runs),
        "response": response(runs),
        "band": [panel for number, run in enumerate(runs) for panel in band(run, number)],
        "density": densities(early_and_late),
        "kept": filter_densities(runs),
        "accuracy": accuracy(runs),
        "filter": [panel for number, run in enumerate(runs) for panel in dropped(run, number)],
        "drift": [
            *curves(runs, LOG_RATIOS, "log-ratio, nats", "displacement: log π − log π_ref", raw=False),
            *curves(runs, KL, "KL, nats", "KL to the reference per response", raw=False, domainMin=0),
        ],
        "speed": [*speed(runs, "pairs per second"), *speed(runs, "tokens per second")],
    }
    return {anchor: some for anchor, some in panels.items() if some}


def figure(run: Run) -> bytes:
    """Return the PNG of a run with an audit: β, the gap and its running band, gaps kept and dropped, accuracy."""
    panels = {
        "β follows the gap of the kept pairs": beta([run]),
        "reward gap": band(run, 0),
        "gaps in the second half": filter_densities([run]),  # none without a filter
        "reward accuracy": accuracy([run]),
    }
    drawn = {title: panel.picture for title, some in panels.items() for panel in some}
    return plot.png(plot.side_by_side(list(drawn.values()), list(drawn)))
