"""Running statistics: order of update, bias correction, the released code's cold start, small batches."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.method.dynamic_beta import Moments, RunningMoments

BATCH = torch.tensor([2.0, -1.5, 1.0, 2.0], dtype=torch.float64)  # mean 0.875
# Deviations 1.125, −2.375, 0.125, 1.125: squares sum to 8.1875.
POPULATION_STD = math.sqrt(8.1875 / 4)
BESSEL_STD = math.sqrt(8.1875 / 3)


def warm(momentum: float = 0.9, ddof: Literal[0, 1] = 0) -> RunningMoments:
    """Averages that stand at M0 = 1, σ = 2 without bias correction."""
    return RunningMoments(
        momentum=momentum, start="zero", ddof=ddof, mean=1.0, std=2.0, mean_updates=1, std_updates=1
    )


def test_batch_spread_is_that_of_the_hand_computation() -> None:
    assert pytest.approx(1.4306904, abs=1e-7) == POPULATION_STD
    assert pytest.approx(1.6520190, abs=1e-7) == BESSEL_STD


@pytest.mark.parametrize(("ddof", "std"), [(0, 1.9430690), (1, 1.9652020)])
def test_statistics_are_updated_before_they_are_used(ddof: Literal[0, 1], std: float) -> None:
    moments = warm(ddof=ddof).update(BATCH)
    assert moments.mean == pytest.approx(0.9 * 1.0 + 0.1 * 0.875, abs=1e-12)
    assert moments.std == pytest.approx(std, abs=1e-6)


def test_bias_correction_makes_the_first_step_the_statistics_of_the_first_batch() -> None:
    running = RunningMoments()
    first = running.update(torch.arange(1.0, 6.0))
    assert first.mean == pytest.approx(3.0, abs=1e-12)
    assert first.std == pytest.approx(math.sqrt(2.0), abs=1e-12)
    second = running.update(torch.arange(3.0, 8.0))
    # (0.9·0.3 + 0.1·5) / (1 − 0.81); the spread of both batches is the same.
    assert second.mean == pytest.approx(0.77 / 0.19, abs=1e-12)
    assert second.std == pytest.approx(math.sqrt(2.0), abs=1e-12)


def test_bias_correction_with_bessel() -> None:
    assert RunningMoments(ddof=1).update(torch.arange(1.0, 6.0)).std == pytest.approx(math.sqrt(2.5))


def test_zero_start_with_bessel_is_the_released_code() -> None:
    running = RunningMoments(start="zero", ddof=1)
    first = running.update(torch.arange(1.0, 6.0))
    assert first.mean == pytest.approx(0.3, abs=1e-12)
    assert first.std == pytest.approx(0.1 * math.sqrt(2.5), abs=1e-12)  # 0.1581139, ten times too small
    second = running.update(torch.arange(3.0, 8.0))
    assert second.mean == pytest.approx(0.77, abs=1e-12)
    assert second.std == pytest.approx(0.19 * math.sqrt(2.5), abs=1e-12)  # 0.3004164


def test_momentum_zero_is_the_last_batch_alone() -> None:
    running = RunningMoments(momentum=0.0)
    running.update(torch.tensor([100.0, 300.0]))
    assert astuple(running.update(BATCH))[:2] == (0.875, pytest.approx(POPULATION_STD))


def test_an_empty_batch_changes_nothing() -> None:
    running = RunningMoments()
    assert running.update(torch.empty(0)) == Moments(mean=0.0, std=None)
    running.update(BATCH)
    before = running.state_dict()
    running.update(torch.empty(0))
    assert running.state_dict() == before


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_single_pair_moves_the_mean_and_not_the_spread(ddof: Literal[0, 1]) -> None:
    running = RunningMoments(ddof=ddof)
    first = running.update(torch.tensor([4.0]))
    assert (first.mean, first.std) == (pytest.approx(4.0), None)
    assert running.update(BATCH).std == pytest.approx(BESSEL_STD if ddof else POPULATION_STD)
    spread = running.std
    after = running.update(torch.tensor([7.0]))
    assert running.std == spread
    assert (running.mean_updates, running.std_updates) == (3, 1)
    assert after.mean == pytest.approx((0.81 * 0.4 + 0.9 * 0.0875 + 0.7) / (1 - 0.9**3))


def test_reading_does_not_move_the_state() -> None:
    running = RunningMoments()
    updated = running.update(BATCH)
    before = running.state_dict()
    assert running.current() == updated
    assert running.state_dict() == before


def test_a_steady_drift_leaves_the_mean_nine_steps_behind() -> None:
    running = RunningMoments()
    for step in range(400):
        gap = 0.05 * step
        moments = running.update(torch.full((4,), gap, dtype=torch.float64))
    assert gap - moments.mean == pytest.approx(9 * 0.05, abs=1e-9)
    assert 1 + 0.6 * (gap - moments.mean) == pytest.approx(1.27, abs=1e-9)  # β/β0 without any better data


def test_float32_gaps_are_averaged_in_float64() -> None:
    values = torch.tensor([1e8, 1e8 + 8.0, 1e8 + 16.0], dtype=torch.float32)
    moments = RunningMoments().update(values)
    assert moments.mean == pytest.approx(1e8 + 8.0, abs=1e-6)
    assert moments.std == pytest.approx(math.sqrt(128 / 3), rel=1e-9)


def test_values_in_a_graph_are_left_alone() -> None:
    gaps = torch.tensor([1.0, 2.0], requires_grad=True)
    RunningMoments().update(gaps)
    assert gaps.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_leaves_the_state(bad: float) -> None:
    running = RunningMoments()
    running.update(BATCH)
    before = running.state_dict()
    with pytest.raises(ValueError, match="finite"):
        running.update(torch.tensor([1.0, bad]))
    assert running.state_dict() == before


@settings(max_examples=30, deadline=None)
@given(
    momentum=st.floats(0.0, 0.999),
    batches=st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), max_size=5),
    start=st.sampled_from(["bias_corrected", "zero"]),
    ddof=st.sampled_from([0, 1]),
)
def test_a_resumed_run_has_the_same_bits(
    momentum: float, batches: list[list[float]], start: Any, ddof: Any
) -> None:
    whole = RunningMoments(momentum=momentum, start=start, ddof=ddof)
    resumed = RunningMoments(momentum=momentum, start=start, ddof=ddof)
    for batch in batches:
        values = torch.tensor(batch, dtype=torch.float64)
        expected = whole.update(values)
        following = RunningMoments(momentum=momentum, start=start, ddof=ddof)
        following.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        assert following.update(values) == expected
        resumed = following
    assert resumed.state_dict() == whole.state_dict()


def test_state_is_python_numbers_only() -> None:
    running = RunningMoments()
    running.update(BATCH)
    assert {type(value) for value in running.state_dict().values()} <= {int, float, str}


def test_state_of_other_settings_is_refused() -> None:
    state = RunningMoments(momentum=0.5).state_dict()
    with pytest.raises(ValueError, match=r"momentum=0\.5.*momentum=0\.9"):
        RunningMoments().load_state_dict(state)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": math.nan}, "momentum"),
        ({"start": "warm"}, "start"),
        ({"ddof": 2}, "ddof"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        RunningMoments(**setting)
