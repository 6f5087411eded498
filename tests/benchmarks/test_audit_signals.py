"""The measurement of the audit's signals: pairs flipped on purpose, area and calibration by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.audit_signals import area, calibration, flipped_pairs


def test_a_share_of_the_labels_is_flipped_and_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(20)]
    rows += [
        {"prompt": "q 0", "chosen": "no", "rejected": "yes"},
        {"prompt": "q", "chosen": "y" * 99, "rejected": "no"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flipped_pairs(str(tmp_path / "pairs.jsonl"), 5, 10, 50, tmp_path / "new" / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in found}) == 10  # no pair twice, in either direction, and none too long
    assert sum(row["flipped"] for row in found) == 2
    assert all((row["chosen"] == "no") == row["flipped"] for row in found)


def test_area_and_calibration_by_hand() -> None:
    wrong = np.array([True, False, False, True])
    assert area(np.array([3.0, 1.0, 2.0, 2.0]), wrong) == pytest.approx((2 + 1.5) / 4)
    probability = np.repeat([0.1, 0.6], 50)
    wrong = np.tile([True] + [False] * 4, 20)  # a fifth of every ten
    assert calibration(probability, wrong) == pytest.approx(0.25)
