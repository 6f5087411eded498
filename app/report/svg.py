"""Scales, axes and marks as SVG. Colours are CSS classes of the page, which has a light and a dark scheme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 388, 10, 208  # the plotting area; a phone shows it at about this size


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to the pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Return approximately `about` round numbers within the scale."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def horizontal(values: Iterable[float], margin: float = 0.04) -> Scale:
    """Return the x scale of a chart of `values`, with a margin at both ends."""
    return Scale(*span(values, margin), LEFT, RIGHT)


def vertical(values: Iterable[float], low: float | None = None, high: float | None = None) -> Scale:
    """Return the y scale of a chart of `values`, growing upwards; `low` and `high` fix its ends."""
    return Scale(*span(values, 0.04, low, high), BOTTOM, TOP)


def span(
    values: Iterable[float], margin: float, low: float | None = None, high: float | None = None
) -> tuple[float, float]:
    """Return the ends of a scale: those of the finite `values` plus a margin, or `low` and `high` where given."""
    found = np.asarray(list(values), dtype=float)
    found = found[np.isfinite(found)]
    least, most = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    spread = (most - least) or abs(most) or 1.0
    bottom = least - margin * spread if low is None else low
    top = most + margin * spread if high is None else high
    return bottom, top if top > bottom else bottom + spread


def axes(x: Scale, y: Scale, x_title: str, y_title: str) -> Markup:
    """Return grid, tick labels and titles; the title of a numeric axis always names its unit."""
    parts = []
    y_text, x_text = numbers(y.ticks()), numbers(x.ticks())
    for value, text in zip(y.ticks(), y_text, strict=True):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in zip(x.ticks(), x_text, strict=True):
        at = x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{BOTTOM + 15}" text-anchor="middle">{text}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(
        f'<text class="axis" transform="translate(12 {(TOP + BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_title)}</text>'
    )
    return Markup("".join(parts))


def numbers(values: Sequence[float]) -> list[str]:
    """Return `values` as text with the fewest decimals that represent them all; from 10,000 on as thousands "k"."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 10_000:
        return [f"{value / 1000:g}k" if value else "0" for value in values]
    for decimals in range(5):
        texts = [f"{value + 0.0:.{decimals}f}" for value in values]
        if all(abs(float(text) - value) < 1e-9 + 1e-6 * largest for text, value in zip(texts, values, strict=True)):
            return [text.replace("-", "−") for text in texts]
    return [f"{value:.1e}".replace("-", "−") for value in values]


def line(x: Scale, y: Scale, xs: Iterable[float], ys: Iterable[float], style: str) -> Markup:
    """Return a line through the finite points, interrupted at others; `style` is a list of CSS classes."""
    path, pen_down = [], False
    for at, value in zip(xs, ys, strict=True):
        if math.isfinite(value):
            path.append(f"{'L' if pen_down else 'M'}{x(at):.1f} {y(value):.1f}")
        pen_down = math.isfinite(value)
    return Markup(f'<path class="line {style}" d="{"".join(path)}"/>')


def area(
    x: Scale, y: Scale, xs: Iterable[float], lower: Iterable[float], upper: Iterable[float], style: str
) -> Markup:
    """Return the area between two curves."""
    points = [(at, value) for at, value in zip(xs, upper, strict=True) if math.isfinite(value)]
    points += [(at, value) for at, value in zip(xs, lower, strict=True) if math.isfinite(value)][::-1]
    text = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
    return Markup(f'<polygon class="area {style}" points="{text}"/>')


def dots(x: Scale, y: Scale, xs: Iterable[float], ys: Iterable[float], style: str, radius: float = 2.2) -> Markup:
    """Return one dot per finite point."""
    return Markup(
        "".join(
            f'<circle class="dot {style}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="{radius}"/>'
            for at, value in zip(xs, ys, strict=True)
            if math.isfinite(value)
        )
    )


def rule(at: float, style: str, x: Scale | None = None, y: Scale | None = None, name: str = "") -> Markup:
    """Return a straight line across the chart at a value of x or y; empty if the value is outside the scale.

    `name` is written above the right end of a line at a value of y.
    """
    scale = x or y
    assert scale is not None
    if not scale.low <= at <= scale.high:
        return Markup("")
    place = f"{scale(at):.1f}"
    ends = (
        f'x1="{place}" x2="{place}" y1="{TOP}" y2="{BOTTOM}"'
        if x
        else f'x1="{LEFT}" x2="{RIGHT}" y1="{place}" y2="{place}"'
    )
    text = f'<text class="name" x="{RIGHT}" y="{scale(at) - 4:.1f}" text-anchor="end">{escape(name)}</text>'
    return Markup(f'<line class="rule {style}" {ends}/>{text if name else ""}')


def drawing(label: str, *parts: Markup, height: int = HEIGHT) -> Markup:
    """Return the whole picture; `label` describes it for screen readers."""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(parts)}</svg>'
    )
