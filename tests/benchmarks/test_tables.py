"""The tables of README and docs say what docs/benchmarks.json says, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tables import PAGES, RESULTS, comparison, filled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- benchmark " in text
    assert filled(text, json.loads(RESULTS.read_text(encoding="utf-8"))) == text, "run python -m benchmarks.tables"


def test_medians_ratios_and_the_share_of_the_machines_rate() -> None:
    def turn(speed: float, memory: float) -> dict[str, float]:
        return {"pairs_per_second": speed, "peak_gb": memory, "seconds": 16 / speed}

    table = comparison(
        {
            "date": "2026-01-01",
            "machine": "2 cores",
            "versions": {"torch": "2", "transformers": "5", "trl": None},
            "setting": {"layers": 2, "hidden": 4, "vocabulary": 9, "data": "x", "batch_size": 8, "steps": 2},
            "unavoidable_operations": 8e9,
            "turns": {
                "ours": [turn(4.0, 1.0), turn(2.0, 1.5)],
                "plain": [turn(2.0, 4.0), turn(1.0, 6.0)],
                "gemm": [{"operations_per_second": 4e9}, {"operations_per_second": 4e9}],
            },
        }
    )
    assert "| 3.00 (2.00–4.00) | 2.00 (2.00–2.00) | 1.50 GB |" in table
    assert "| 1.50 (1.00–2.00) | 1.00 (1.00–1.00) | 6.00 GB |" in table
    assert "4 billion a step, done at 37.50 (25.00–50.00) %" in table
