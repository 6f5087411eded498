"""The charts of the dashboard, from charts.yaml, as TensorBoard takes them, and the guide to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

# every chart of the "custom scalars" tab is explained under this tag in the "text" tab
GUIDE = "how to read"


@dataclass(frozen=True)
class Chart:
    """An entry of charts.yaml."""

    title: str
    tags: Sequence[str]
    shows: str
    when_wrong: str
    band: bool = False

    @property
    def layout(self) -> list[object]:
        """Return the chart as `SummaryWriter.add_custom_scalars` takes it."""
        if self.band:
            return ["Margin", list(self.tags)]
        # TensorBoard matches a tag as the start of a regular expression
        return ["Multiline", [f"{re.escape(tag)}$" for tag in self.tags]]


_FILE = files("callbacks").joinpath("charts.yaml").read_text(encoding="utf-8")
CHARTS = {name: tuple(Chart(**chart) for chart in charts) for name, charts in yaml.safe_load(_FILE).items()}


def charts_with(tags: Collection[str]) -> dict[str, list[Chart]]:
    """Return the categories and charts that have at least one of the curves `tags`.

    A chart never loses single curves: TensorBoard draws a chart twice if it differs between runs.
    """
    found = {name: [chart for chart in charts if set(chart.tags) & set(tags)] for name, charts in CHARTS.items()}
    return {name: charts for name, charts in found.items() if charts}


def layout(tags: Collection[str]) -> dict[str, dict[str, list[object]]]:
    """Return the layout for `SummaryWriter.add_custom_scalars` of a run that logs `tags`."""
    return {name: {chart.title: chart.layout for chart in charts} for name, charts in charts_with(tags).items()}


def guide(tags: Collection[str]) -> dict[str, str]:
    """Return a Markdown text per category that explains its charts, for a run that logs `tags`."""
    head = "| chart | shows | when it looks wrong |\n|---|---|---|"
    return {
        name: "\n".join([head, *(f"| **{one.title}** | {one.shows} | {one.when_wrong} |" for one in charts)])
        for name, charts in charts_with(tags).items()
    }
