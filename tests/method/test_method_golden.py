"""Golden numbers of the method, float64 to 1e-9, beside hand-sized ones; BETA_DPO_GOLDEN names another folder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden import golden_numbers

from app.method.dynamic_beta import (
    Moments,
    RunningMoments,
    batch_beta,
    epsilon_beta,
    gaussian_log_weights,
    gumbel_top_k,
    next_epsilon_beta,
    number_kept,
    selection_noise,
)
from app.method.losses import HingeLoss, IPOLoss, LengthNormalisedIPOLoss, RobustLoss, SigmoidLoss, SimPOLoss
from app.method.pair_loss import PairLogps, PairLoss


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return golden_numbers("method")


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-9)


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sequences_of_steps(golden: dict[str, Any]) -> None:
    steps_seen = 0
    for sequence in golden["sequences"]:
        running = RunningMoments(momentum=sequence["momentum"])
        for step in sequence["steps"]:
            gaps = column(step["gaps"]).requires_grad_()
            n = gaps.numel()
            moments = running.update(gaps)
            assert moments == Moments(close(step["running_mean"]), close(step["running_std"]))

            log_weights = gaussian_log_weights(gaps, moments)
            assert log_weights.tolist() == close(step["log_weights"])
            k = number_kept(n, sequence["keep_ratio"])
            assert k == step["k"] == len(step["kept"])
            # With equal noise for all, Gumbel-top-k is the k largest weights: the mask of these numbers.
            kept = gumbel_top_k(log_weights, k, torch.full((n,), 0.5, dtype=torch.float64))
            assert kept.nonzero().flatten().tolist() == step["kept"]

            raw = batch_beta(sequence["beta0"], sequence["alpha"], gaps[kept], moments)
            assert raw.item() == close(step["beta_unclamped"])
            beta = raw.clamp(min=1e-3)
            assert beta.item() == close(step["beta"])

            zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.int64)
            pairs = PairLogps(gaps, zero, zero, zero, one, one)
            loss = SigmoidLoss()(pairs.select(kept), beta).mean()
            assert loss.item() == close(step["loss"])
            loss.backward()
            assert gaps.grad is not None
            assert gaps.grad.tolist() == close(step["grad_gaps"])
            steps_seen += 1
    assert steps_seen > 0


LOSSES: list[tuple[str, PairLoss, float | None]] = [
    ("sigmoid", SigmoidLoss(), None),
    ("cdpo_eps_0_1", SigmoidLoss(label_smoothing=0.1), None),
    ("robust_eps_0_1", RobustLoss(label_smoothing=0.1), None),
    ("hinge", HingeLoss(), None),
    ("ipo", IPOLoss(), None),
    ("ipo_length_normalised", LengthNormalisedIPOLoss(), None),
    ("simpo_beta_2_gamma_1", SimPOLoss(gamma=1.0), 2.0),
]


def test_no_number_goes_unchecked(golden: dict[str, Any]) -> None:
    assert golden.keys() == {"note", "sequences", "losses", "epsilon_dpo", "selection_law", "k_rule"}
    inputs = {"beta", "gap", "chosen_tokens", "rejected_tokens"}
    inputs |= {f"{model}_{side}" for model in ("policy", "reference") for side in ("chosen", "rejected")}
    assert golden["losses"].keys() - inputs == {name for name, _, _ in LOSSES}


@pytest.mark.parametrize(("name", "loss", "beta"), LOSSES)
def test_losses(golden: dict[str, Any], name: str, loss: PairLoss, beta: float | None) -> None:
    numbers = golden["losses"]
    pairs = PairLogps(
        policy_chosen=column(numbers["policy_chosen"]),
        policy_rejected=column(numbers["policy_rejected"]),
        reference_chosen=column(numbers["reference_chosen"]),
        reference_rejected=column(numbers["reference_rejected"]),
        chosen_tokens=torch.tensor(numbers["chosen_tokens"]),
        rejected_tokens=torch.tensor(numbers["rejected_tokens"]),
    )
    assert pairs.reward_gap.tolist() == close(numbers["gap"])
    betas = torch.full((len(numbers["gap"]),), beta or numbers["beta"], dtype=torch.float64)
    assert loss(pairs, betas).tolist() == close(numbers[name])


def test_epsilon_dpo(golden: dict[str, Any]) -> None:
    numbers = golden["epsilon_dpo"]
    steps = torch.tensor(numbers["steps"])
    beta, epsilon = numbers["beta"], numbers["epsilon"]
    assert epsilon_beta(beta, epsilon, steps).tolist() == close(numbers["beta_i"])
    assert next_epsilon_beta(beta, epsilon, steps) == close(numbers["next_beta"])


def test_selection_law(golden: dict[str, Any]) -> None:
    numbers = golden["selection_law"]
    log_weights = gaussian_log_weights(column(numbers["gaps"]), Moments(numbers["mean"], numbers["std"]))
    draws, n = 20_000, len(numbers["gaps"])
    counts = torch.zeros(n, dtype=torch.int64)
    for step in range(draws):
        counts += gumbel_top_k(log_weights, numbers["k"], selection_noise(0, step, n))
    for count, probability in zip(counts.tolist(), numbers["inclusion_probability"], strict=True):
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(count / draws - probability) <= 3 * error


def test_k_rule(golden: dict[str, Any]) -> None:
    for case in golden["k_rule"]:
        assert number_kept(case["n"], case["keep_ratio"]) == case["k"]
