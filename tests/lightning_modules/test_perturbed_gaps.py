"""ε-DPO's steps and β against plain whole logits of policy and reference, by pairs, micro-batches and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import Recorder, controlled, preference, quiet_trainer, same_bits, weights
from transformers import AutoModelForCausalLM

from app.core.errors import UserError
from app.method.losses import SimPOLoss
from callbacks import EpsilonBeta, PairFilter

EPSILON = 0.2  # wide, so that no step hangs on rounding


class Weights(Callback):
    """The weights before every step, and the gaps under perturbation as the step measured them."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.gaps: list[torch.Tensor] = []

    def on_reward_gaps(self, trainer: Any, pl_module: Any, decision: Any) -> None:
        self.before.append(weights(pl_module))
        self.gaps.append(decision.measure_perturbed((-EPSILON, 0.0, EPSILON)))


def run(folder: Path, model: str, *callbacks: Callback, tokens: int = 8192, steps: int = 3, **settings: Any) -> Any:
    recorder = Recorder()
    resume = settings.pop("resume", None)
    trainer = quiet_trainer(folder, [*callbacks, recorder], max_steps=steps, enable_checkpointing=True)
    module = preference(model, lr=0.1, **settings)
    trainer.fit(module, controlled(40, micro_batch_tokens=tokens), ckpt_path=resume)
    return module, recorder.decisions


def plain_gap(policy: Any, reference: Any, pair: Any, epsilon: float) -> float:
    """log π(y_w|x) − log π(y_l|x) under perturbed logits, one plain row per response, the whole vocabulary."""
    sums = []
    for response in (pair.chosen, pair.rejected):
        ids = torch.cat([torch.from_numpy(pair.prompt), torch.from_numpy(response)])[None]
        with torch.no_grad():
            ours, fixed = (model(input_ids=ids).logits.double() for model in (policy, reference))
        logits = ((1 + epsilon) * ours - epsilon * fixed)[0, len(pair.prompt) - 1 : -1]
        picked = torch.log_softmax(logits, dim=-1).gather(-1, torch.from_numpy(response)[:, None])
        sums.append(float(picked.sum()))
    return sums[0] - sums[1]


@pytest.mark.parametrize("tokens", [8192, 115])
def test_gaps_steps_and_beta_equal_plain_logits(tokens: int, tiny_llama: str, tmp_path: Path) -> None:
    seen = Weights()
    module, decisions = run(tmp_path, tiny_llama, seen, EpsilonBeta(EPSILON), tokens=tokens)
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(2))
    data = controlled(40, micro_batch_tokens=tokens)
    data.trainer = module.trainer
    data.setup("fit")
    beta, moved = 0.1, 0
    for batch, decision, before, gaps in zip(
        data.train_dataloader(), decisions, seen.before, seen.gaps, strict=False
    ):
        policy.load_state_dict({name.removeprefix("model."): t for name, t in before.items()}, strict=False)
        assert batch.pair_ids == decision.pair_ids
        table = torch.tensor(
            [[plain_gap(policy, reference, pair, e) for pair in batch.share] for e in (-EPSILON, 0, EPSILON)]
        )
        torch.testing.assert_close(gaps, table.double(), rtol=1e-4, atol=1e-4)
        low, middle, high = table
        steps = ((low < middle) & (middle < high)).double() - ((low > middle) & (middle > high)).double()
        if decision.step == 1:
            steps = torch.zeros(10).double()  # policy and reference are one: no direction, to the bit
            assert torch.equal(gaps[0], gaps[1])
            assert torch.equal(gaps[1], gaps[2])
        assert decision.beta.tolist() == pytest.approx((beta / (1 + EPSILON * steps)).tolist())
        beta /= 1 + EPSILON * float(steps.mean())
        moved += int(steps.abs().sum())
    assert moved > 3


def test_resumed_equals_uninterrupted(tiny_llama: str, tmp_path: Path) -> None:
    def parts() -> list[Callback]:
        return [PairFilter(0.6, seed=1, by="tail"), EpsilonBeta(EPSILON)]

    whole, decisions = run(tmp_path / "whole", tiny_llama, *parts(), steps=4)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    run(tmp_path, tiny_llama, *parts(), saving, steps=2)
    resumed, after = run(tmp_path, tiny_llama, *parts(), steps=4, resume=str(tmp_path / "step=2.ckpt"))
    assert same_bits(weights(whole), weights(resumed))
    assert [d.beta.tolist() for d in after] == [d.beta.tolist() for d in decisions[2:]]
    assert decisions[3].beta_used != pytest.approx(0.1, rel=1e-4)


def test_bounds_hold_and_are_counted(tiny_llama: str, tmp_path: Path) -> None:
    schedule = EpsilonBeta(EPSILON, floor=0.999, ceiling=1.001)
    _, decisions = run(tmp_path, tiny_llama, schedule)
    assert all(((d.beta >= 0.0999 - 1e-12) & (d.beta <= 0.1001 + 1e-12)).all() for d in decisions)
    assert schedule.clamped_steps == 2  # not at step 0, where β stays
    assert schedule.beta is not None
    assert 0.0999 - 1e-12 <= schedule.beta <= 0.1001 + 1e-12


def test_no_reference_no_perturbation(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="EpsilonBeta: SimPOLoss has no reference"):
        run(tmp_path, tiny_llama, EpsilonBeta(), loss=SimPOLoss())


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"epsilon": 1.0}, {"floor": 0.0}, {"ceiling": 0.5}])
def test_wrong_settings_are_refused_at_once(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"EpsilonBeta: {next(iter(wrong))} must be a finite number"):
        EpsilonBeta(**wrong)


def test_a_cached_reference_has_no_logits_to_perturb(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"EpsilonBeta perturbs the reference's logits.*set it to frozen"):
        run(tmp_path, tiny_llama, EpsilonBeta(EPSILON), reference="cached")
