"""Evaluation reads and never writes: exact means over every pair, at β0, and training goes on as without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import Recorder, beta_dpo, controlled, plain_logps, preference, quiet_trainer, same_bits, weights
from transformers import AutoModelForCausalLM

from callbacks import AnnotatorReliability, GammaPOMargin, ReferenceWeights
from lightning_modules import SupervisedFineTuning

BETA0 = 0.1


class ValidationHistory(Callback):
    """What every validation reported, the sanity check's aside."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.seen.append({n: float(v) for n, v in metrics.items() if n.startswith("val/")})
            self.weights.append(weights(pl_module))


def train(folder: Path, model: str, **settings: Any) -> tuple[Any, Recorder, ValidationHistory]:
    recorder, history = Recorder(), ValidationHistory()
    module = preference(model)
    with_state = [GammaPOMargin(0.2, 1.0), AnnotatorReliability("kind"), ReferenceWeights()]
    trainer = quiet_trainer(folder, [*beta_dpo(), *with_state, recorder, history], **settings)
    # 7 validation pairs in batches of 4 and 3
    trainer.fit(module, controlled(24, batch_size=4, micro_batch_tokens=150))
    return module, recorder, history


def by_hand(model: Any, reference: Any, data: Any) -> dict[str, float]:
    """Means over all pairs of the validation split, by plain rows."""
    table, rows = data.open_table("validation")
    values: dict[str, list[float]] = {}
    for row in rows:
        pair = table[int(row)]
        logps = [
            [float(plain_logps(m, pair.prompt, side).sum()) for side in (pair.chosen, pair.rejected)]
            for m in (model, reference)
        ]
        chosen, rejected = (logps[0][side] - logps[1][side] for side in (0, 1))
        gap = chosen - rejected
        measured = {
            "loss": math.log1p(math.exp(-BETA0 * gap)),
            "gap_mean": gap,
            "reward_margin": BETA0 * gap,
            "reward_chosen": BETA0 * chosen,
            "reward_rejected": BETA0 * rejected,
            "reward_accuracy": float(gap > 0),
            "logp_chosen": logps[0][0],
            "logp_rejected": logps[0][1],
        }
        for name, value in measured.items():
            values.setdefault(f"val/{name}", []).append(value)
    return {name: sum(column) / len(column) for name, column in values.items()}


def test_validation_leaves_no_trace_in_training(tiny_llama: str, tmp_path: Path) -> None:
    alone, decisions, _ = train(tmp_path, tiny_llama)
    watched, others, history = train(
        tmp_path, tiny_llama, num_sanity_val_steps=1, limit_val_batches=1.0, val_check_interval=2
    )
    assert same_bits(weights(alone), weights(watched))
    assert len(history.seen) == 3
    for left, right in zip(decisions.decisions, others.decisions, strict=True):
        assert torch.equal(left.gaps, right.gaps)
        assert torch.equal(left.kept, right.kept)
        assert torch.equal(left.beta, right.beta)
        assert left.moments == right.moments
        for name in ("margin", "confidence", "loss_weight"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_every_validation_is_the_exact_mean_over_all_pairs(tiny_llama: str, tmp_path: Path) -> None:
    # the sanity check stops after one of two batches: the next validation must start at the first pair again
    module, _, history = train(
        tmp_path, tiny_llama, num_sanity_val_steps=1, limit_val_batches=1.0, val_check_interval=2
    )
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    data = controlled(24, batch_size=4)
    data.trainer = module.trainer
    for seen, state in zip(history.seen, history.weights, strict=True):
        policy.load_state_dict(
            {name.removeprefix("model."): tensor for name, tensor in state.items()}, strict=False
        )
        with torch.no_grad():
            expected = by_hand(policy, reference, data)
        assert expected.keys() <= seen.keys()
        for name, value in expected.items():
            assert seen[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_test_and_validate_do_without_training(tiny_llama: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, beta_dpo(), limit_val_batches=1.0)
    module, data = preference(tiny_llama), controlled(8, batch_size=4)
    (validated,) = trainer.validate(module, data, verbose=False)
    assert validated["val/gap_mean"] == 0
    assert validated["val/loss"] == pytest.approx(math.log(2), abs=1e-7)
    (tested,) = trainer.test(module, data, verbose=False)
    assert tested["test/reward_accuracy"] == 0.5
    assert {name.split("/")[1] for name in tested} == {name.split("/")[1] for name in validated}


class Interrupting(Callback):
    """Raises after the first batch of an evaluation."""

    def on_validation_batch_end(self, *_: object) -> None:
        raise RuntimeError("an injected failure")


def test_an_interrupted_evaluation_leaves_nothing_to_the_next(tiny_llama: str, tmp_path: Path) -> None:
    data = controlled(8, batch_size=4)
    for module in (preference(tiny_llama), SupervisedFineTuning(tiny_llama)):
        with pytest.raises(RuntimeError, match="injected"):
            quiet_trainer(tmp_path, [Interrupting()], limit_val_batches=1.0).validate(module, data, verbose=False)
        found = [
            quiet_trainer(tmp_path, limit_val_batches=1.0).validate(one, data, verbose=False)
            for one in (module, type(module)(tiny_llama))
        ]
        assert found[0] == found[1]


class Spoil(Callback):
    """Makes the log-probabilities of these pairs of the first validation batch NaN, after the sanity check."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        measured = pl_module.measurer.measure_rows

        def spoilt(batch: Any, rows: Any) -> Any:
            logps = measured(batch, rows)
            if len(batch.positions) == 4:
                logps.policy_chosen[: self.pairs] = math.nan
            return logps

        pl_module.measurer.measure_rows = spoilt


@pytest.mark.parametrize(("pairs", "batches"), [(2, 2), (4, 1)])
def test_pairs_that_are_not_finite_are_in_no_mean_and_counted(
    pairs: int, batches: int, tiny_llama: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, [Spoil(pairs)], limit_val_batches=batches)
    with pytest.warns(
        UserWarning, match=rf"val: {pairs} of {7 if batches == 2 else 4} pairs have no finite log-probability"
    ):
        (figures,) = trainer.validate(
            preference(tiny_llama), controlled(24, batch_size=4, micro_batch_tokens=150), verbose=False
        )
    assert figures["val/nonfinite_pairs"] == pairs
    if batches == 1:
        assert figures["val/pairs"] == 0
        assert math.isnan(figures["val/reward_accuracy"])
        assert math.isnan(figures["val/loss"])
    else:
        assert figures["val/pairs"] == 5
        # the policy is the reference: a tie for every pair that counts
        assert figures["val/reward_accuracy"] == 0.5
        assert figures["val/loss"] == pytest.approx(math.log(2))
