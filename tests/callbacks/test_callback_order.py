"""Filter and β schedule need the statistics before them, and say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from tiny_runs import Recorder, controlled, preference, quiet_trainer

from app.core.errors import UserError
from app.method.dynamic_beta import selection_noise
from app.method.losses import IPOLoss, SigmoidLoss, SPPOHardLoss
from app.method.pair_loss import PairLoss
from callbacks import BetaScheduler, PairFilter, RewardGapStatistics


def run(folder: Path, model: str, *callbacks: Callback, lr: float = 0.5) -> Recorder:
    recorder = Recorder()
    trainer = quiet_trainer(folder, [*callbacks, recorder], max_steps=3)
    trainer.fit(preference(model, lr=lr), controlled(30))
    return recorder


@pytest.mark.parametrize("needy", [PairFilter, BetaScheduler])
@pytest.mark.parametrize("late", [False, True])
def test_statistics_must_come_first(needy: type[Callback], late: bool, tiny_llama: str, tmp_path: Path) -> None:
    callbacks = [needy(), *([RewardGapStatistics()] if late else [])]
    cure = f"{needy.__name__} needs .*: fill the slot `statistics`"
    with pytest.raises(UserError, match=cure):
        run(tmp_path, tiny_llama, *callbacks)


def test_each_works_alone_behind_the_statistics(tiny_llama: str, tmp_path: Path) -> None:
    filtered = run(tmp_path, tiny_llama, RewardGapStatistics(), PairFilter(0.5)).decisions[-1]
    assert (filtered.kept_count, filtered.beta_used) == (5, pytest.approx(0.1, abs=1e-15))
    scheduled = run(tmp_path, tiny_llama, RewardGapStatistics(), BetaScheduler()).decisions[-1]
    assert scheduled.kept_count == 10
    assert abs(scheduled.beta_used - 0.1) > 1e-4


def test_the_draw_is_keyed_by_seed_and_step(tiny_llama: str, tmp_path: Path) -> None:
    # with no learning every gap is 0 and every pair equally likely: only the noise tells the draws apart
    draws = {}
    for seed in (1, 2):
        recorder = run(tmp_path, tiny_llama, RewardGapStatistics(), PairFilter(0.5, seed=seed), lr=0.0)
        for decision in recorder.decisions:
            assert decision.log_weights is not None
            assert not decision.log_weights.any()
            likeliest = selection_noise(seed, decision.step - 1, 10).topk(5).indices
            assert sorted(likeliest.tolist()) == decision.kept.nonzero().flatten().tolist()
            draws[seed, decision.step] = tuple(decision.kept.tolist())
    assert len(set(draws.values())) == 6


def test_the_paper_scale_acts_beta0_times_as_strongly(tiny_llama: str, tmp_path: Path) -> None:
    raw, scaled = (
        run(tmp_path, tiny_llama, RewardGapStatistics(gap_scale=scale), BetaScheduler(1e-3)).decisions[-1]
        for scale in ("raw", "beta0")
    )
    assert scaled.moments is not None
    assert raw.moments is not None
    assert raw.moments.std is not None
    assert scaled.moments.std == pytest.approx(0.1 * raw.moments.std, rel=1e-3)
    assert float(scaled.gaps.std()) == pytest.approx(float(raw.gaps.std()), rel=1e-3)
    expected = 0.1 * (1 + 1e-3 * (0.1 * float(scaled.gaps.mean()) - scaled.moments.mean))
    assert scaled.beta_used == pytest.approx(expected, abs=1e-12)
    assert abs(scaled.beta_used - 0.1) < 0.2 * abs(raw.beta_used - 0.1)


def test_beta_is_clamped_counted_and_reported(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = BetaScheduler(alpha=1.0, floor=0.999, ceiling=1.0)
    recorder = run(tmp_path, tiny_llama, RewardGapStatistics(), scheduler)
    used = [decision.beta_used for decision in recorder.decisions]
    assert all(0.0999 - 1e-12 <= beta <= 0.1 + 1e-12 for beta in used)
    assert scheduler.clamped_steps == 2  # step 0 is exactly β0, which is no clamping
    assert "β met its bounds in 2 of 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loss", "floor", "expected"),
    [
        (SigmoidLoss(), None, 0.01),
        (IPOLoss(), None, 0.25),
        (SPPOHardLoss(), None, 0.25),
        (IPOLoss(), 0.1, 0.1),
    ],
)
def test_the_floor_follows_the_loss_unless_it_is_given(
    loss: PairLoss, floor: float | None, expected: float, tmp_path: Path
) -> None:
    scheduler = BetaScheduler(floor=floor)
    scheduler.setup(quiet_trainer(tmp_path), preference("anywhere", loss=loss), "fit")
    assert scheduler.bounds(1.0) == (expected, None)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PairFilter(0.0), "keep_ratio"),
        (lambda: PairFilter(1.5), "keep_ratio"),
        (lambda: BetaScheduler(floor=0.0), "BetaScheduler: floor"),
        (lambda: BetaScheduler(ceiling=0.5), "BetaScheduler: ceiling"),
        (lambda: RewardGapStatistics(momentum=1.0), "RewardGapStatistics: momentum"),
    ],
)
def test_settings_are_checked_at_once(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
