"""Methods on the whole batch (RE-PO, margins, weights) and the controls of an arm, as callbacks of a step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_arms import decided, run, start, unmeasured
from tiny_runs import preference, quiet_trainer

from app.core.errors import UserError
from app.method.losses import IPOLoss, RobustLoss, SigmoidLoss, SimPOLoss
from app.method.pair_loss import PairLoss
from app.method.step import StepDecision
from callbacks import (
    BY_NAME,
    AMaPOMargin,
    AnnotatorReliability,
    BetaScheduler,
    Control,
    GammaPOMargin,
    LossWeights,
    PairAudit,
    PairFilter,
    ReferenceWeights,
    RewardGapStatistics,
    ScoreWeights,
    in_order,
    slot_of,
)
from callbacks.control import CONTROLS, mean_beta


def measured(*gaps: float, loss: PairLoss | None = None, **labels: Sequence[object]) -> StepDecision:
    decision = start(*gaps, **labels)
    decision.loss = loss or decision.loss
    return decision


def test_reliability_follows_each_annotator_and_leaves_out_pairs_that_are_not_finite() -> None:
    callback = AnnotatorReliability(initial=0.8, momentum=0.5)
    decision, seen = decided(measured(20.0, -20.0, math.nan, 0.0, annotator=["a", "b", "b", None]), callback)
    w = [1 / (1 + math.exp(-h / 10 - math.log(4))) for h in (20.0, -20.0, 0.0)]
    assert decision.confidence is not None
    assert decision.confidence[[0, 1, 3]].tolist() == pytest.approx(w)
    assert callback.reliability == pytest.approx(
        {n: 0.4 + 0.5 * x for n, x in zip(("a", "b", "unnamed"), w, strict=True)}
    )
    assert seen["confidence/reliability_b"] == seen["confidence/lowest_reliability"]
    other = AnnotatorReliability()
    other.load_state_dict(callback.state_dict())
    assert other.reliability == callback.reliability


def test_one_annotator_without_a_column_and_no_column_of_another_name() -> None:
    callback = AnnotatorReliability()
    decided(measured(1.0, 2.0), callback)
    assert list(callback.reliability) == ["everyone"]
    with pytest.raises(UserError, match=r"no column 'rater'; it has these: kind\. Name another by --confidence"):
        decided(measured(1.0, kind=["a"]), AnnotatorReliability("rater"))


def test_gaps_of_earlier_batches_move_the_margins_until_they_leave_the_queue() -> None:
    margin = GammaPOMargin(0.5, 0.5, window=3)
    alone = decided(measured(1.0, 30.0), GammaPOMargin(0.5, 0.5))[0].margin
    decided(measured(-50.0, -60.0), margin)
    first, _ = decided(measured(1.0, 30.0), margin)
    again, _ = decided(measured(1.0, 30.0, math.nan, 2.0), margin)
    assert alone is not None
    assert first.margin is not None
    assert float((first.margin - alone).abs().max()) > 0.01
    assert again.margin is not None
    assert float(again.margin[[0, 1, 3]].mean()) == pytest.approx(0.5)  # the batch fills the queue
    with pytest.raises(UserError, match="at most 1000"):
        GammaPOMargin(1.0, 1e-4)


@pytest.mark.parametrize(
    "part",
    [
        *(
            lambda: AnnotatorReliability(momentum=1.0),
            lambda: GammaPOMargin(5.0, 0.05),
            AMaPOMargin,
            ReferenceWeights,
        ),
        *(lambda: LossWeights("dr_dpo", 1e-3), lambda: LossWeights("kldpo", 1e-3)),
        *(lambda: ScoreWeights(largest=1.0, slope=1e3), lambda: ScoreWeights("quality", slope=1e3)),
    ],
)
@pytest.mark.parametrize("gaps", [[3.0], [2.0, 2.0, 2.0], [1e4, -1e4], [0.0, math.nan]])
def test_degenerate_batches_give_finite_decisions_twice(part: Any, gaps: list[float]) -> None:
    callback = part()
    for _ in range(2):  # the second time with a state
        score = [2e3 * h if math.isfinite(h) else 0.0 for h in gaps]
        decision = measured(*gaps, chosen_reward=score, rejected_reward=[0.0] * len(gaps))
        decision.reference_margin = decision.gaps.clone()
        decided(decision, callback)
        for name in ("loss_weight", "margin", "confidence"):
            value = getattr(decision, name)
            assert value is None or bool(torch.isfinite(value[decision.kept]).all()), name


def test_annotators_without_a_name_and_weights_without_a_sum_are_said(caplog: pytest.LogCaptureFixture) -> None:
    callback = AnnotatorReliability(momentum=1.0)
    decided(measured(900.0, 900.0, -900.0, annotator=["a", None, ""]), callback)
    decided(measured(900.0, annotator=[None]), callback)
    said = "1 of 3 pairs of step 0 have no value in the column 'annotator'"
    assert [record.getMessage().startswith(said) for record in caplog.records] == [True]
    # a certain annotator is not beyond doubt, and ten thousand are no trouble
    assert 0 < callback.reliability[""] < callback.reliability["a"] < 1
    decided(measured(*[1.0] * 10_000, annotator=[str(n) for n in range(10_000)]), callback)
    assert len(callback.reliability) == 10_003
    zero = measured(1.0, 1.0, chosen_reward=[0, 0], rejected_reward=[9e3, 9e3])
    decided(zero, ScoreWeights("quality"))
    assert (
        caplog.records[-1].getMessage()
        == "step 0: ScoreWeights gives every pair the weight 0: the step learns nothing"
    )


@pytest.mark.parametrize(
    ("part", "loss", "named"),
    [
        (AnnotatorReliability(), SigmoidLoss(0.1), "SigmoidLoss has no swapped form"),
        (AnnotatorReliability(), RobustLoss(), "RobustLoss has no swapped form"),
        (GammaPOMargin(), IPOLoss(), "GammaPOMargin: IPOLoss has no logit"),
        (ReferenceWeights(), SimPOLoss(), "ReferenceWeights: SimPOLoss has no reference"),
        (AMaPOMargin(), SigmoidLoss(), "AMaPOMargin: SigmoidLoss has no length-normalised gap without reference"),
    ],
)
def test_what_does_not_go_together_is_refused(part: Any, loss: PairLoss, named: str) -> None:
    with pytest.raises(UserError, match=named):
        part.setup(None, type("Module", (), {"loss": loss})(), "fit")


def test_weights_leave_dropped_pairs_and_multiply_what_is_there() -> None:
    decision = measured(-20.0, 0.0, 20.0, math.nan)
    decision.kept[2] = False
    decision.loss_weight[:] = 2.0
    _, seen = decided(decision, LossWeights("dr_dpo", 0.5))
    assert decision.loss_weight[2:].tolist() == [2.0, 2.0]
    assert float(decision.loss_weight[:2].mean()) == pytest.approx(2.0)
    assert decision.loss_weight[0] < decision.loss_weight[1]
    assert 1.0 < seen["weights/effective_sample_size"] < 2.0
    clamped, seen = decided(measured(-99.0, 9.0, 9.0, 9.0), LossWeights("kldpo", 0.1))
    assert float(clamped.loss_weight[0]) == 10.0
    assert seen["weights/clamped"] == 0.25
    with pytest.raises(UserError, match=r"ScoreWeights: the data has no column 'chosen_reward'.*--weights\.chosen"):
        decided(unmeasured(), ScoreWeights())


def test_micro_batches_change_nothing_under_these_methods(tiny_llama: str, tmp_path: Path) -> None:
    one, many = (
        run(
            tmp_path / str(tokens),
            tiny_llama,
            *(
                RewardGapStatistics(),
                PairFilter(0.6, seed=1),
                BetaScheduler(level="instance"),
                GammaPOMargin(0.3, 1.0),
            ),
            *(AnnotatorReliability("kind"), LossWeights("kldpo", 0.5)),
            tokens=tokens,
            lr=0.05,
        )
        for tokens in (8192, 115)
    )
    assert float(one[2]["train/loss"]) == pytest.approx(float(many[2]["train/loss"]), rel=1e-4)
    for left, right in zip(one[1], many[1], strict=True):
        for name in ("margin", "confidence", "loss_weight"):
            assert getattr(left, name).tolist() == pytest.approx(getattr(right, name).tolist(), rel=1e-3), name


# --- controls -----------------------------------------------------------------------------------------------


def controlled_arm(by: Any) -> tuple[list[Callback], int]:
    """The callbacks of an arm with every slot filled, under a control, and the place of the control."""
    control = Control(by, seed=5)
    order = in_order(
        {
            "statistics": RewardGapStatistics(),
            "filter": PairFilter(0.5, seed=2),
            "schedule": BetaScheduler(level="instance"),
            "margin": GammaPOMargin(0.3, 1.0),
            "confidence": AnnotatorReliability(),
            "weights": LossWeights("kldpo", 0.5),
            "control": control,
        }
    )
    return order, order.index(control)


@pytest.mark.parametrize("by", [name for name in CONTROLS if name != "static_beta"])
def test_a_control_keeps_the_distribution_and_exchanges_the_pairs(by: Any) -> None:
    gaps = [0.1 * i * i - 2 for i in range(12)] + [math.nan]
    name, slots = CONTROLS[by]
    order, place = controlled_arm(by)
    arm, _ = decided(measured(*gaps), *order[:place])
    order, _ = controlled_arm(by)
    under, seen = decided(measured(*gaps), *order[: place + 1])
    was, now = getattr(arm, name), getattr(under, name)
    assert not torch.equal(was, now)
    assert sorted(was[arm.kept].tolist()) == sorted(now[under.kept].tolist())
    assert under.kept_count == arm.kept_count
    assert not under.kept[-1]
    assert seen["control/changed"] > 0
    assert slot_of(type(order[place - 1])) is BY_NAME[slots[-1]]
    order, _ = controlled_arm(by)  # the draw depends on seed and step alone
    again = getattr(decided(measured(*gaps), *order[: place + 1])[0], name)
    assert again[arm.eligible].tolist() == now[arm.eligible].tolist()


def test_a_control_without_anything_to_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="shuffled_margin has nothing to control: fill the slot margin"):
        in_order({"filter": PairFilter(), "control": Control("shuffled_margin")})
    with pytest.raises(UserError, match="give run, the log folder of a finished run of the arm, with static_beta"):
        Control("static_beta")
    control = Control("shuffled_beta", seed=1)
    decided(measured(1.0, 2.0), BetaScheduler(), control)  # one β for the batch
    control.on_train_end(quiet_trainer(tmp_path), preference("anywhere"))
    assert "shuffled_beta changed nothing" in capsys.readouterr().out


def test_a_static_beta_at_the_mean_of_the_arm(tiny_llama: str, tmp_path: Path) -> None:
    parts = {"statistics": RewardGapStatistics(), "filter": PairFilter(0.6, seed=1), "schedule": BetaScheduler()}
    _, decisions, _ = run(tmp_path, tiny_llama, *parts.values(), PairAudit())
    betas = torch.cat([decision.beta[decision.kept] for decision in decisions])
    assert float(betas.std()) > 0
    assert mean_beta(tmp_path) == pytest.approx(float(betas.mean()))
    control = Control("static_beta", str(tmp_path))
    _, static, _ = run(tmp_path / "static", tiny_llama, *in_order({**parts, "control": control}))
    assert {beta for decision in static for beta in decision.beta.tolist()} == {mean_beta(tmp_path)}
    with pytest.raises(UserError, match=r"control.run: There is no folder"):
        mean_beta(tmp_path / "nowhere")
    for file in (tmp_path / "audit").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"control.run: .*audit cannot be read: "):
        mean_beta(tmp_path)
    shutil.rmtree(tmp_path / "audit")
    (tmp_path / "audit").mkdir()
    with pytest.raises(UserError, match=r"control.run: .* holds no audit/\*.parquet"):
        mean_beta(tmp_path)
