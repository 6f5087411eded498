"""Curves, intervals and colours with Altair, for page, PNG and SVG. Colours are CSS variables (page.css)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, TypeAlias

import altair as alt
import numpy as np
import vl_convert
import yaml

from app.core.intervals import Estimate, digits

CSS, STYLE = (
    files("app.report").joinpath("assets", name).read_text(encoding="utf-8") for name in ("page.css", "charts.yaml")
)
LIGHT = dict(re.findall(r"--(\w+): light-dark\((#\w+)", CSS))  # by name, for pictures outside the page
SOLID = (1, 0)
DASHES = (SOLID, (7, 3), (2, 3), (9, 3, 2, 3), (12, 4), (4, 4), (1, 4), (14, 3, 3, 3))
INK, RULE = "var(--ink)", "var(--rule)"
ROW = 46  # height of a row of `intervals`, in pixels
Values: TypeAlias = Sequence[float] | np.ndarray


class Line(NamedTuple):
    """A named curve; `faint` is drawn under it, `band` is the lower and the upper edge of an area around it."""

    name: str
    x: Values
    y: Values
    colour: str = "run0"
    dash: Sequence[int] = SOLID
    width: float = 2.4
    faint: Values | None = None
    band: tuple[Values, Values] | None = None
    fill: bool = False  # down to zero
    dots: bool = False


class Interval(NamedTuple):
    """A row of `intervals`; values closer than `margin` to its mark count as equal to it."""

    name: str
    colour: str
    estimate: Estimate
    margin: float = 0.0


class Panel(NamedTuple):
    """A picture, its words for screen readers, and the name of the x values that can be read from it."""

    title: str
    picture: Any
    said: str
    reads: str = ""


def run_colour(number: int) -> str:
    return f"run{number % 8}"


def axis(channel: type[Any], title: str, **scale: Any) -> Any:
    """Return the encoding `channel` (`alt.X` or `alt.Y`) with a title that names the unit, and its scale."""
    return channel(f"{channel.__name__.lower()}:Q", title=title, scale=alt.Scale(**{"zero": False, **scale}))


def lines(parts: Sequence[Line], x: Any, y: Any, key: Literal["top", "right"] = "top") -> Any:
    """Return the chart of `parts`, with a key if there are several; values that are not finite interrupt a line."""
    rows = []
    for part in parts:
        low, high = part.band or (None, None)
        columns = {"y": part.y, "faint": part.faint, "low": low, "high": high}
        known = {name: column for name, column in columns.items() if column is not None}
        for at, *values in zip(part.x, *known.values(), strict=True):
            # four digits are enough to draw and to read
            drawn = (float(digits(value)) if math.isfinite(value) else None for value in values)
            rows.append({"x": float(f"{at:.6g}"), **dict(zip(known, drawn, strict=True)), "name": part.name})
    legend = alt.Legend(symbolOpacity=1, orient=key) if parts[1:] else None
    names = [part.name for part in parts]

    def by_name(channel: Any, values: Sequence[Any]) -> Any:
        return channel("name:N", scale=alt.Scale(type="ordinal", domain=names, range=values), legend=legend)

    colour = by_name(alt.Color, [f"var(--{part.colour})" for part in parts])
    dash = by_name(alt.StrokeDash, [list(part.dash if part.width else SOLID) for part in parts])
    shape = by_name(alt.Shape, ["stroke" if part.width else "circle" for part in parts])
    base = alt.Chart(alt.Data(values=rows)).encode(x, y, colour)
    filtered = [
        (part, base.transform_filter(alt.FieldEqualPredicate(field="name", equal=part.name)))
        for part in sorted(parts, key=lambda part: part.width)  # a heavy line covers a thin one
    ]
    layers = [
        on.mark_area(opacity=0.2, clip=True).encode(y="low:Q", y2="high:Q")
        for part, on in filtered
        if part.band is not None
    ]
    layers += [on.mark_area(opacity=0.2, clip=True).encode(y2=alt.datum(0)) for part, on in filtered if part.fill]
    faint = [on for part, on in filtered if part.faint is not None]
    layers += [on.mark_line(opacity=0.4, strokeWidth=1, clip=True).encode(y="faint:Q") for on in faint]
    layers += [on.mark_line(strokeWidth=part.width, clip=True).encode(dash) for part, on in filtered if part.width]
    dots = [on if part.width else on.encode(shape) for part, on in filtered if part.dots]
    layers += [on.mark_point(filled=True, size=45, opacity=0.8, tooltip=True) for on in dots]
    return alt.layer(*layers)


def rule(value: float, name: str) -> Any:
    """Return a dotted line across the chart at a value of y, with its name to the right, where no data are."""
    base = alt.Chart(alt.Data(values=[{"at": value, "text": name}])).encode(alt.Y("at:Q"))
    text = base.mark_text(align="left", dx=4).encode(x=alt.value("width"), text="text:N")
    return base.mark_rule(strokeDash=[2, 4], color=INK) + text


def intervals(
    rows: Sequence[Interval], unit: str, decimals: int = 3, mark: float | None = None, **scale: Any
) -> Any:
    """Return a chart with a dot and an interval per row, under its name and numbers; `mark` is a line."""
    values = [
        {"row": number, "name": row.name, "colour": f"var(--{row.colour})",
         **{end: value if math.isfinite(value) else None for end, value in row.estimate._asdict().items()},
         "text": row.estimate.text(decimals), "from": (mark or 0) - row.margin, "to": (mark or 0) + row.margin}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    base = alt.Chart(alt.Data(values=values)).encode(alt.Y("row:O", axis=None))
    size = alt.Scale(zero=False, padding=0 if scale else 10, **scale)
    x = alt.X("low:Q", title=unit, axis=alt.Axis(grid=False), scale=size)
    colour = alt.Color("colour:N", scale=None)
    above: dict[str, Any] = {"dy": -18, "baseline": "middle", "fontSize": 11}
    layers = [
        base.mark_rule(strokeWidth=3).encode(x, x2="high:Q", color=colour),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=alt.X("mean:Q"), color=colour),
        base.mark_text(align="left", **above).encode(x=alt.value(0), text="name:N"),
        base.mark_text(align="right", **above).encode(x=alt.value("width"), text="text:N"),
    ]
    if mark is not None:
        layers.insert(0, base.mark_tick(size=20, color=INK).encode(x=alt.datum(mark)))
    if mark is not None and any(row.margin for row in rows):
        layers.insert(0, base.mark_bar(size=20, color=RULE).encode(x=alt.X("from:Q"), x2="to:Q"))
    return alt.layer(*layers).properties(height=ROW * len(rows))


def side_by_side(charts: Sequence[Any], titles: Sequence[str], columns: int = 2, width: int = 400) -> Any:
    """Return one chart of several, each with a key and scales of its own; titles are rows, so of one height."""
    blank = alt.Chart(alt.Data(values=[{}])).encode(x=alt.value(0)).properties(width=width, height=14)
    cells: list[Any] = []
    for at in range(0, len(charts), columns):
        row = [*titles[at : at + columns], *[""] * (at + columns - len(charts))]
        cells += [blank.mark_text(align="left", fontWeight="bold", fontSize=13, text=title) for title in row]
        cells += [sized_to(chart, width) for chart in charts[at : at + columns]]
    whole = alt.concat(*cells, columns=columns, spacing={"row": 12, "column": 20})
    return whole.resolve_scale(color="independent", strokeDash="independent", shape="independent")


def sized_to(chart: Any, width: int | str, height: int = 230) -> Any:
    """Return the chart at a width, and at `height` unless its rows have given it one."""
    return chart.properties(width=width, height=chart.height if isinstance(chart.height, int) else height)


def spec(chart: Any, **properties: Any) -> dict[str, Any]:
    """Return the Vega-Lite specification, which is all that the page needs."""
    found: dict[str, Any] = chart.properties(**properties).configure(**yaml.safe_load(STYLE)).to_dict()
    return found


def light(chart: Any) -> str:
    """Return the specification as JSON with the colours of the light scheme."""
    named = json.dumps(spec(chart, background=LIGHT["back"]))
    return re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], named)


def png(chart: Any) -> bytes:
    """Return the chart as PNG; equal charts give equal bytes."""
    return bytes(vl_convert.vegalite_to_png(light(chart), scale=1.5))


def svg(chart: Any) -> str:
    """Return the chart as SVG; equal charts give equal text."""
    return str(vl_convert.vegalite_to_svg(light(chart))) + "\n"


@cache
def library() -> str:
    """Return the JavaScript of Vega-Embed with all that it needs."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
