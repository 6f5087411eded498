"""The report: its table of numbers, its HTML page, which needs no other file, and its figure for a slide."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from app.core.intervals import digits, share_over, span
from app.core.log_folder import flattened
from app.report import charts, plot
from app.report.findings import findings
from app.report.plot import Panel
from app.report.run import SAMPLES, Run


def page(runs: Sequence[Run], sampled: bool) -> str:
    """Return the HTML page for `runs`; `sampled` says whether an SFT model's samples were given for comparison."""
    environment = Environment(
        loader=PackageLoader("app.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        names=[run.name for run in runs],
        runs=runs,
        panels=all_panels(runs),
        findings=findings(runs),
        missing=missing(runs, sampled),
        numbers=by_row([numbers_of(run) for run in runs]),
        differences=differences([run.config for run in runs]),
        version=version("beta-dpo"),
        spec=spec_of,
        library=Markup(plot.library()),
    )


def all_panels(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Return the panels of every chart that a run can fill, by the chart's anchor on the page."""
    panels = {
        "quality": charts.quality(runs),
        "beta": charts.beta(runs),
        "response": charts.response(runs),
        "band": [panel for number, run in enumerate(runs) for panel in charts.band(run, number)],
        "density": charts.densities(runs, charts.TRAINING),
        "kept": charts.densities([run for run in runs if run.filters], charts.FILTER),
        "accuracy": charts.accuracy(runs),
        "filter": [panel for number, run in enumerate(runs) for panel in charts.dropped(run, number)],
        "drift": charts.drift(runs),
        "speed": [*charts.speed(runs, "pairs per second"), *charts.speed(runs, "tokens per second")],
    }
    return {anchor: some for anchor, some in panels.items() if some}


def spec_of(panel: Panel) -> dict[str, Any]:
    """Return the specification of a panel, as wide as its place, with a cursor that the page moves by `at`."""
    picture = panel.picture
    if panel.reads:
        known = alt.value(alt.expr("isNumber(at) ? scale('x', at) : -9"))
        cursor = alt.Chart(alt.Data(values=[{}])).mark_rule(color=plot.INK, clip=True).encode(x=known)
        picture = (picture + cursor).add_params(alt.param(name="at", value=None))
    return plot.spec(plot.sized_to(picture, "container", 200), description=panel.said)


def figure(run: Run) -> bytes:
    """Return the PNG of a run with an audit: β, the gap and its running band, gaps kept and dropped, accuracy."""
    panels = {
        "β follows the gap of the kept pairs": charts.beta([run]),
        "reward gap": charts.band(run, 0),
        "gaps in the second half": charts.densities([run], charts.FILTER) if run.filters else [],
        "reward accuracy": charts.accuracy([run]),
    }
    drawn = {title: panel.picture for title, some in panels.items() for panel in some}
    return plot.png(plot.side_by_side(list(drawn.values()), list(drawn)))


def numbers_of(run: Run) -> dict[str, str]:
    """Return the rows of the table for one run, name → text, without the rows that the run cannot fill."""
    column: dict[str, str] = {}
    for tag, name in (
        ("val/reference_accuracy", "held-out pairs ranked right by the SFT model"),
        ("val/policy_accuracy", "held-out pairs ranked right by the policy"),
        ("val/reward_accuracy", "held-out reward accuracy (0.5 before)"),
    ):
        if (value := run.last(tag)) is not None:
            column[name] = f"{value:.3f}"
    for name, estimate in run.samples.items():
        before = f" (SFT {run.baseline[name].mean:.3f})" if name in run.baseline else ""
        column[f"samples: {'win rate over SFT' if name == 'win rate' else name}"] = f"{estimate}{before}"
    if (beta := run.curves.get("beta/used")) is not None:
        values = (beta.iloc[0], beta.min(), beta.max(), beta.iloc[-1])
        column["β: first, lowest, highest, last"] = ", ".join(map(digits, values))
    elif (loss := run.curves.get("train/loss")) is not None:  # of supervised fine-tuning
        column["training loss: first, last"] = ", ".join(map(digits, (loss.iloc[0], loss.iloc[-1])))
    if (mean := run.last("gap/running_mean")) is not None and (std := run.last("gap/running_std")) is not None:
        column["running mean M0 and σ at the end"] = f"{digits(mean)}, {digits(std)}"
    if run.audit is None:
        return column
    column["pairs kept a step"] = kept_a_step(run.audit)
    late = run.audit.gap[run.audit.step > run.audit.step.max() / 2]
    column["reward accuracy of training pairs, second half"] = f"{((1 + np.sign(late)) / 2).mean():.3f}"
    for flipped, name in ((True, "flipped"), (False, "other")):
        rows = run.audit[run.audit.flipped == flipped] if "flipped" in run.audit else run.audit.iloc[:0]
        if len(rows):
            column[f"{name} pairs dropped"] = str(share_over(rows.pair_id.to_numpy(), ~rows.kept))
    return column


def kept_a_step(audit: pd.DataFrame) -> str:
    """Return the fewest and the most pairs that a step kept, with the size of its batch; short batches apart."""
    steps = audit.groupby("step").kept.agg(["sum", "size"])
    whole = steps["size"] == steps["size"].max()
    text = f"{span(steps['sum'][whole])} of {span(steps['size'][whole])}"
    if not whole.all():
        text += f"; in {(~whole).sum()} shorter: {span(steps['sum'][~whole])} of {span(steps['size'][~whole])}"
    return text


def missing(runs: Sequence[Run], sampled: bool) -> list[str]:
    """Return a sentence for each missing part of the report, with advice on how to get it in the next run."""
    told = []
    for run in runs:
        logged, gaps = "train/loss" in run.curves, "gap/mean" in run.curves
        unseen = logged and gaps and "val/reward_accuracy" not in run.curves
        # validation pairs may be given for a source in a list too
        given = re.search(r"\bvalidation_\w+: *(?!null\b|0(\.0*)?(?![\d.]))\S", run.config_text)
        validates = given and flattened(run.config).get("trainer.limit_val_batches") != 0
        lacks = {
            "logged no reward gaps: is it a run of preference optimisation?": not gaps,
            "has no audit, so nothing is said of single pairs: add callbacks.PairAudit.": gaps
            and run.audit is None,
            "has no TensorBoard events and no metrics.csv, so rewards, drift and speed are not shown: set "
            "trainer.logger.": not logged,
            "ended before its first validation, so nothing is said of held-out pairs: train longer, or lower "
            "trainer.val_check_interval.": unseen and validates,
            "was not evaluated on held-out pairs: give the data validation pairs, and trainer.limit_val_batches "
            "above 0.": unseen and not validates,
            "has no config.yaml: it was not started by beta-dpo fit.": not run.config_text,
            f"has no {SAMPLES} in its folder, so there is no win rate: export it and use beta-dpo generate.": (
                sampled and not run.samples
            ),
        }
        told += [f"{run.name} {sentence}" for sentence, true in lacks.items() if true]
    if not sampled:
        told.append("No samples of an SFT model were given (--baseline), so there is no win rate.")
    return told


def by_row(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return columns (name → text) as rows of a table, with "–" where a column lacks the name."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the rows in which the settings of the runs differ, by their dotted names."""
    rows = by_row([{name: str(value) for name, value in flattened(config).items()} for config in configs])
    return [row for row in rows if len(set(row[1])) > 1]
