"""The pairs with the lowest and the highest gaps, collected and written as a Markdown table."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from app.method.step import StepDecision

LONGEST_TEXT = 240  # characters of a response that are shown
MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in "&\\`*_[]<>|#"}


class MeasuredPair(NamedTuple):
    """A pair as measured at one step; sorts by its gap."""

    gap: float
    step: int
    pair_id: str
    kept: bool
    labels: Mapping[str, object]


class ExtremePairs:
    """A collection of the `count` lowest and `count` highest gaps of all decisions since it was last emptied."""

    def __init__(self, count: int):
        self.count = count
        self.lowest: list[MeasuredPair] = []
        self.highest: list[MeasuredPair] = []

    def add(self, decision: StepDecision) -> None:
        """Add the eligible pairs of a step."""
        seen = [
            MeasuredPair(
                gap, decision.step, decision.pair_ids[at], kept, {n: v[at] for n, v in decision.labels.items()}
            )
            for at, (gap, kept, eligible) in enumerate(
                zip(decision.gaps.tolist(), decision.kept.tolist(), decision.eligible.tolist(), strict=True)
            )
            if eligible
        ]
        self.lowest = heapq.nsmallest(self.count, [*self.lowest, *seen], key=lambda pair: pair.gap)
        self.highest = heapq.nlargest(self.count, [*self.highest, *seen], key=lambda pair: pair.gap)

    def empty(self) -> tuple[list[MeasuredPair], list[MeasuredPair]]:
        """Return both lists, the most extreme pairs first, and empty them."""
        lowest, highest, self.lowest, self.highest = self.lowest, self.highest, [], []
        return lowest, highest


def as_markdown(pairs: Sequence[MeasuredPair], texts: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table of `pairs`, with prompt, chosen and rejected text where `texts` has the pair id."""
    # few columns, because TensorBoard breaks the words in narrow ones
    lines = ["| pair | prompt | chosen | rejected |", "|---|---|---|---|"]
    for pair in pairs:
        labels = "".join(f"; {name}: {value}" for name, value in pair.labels.items() if value is not None)
        fate = "kept" if pair.kept else "dropped"
        text = texts.get(pair.pair_id, {})
        sides = [shown(text.get(side, "–")) for side in ("prompt", "chosen", "rejected")]
        told = f"**h = {pair.gap:.3f}**, {fate} at step {pair.step}; {shown(f'{pair.pair_id}{labels}')}"
        lines.append(f"| {' | '.join([told, *sides])} |")
    return "\n".join(lines)


def shown(text: str) -> str:
    """Return `text` on one line for a Markdown table, cut with an ellipsis, its markup escaped."""
    text = " ".join(text.split())
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT].rstrip()} …"
    return text.translate(MARKUP)
