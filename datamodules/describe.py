"""What a table of pairs is made of, in lines for a person."""

from __future__ import annotations

import numpy as np

from datamodules.gap_mixture import GapMixedTable
from datamodules.rewards import RewardedTable
from datamodules.table import JoinedTables, PairTable, TokenisedTable


def describe(table: PairTable, rows: np.ndarray) -> list[str]:
    """What is in these rows of a table, and what reading and tokenising left out, in one line a table."""
    if isinstance(table, GapMixedTable):
        own, replaced = table.parts
        samples = [f"samples: {line}" for line in describe(replaced.table, np.arange(len(replaced.table)))]
        return [*describe(own.table, rows), *samples, table.note]
    if isinstance(table, JoinedTables):
        counts = np.bincount(table.part_of(rows), minlength=len(table.parts)).tolist()
        sources = [
            f"{part.labels.get('source')}: {count} of its {line}"
            for part, count in zip(table.parts, counts, strict=True)
            for line in describe(part.table, np.arange(len(part.table)))
        ]
        return [f"{len(rows)} pairs of {len(sources)} sources", *sources]
    if isinstance(table, RewardedTable):
        (line,) = describe(table.table, rows)
        left_out = int((~table.scored).sum())
        return [line + f"; {left_out} left out, the reward model's chat template refuses them" * bool(left_out)]
    assert isinstance(table, TokenisedTable)
    counts_by_reason = [
        f"{count} {reason}" + (f" (first: {', '.join(table.examples[reason])})" if reason in table.examples else "")
        for reason, count in table.report.items()
        if reason not in ("pairs", "rows")
    ]
    return ["; ".join([f"{len(rows)} pairs", f"{table.report['rows']} rows read", *counts_by_reason])]
