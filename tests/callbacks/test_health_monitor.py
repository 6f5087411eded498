"""What counts as ill, when the log says so, and that watching a run does not change it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer, same_bits, weights

from app.core.errors import StepRefused, UserError
from app.method.dynamic_beta import effective_sample_size
from callbacks import BetaScheduler, HealthMonitor, PairFilter, RewardGapStatistics, RunCheckpoint
from callbacks.health import BY_NAME, CONDITIONS, SPEED, Window, chosen_falls


def holds(name: str) -> Any:
    return BY_NAME[name].holds


beta_at_bounds, beta_far = holds("β at its bounds"), holds("β far from β0")
sample_size_collapsed = holds("effective sample size collapsed")
nonfinite_pairs = holds("pairs without a finite gap")
accuracy_saturated, throughput_lost = holds("accuracy saturated"), holds("throughput lost")


def held(columns: dict[str, list[float]], length: int) -> set[str]:
    """The conditions that hold after the last step of `columns`."""
    window = Window(length)
    return [window.add(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)][-1]


def test_beta_at_bounds_in_more_than_a_tenth_of_the_pairs() -> None:
    assert not beta_at_bounds([0.0] * 9 + [1.0])
    assert beta_at_bounds([0.0] * 8 + [1.0] * 2)


def test_beta_far_from_its_base_in_either_direction() -> None:
    near, base = [0.1] * 19, [0.1] * 20
    assert not beta_far([*near, 0.29], base)
    assert not beta_far([*near, 0.31], base)  # one step of twenty
    assert beta_far([*near[:-1], 0.31, 0.03], base)
    assert held({"beta/used": [0.01, 0.04], "beta/base": [0.01, 0.01]}, 20) == {"β far from β0"}


def test_normal_gaps_are_no_collapse_and_one_outlier_is() -> None:
    gaps = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = effective_sample_size(-(gaps**2) / 2)
    assert normal / 4000 == pytest.approx(math.sqrt(3) / 2, abs=0.02)  # as the page says
    assert not sample_size_collapsed([normal], [4000.0])
    one = effective_sample_size(torch.tensor([0.0] + [-30.0] * 63))
    assert sample_size_collapsed([one], [64.0])


@pytest.mark.parametrize(
    ("chosen", "rejected", "ill"),
    [
        ([-2.0, -2.1, -1.9], [-2.5, -2.5, -2.5], True),  # the margin grew by 0.5, the chosen fell by 2
        ([-2.0, -2.1, -1.9], [-9.0, -9.0, -9.0], False),  # the margin grew by more than the chosen fell
        ([2.0, 2.1, 1.9], [1.5, 1.5, 1.5], False),  # both rise
        ([-0.2, 0.3, -0.2], [-0.1, -0.1, -0.1], False),  # within the noise
        ([-2.0], [-2.5], False),  # one step has no standard error
    ],
)
def test_chosen_falls_with_rejected(chosen: list[float], rejected: list[float], ill: bool) -> None:
    assert chosen_falls(chosen, rejected) == ill
    # β0 cancels
    assert chosen_falls([c * 0.01 for c in chosen], [r * 0.01 for r in rejected]) == ill


def test_the_other_conditions() -> None:
    assert accuracy_saturated([1.0, 0.97, 1.0])
    assert not accuracy_saturated([1.0, 0.9, 1.0])
    assert nonfinite_pairs([3.0, 3.0, 4.0])
    assert not nonfinite_pairs([3.0, 3.0, 3.0])
    # a median: one long validation is no loss
    assert not throughput_lost([100.0, 1.0, 100.0], [110.0])
    assert throughput_lost([50.0, 40.0, 100.0], [110.0])


def test_conditions_need_a_whole_window_and_what_they_look_at() -> None:
    assert held({"beta/clamped": [1.0] * 4}, 5) == set()
    assert held({"beta/clamped": [1.0] * 5}, 5) == {"β at its bounds"}
    of_how_many = {"filter/effective_sample_size": [1.0] * 5}
    assert held(of_how_many, 5) == set()
    assert held(of_how_many | {"pairs": [9.0] * 5}, 5) == {"effective sample size collapsed"}
    assert held({"train/nonfinite_pairs": [0.0, 1.0]}, 5) == {"pairs without a finite gap"}
    assert held({"train/nonfinite_pairs": [1.0]}, 5) == {"pairs without a finite gap"}  # lost in the first step
    # without a reference the rewards are no log-ratios
    rewards = {"train/reward_chosen": [-2.0, -2.1], "train/reward_rejected": [-2.5, -2.5]}
    assert held(rewards, 2) == set()
    rewards["train/reference_accuracy"] = [0.5, 0.5]
    assert held(rewards, 2) == {"chosen falls with rejected"}


def test_one_line_at_the_start_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "callbacks")
    monitor = HealthMonitor(window=3)
    clamped = [0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    for step, value in enumerate(clamped, 1):
        monitor.observe(step, {"beta/clamped": float(value)})
        if step == 5:  # a resumed run knows what has started
            state, monitor = monitor.state_dict(), HealthMonitor(window=3)
            monitor.load_state_dict(state)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("step 3: β at its bounds: the gaps are wide for this schedule")
    assert lines[0].endswith("(docs/monitoring.md#β-at-its-bounds)")
    # the last window that holds a clamped step ends at step 9, and three more are needed
    assert lines[1] == "step 12: no longer: β at its bounds (since step 3)"


def test_lost_throughput_is_measured_against_the_best_of_this_machine() -> None:
    monitor = HealthMonitor(window=2)
    for step, speed in enumerate([11.0, 100.0, 100.0, 100.0, 100.0, 33.0, 33.0, 100.0, 100.0], 1):
        monitor.observe(step, {SPEED: speed})
        # a window of two slow steps is below half of the best
        assert ("throughput lost" in monitor._since) == (step >= 7 and step < 9)
    assert set(monitor.state_dict()["values"]) == {"train/nonfinite_pairs"}


def test_a_stopped_run_resumes_with_the_same_settings_and_stops_by_its_own_steps() -> None:
    strategy = SimpleNamespace(broadcast=lambda name: name)
    trainer: Any = SimpleNamespace(strategy=strategy, global_step=0, checkpoint_callbacks=[])

    def stops_after(monitor: HealthMonitor, measured: dict[str, float]) -> int:
        for step in range(1, 9):
            monitor.on_train_batch_start(trainer, None)  # type: ignore[arg-type]
            monitor.observe(step, measured)
            try:
                monitor.on_train_batch_start(trainer, None)  # type: ignore[arg-type]
            except StepRefused:
                return step
        return 0

    for name, wrong, right, steps in (
        ("β at its bounds", {"beta/clamped": 1.0}, {"beta/clamped": 0.0}, 3),
        ("pairs without a finite gap", {"train/nonfinite_pairs": 1.0}, {"train/nonfinite_pairs": 1.0}, 1),
    ):
        monitor = HealthMonitor(window=3, stop_on=[name])
        assert stops_after(monitor, wrong) == steps
        for measured, expected in ((right, 0), (wrong, 0 if right == wrong else steps)):
            resumed = HealthMonitor(window=3, stop_on=[name])
            resumed.load_state_dict(monitor.state_dict())
            assert stops_after(resumed, measured) == expected


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="HealthMonitor: window must be a whole number from 2"):
        HealthMonitor(window=1)
    with pytest.raises(UserError, match="stop_on 'beta' is none of 'β at its bounds', "):
        HealthMonitor(stop_on=["beta"])


def test_links_and_advice() -> None:
    for condition in CONDITIONS:
        assert condition.link == f"docs/monitoring.md#{condition.name.replace(' ', '-')}"
    bounds = CONDITIONS[0].advice_with("lower schedule.epsilon")
    assert bounds == "the gaps are wide for this schedule: lower schedule.epsilon"
    assert CONDITIONS[-1].advice_with("lower schedule.epsilon") == CONDITIONS[-1].advice  # not on β


def strong_beta() -> list:
    """A β that meets its floor at once: α so large that any fall of the gap is too much."""
    return [RewardGapStatistics(), PairFilter(0.6, seed=11), BetaScheduler(alpha=1e4, floor=0.5, ceiling=1.5)]


def test_a_run_is_watched_stopped_and_goes_on_unchanged(
    tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "callbacks")
    settings = {"max_steps": 6, "max_epochs": 9, "enable_checkpointing": True}

    def fit(folder: str, *monitors: HealthMonitor, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        module = preference(tiny_llama)
        checkpoints = RunCheckpoint(dirpath=str(tmp_path / folder))
        trainer = quiet_trainer(tmp_path, [*monitors, *strong_beta(), checkpoints], **settings)
        trainer.fit(module, controlled(43), ckpt_path=ckpt_path)
        return weights(module)

    unwatched = fit("unwatched")
    assert same_bits(fit("watched", HealthMonitor(window=3)), unwatched)
    assert any("β at its bounds" in line and "lower schedule.alpha" in line for line in caplog.messages)

    with pytest.raises(StepRefused, match=r"after step [3-5]: β at its bounds .* resume with --ckpt_path last"):
        fit("stopped", HealthMonitor(window=3, stop_on=["β at its bounds"]))
    last = tmp_path / "stopped" / "last.ckpt"
    assert 3 <= torch.load(last, weights_only=True)["global_step"] <= 5
    resumed = fit("stopped", HealthMonitor(window=3), ckpt_path=str(last))
    assert same_bits(resumed, unwatched)


def test_nothing_is_said_of_a_healthy_run(
    tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "callbacks")
    trainer = quiet_trainer(tmp_path, [HealthMonitor(window=2), *beta_dpo()], max_steps=4)
    trainer.fit(preference(tiny_llama, lr=1e-4), controlled(43))
    assert trainer.callback_metrics["train/loss"] > 0
    assert not [line for line in caplog.messages if "throughput" not in line and "docs/monitoring.md" in line]
