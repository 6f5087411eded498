"""The report as one self-contained HTML page, which needs no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from app.report import plot
from app.report.charts import all_charts
from app.report.findings import findings
from app.report.plot import Panel
from app.report.run import SAMPLES, Run
from app.report.table import numbers_of

LEVELS = {"act": "Change", "watch": "Note", "good": "Good"}


def page(runs: Sequence[Run], sampled: bool) -> str:
    """Return the HTML page for `runs`; `sampled` says whether an SFT model's samples were given for comparison."""
    charts = all_charts(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(asset("page.html.j2")).render(
        names=[run.name for run in runs],
        runs=runs,
        charts=charts,
        anchors={chart.anchor: chart.title for chart in charts},
        findings=findings(runs),
        levels=LEVELS,
        missing=missing(runs, sampled),
        numbers=by_row([numbers_of(run) for run in runs]),
        differences=differences([flat(run.config) for run in runs]),
        version=version("beta-dpo"),
        style=Markup(asset("page.css")),
        colours=plot.COLOURS,
        spec=spec_of,
        library=Markup(plot.library()),
        script=Markup(asset("page.js")),
    )


def spec_of(panel: Panel) -> dict[str, Any]:
    """Return the specification of a panel, as wide as its place on the page."""
    picture = plot.readable(panel.picture) if panel.reads else panel.picture
    return plot.spec(plot.sized_to(picture, "container", 200), description=panel.said)


def asset(name: str) -> str:
    return files("app.report").joinpath("assets", name).read_text(encoding="utf-8")


def missing(runs: Sequence[Run], sampled: bool) -> list[str]:
    """Return a sentence for each missing part of the report, with advice on how to get it in the next run."""
    told = []
    for run in runs:
        logged, gaps = "train/loss" in run.curves, "gap/mean" in run.curves
        lacks = {
            "logged no reward gaps: is it a run of preference optimisation?": not gaps,
            "has no audit, so nothing is said of single pairs: add callbacks.PairAudit.": (
                gaps and run.audit is None
            ),
            "has no TensorBoard events and no metrics.csv, so rewards, drift and speed are not shown: set "
            "trainer.logger.": not logged,
            "was not evaluated on held-out pairs: give the data validation pairs.": (
                logged and gaps and "val/reward_accuracy" not in run.curves
            ),
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


def differences(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the rows in which the settings of the runs differ."""
    return [row for row in by_row(settings) if len(set(row[1])) > 1]


def flat(config: Any, path: str = "") -> dict[str, str]:
    """Return every leaf of a configuration by its dotted name; a callback with all its settings is one leaf."""
    if isinstance(config, Mapping):
        inner = {name: flat(value, f"{path}.{name}" if path else str(name)) for name, value in config.items()}
        return {name: text for part in inner.values() for name, text in part.items()}
    if isinstance(config, list) and any(isinstance(item, Mapping) and "class_path" in item for item in config):
        return {str(item["class_path"]).rsplit(".", 1)[-1]: told(item.get("init_args") or {}) for item in config}
    return {path.replace(".init_args", ""): str(config)}


def told(settings: Mapping[str, Any]) -> str:
    """Return the settings that have a value, in one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None) or "yes"
