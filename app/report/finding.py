"""The record of one finding about a run."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["act", "watch", "good"]  # something to change, something to know, something that went well


class Finding(NamedTuple):
    """One sentence about a run, with its evidence and advice."""

    run: str
    level: Level
    sentence: str
    evidence: str
    advice: str
    chart: str  # anchor of the chart that shows it


def sentence(clause: str) -> str:
    """Return a clause of `callbacks.health` as a sentence."""
    return f"{clause[0].upper()}{clause[1:]}."
