"""The measurement of the audit's signals: area and calibration by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.audit_signals import area, calibration


def test_area_and_calibration_by_hand() -> None:
    wrong = np.array([True, False, False, True])
    assert area(np.array([3.0, 1.0, 2.0, 2.0]), wrong) == pytest.approx((2 + 1.5) / 4)
    probability = np.repeat([0.1, 0.6], 50)
    wrong = np.tile([True] + [False] * 4, 20)  # a fifth of every ten
    assert calibration(probability, wrong) == pytest.approx(0.25)
