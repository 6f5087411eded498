"""Every schedule, margin, confidence and weight × filter × loss, for three steps.

The table is in a section of docs/choosing.md, "Which parts go together".

The default suite trains a covering part and holds it against the committed table; the slow test trains all and
compares the whole text. `UPDATE_COMBINATIONS=1 python -m pytest tests/test_combinations.py -m slow` writes it.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_runs import Recorder, controlled, preference, quiet_trainer, weights
from transformers import AutoModelForCausalLM

from app.core.errors import UserError
from app.method.dynamic_beta import number_kept
from app.method.losses import (
    AlphaDPOLoss,
    HingeLoss,
    IPOLoss,
    KTOPairLoss,
    LengthNormalisedIPOLoss,
    RobustLoss,
    SigmoidLoss,
    SimPOLoss,
    SPPOHardLoss,
)
from app.method.pair_loss import PairLoss
from app.method.step import StepDecision
from callbacks import (
    BY_NAME,
    AMaPOMargin,
    AnnotatorReliability,
    BetaScheduler,
    Control,
    EpsilonBeta,
    ExplicitRewardGap,
    GammaPOMargin,
    LossWeights,
    PairAudit,
    PairFilter,
    ReferenceWeights,
    RewardGapStatistics,
    ScoreWeights,
    StandardisedMargin,
    in_order,
    slot_of,
)
from callbacks.control import CONTROLS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "choosing.md"
BEGIN, END = "<!-- combinations -->\n", "<!-- end of combinations -->\n"
# by the names of the table: what the slots and model.loss are given
REWARDS: dict[str, list[Any]] = {"implicit": [], "explicit": [ExplicitRewardGap]}
SCHEDULES: dict[str, tuple[Any, dict[str, Any]] | None] = {
    "fixed": None,
    "standardised_margin": (StandardisedMargin, {"alpha": 0.1, "gamma": 0.0}),
    "batch_level": (BetaScheduler, {"alpha": 0.6}),
    "constant_m0": (BetaScheduler, {"alpha": 0.6, "m0": 0.0}),
    "epsilon_dpo": (EpsilonBeta, {"epsilon": 0.01}),
    "instance_level": (BetaScheduler, {"alpha": 0.6, "level": "instance"}),
    "weight_matched": (BetaScheduler, {"alpha": 0.6, "weight_matched": True}),
    "z_normalised": (BetaScheduler, {"alpha": 1.2, "floor": 0.2, "ceiling": 5, "z_normalised": True}),
    "amapo": (AMaPOMargin, {}),
    "gamma_po": (GammaPOMargin, {"gamma": 0.4, "temperature": 1.0}),
    "re_po": (AnnotatorReliability, {"column": "kind", "momentum": 0.3}),
    "dr_dpo": (LossWeights, {"by": "dr_dpo", "temperature": 0.5}),
    "kldpo": (LossWeights, {"by": "kldpo", "temperature": 0.5}),
    "madpo": (ScoreWeights, {"by": "madpo"}),
    "reference_weights": (ReferenceWeights, {}),
}
FILTERS: dict[str, tuple[Any, dict[str, Any]] | None] = {
    "none": None,
    **{by: (PairFilter, {"keep_ratio": 0.8, "by": by}) for by in ("both", "gaussian", "head", "random", "tail")},
}
LOSSES: dict[str, tuple[PairLoss, float]] = {  # with β0
    "alpha_dpo": (AlphaDPOLoss(alpha=0.2, gamma=1.5), 2.5),
    "cdpo": (SigmoidLoss(label_smoothing=0.1), 0.1),
    "hinge": (HingeLoss(), 0.1),
    "ipo": (IPOLoss(), 0.1),
    "ipo_length_normalised": (LengthNormalisedIPOLoss(), 0.1),
    "kto_pair": (KTOPairLoss(), 0.1),
    "robust": (RobustLoss(label_smoothing=0.1), 0.1),
    "sigmoid": (SigmoidLoss(), 0.1),
    "simpo": (SimPOLoss(gamma=1.0), 2.0),
    "sppo_hard": (SPPOHardLoss(), 0.1),
}


class Combination(NamedTuple):
    """One cell of the table, by the names above."""

    loss: str
    filter: str
    schedule: str


EVERY = [Combination(*names) for names in itertools.product(LOSSES, FILTERS, SCHEDULES)]


def covering() -> Iterator[Combination]:
    """Every loss with every schedule once, the filters taken in turn."""
    for i, loss in enumerate(LOSSES):
        for j, schedule in enumerate(SCHEDULES):
            yield Combination(loss, list(FILTERS)[(i + j) % len(FILTERS)], schedule)


def settings(part: tuple[Any, dict[str, Any]] | None) -> dict[str, Any]:
    """Return the options of a filter or schedule."""
    return part[1] if part else {}


def train(folder: Path, model: str, parts: Combination, reward: str) -> tuple[Any, list[StepDecision], float]:
    """Three steps of the arm that `reward` and `parts` name; UserError when it is refused."""
    added = [FILTERS[parts.filter], SCHEDULES[parts.schedule]]
    deciding = [*REWARDS[reward], RewardGapStatistics, *(partial(part[0], **part[1]) for part in added if part)]
    loss, beta0 = LOSSES[parts.loss]
    module = preference(model, lr=0.1, loss=loss, beta0=beta0)
    recorder = Recorder()
    trainer = quiet_trainer(folder, [*(make() for make in deciding), PairAudit(), recorder], max_steps=3)
    trainer.fit(module, controlled(18, batch_size=6, seed=5))
    return module, recorder.decisions, float(trainer.callback_metrics["train/loss"])


def outcome(folder: Path, model: str, parts: Combination, reward: str = "implicit") -> str:
    """ "runs", after all checks, or the reason for refusal."""
    try:
        module, decisions, loss = train(folder, model, parts, reward)
    except UserError as error:
        return str(error)
    assert np.isfinite(loss)
    before = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    after = {name.removeprefix("model."): tensor for name, tensor in weights(module).items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    rows = pq.read_table(folder / "audit").to_pandas()
    assert len(decisions) == 3
    # else any schedule would leave β at β0
    assert decisions[-1].gaps.abs().max() > 1e-4, "three steps hardly move the gaps: give this part other options"
    if parts.schedule == "epsilon_dpo":
        check_epsilon_steps(rows, module.beta0)
    if parts.schedule == "re_po":
        check_reliabilities(decisions)
    for decision in decisions:
        check_step(rows[rows["step"] == decision.step], decision, parts, reward, module.beta0)
    return "runs"


def check_step(rows: Any, decision: StepDecision, parts: Combination, reward: str, beta0: float) -> None:
    """The audit's pairs kept and β, and the weight and margin of the losses, computed again with NumPy."""
    gap, kept = rows["gap"].to_numpy(), rows["kept"].to_numpy()
    assert len(rows) == 6
    dropped = gap[~kept]
    assert kept.sum() == number_kept(6, settings(FILTERS[parts.filter]).get("keep_ratio", 1.0))
    if parts.filter == "head":
        assert (dropped <= gap[kept].min()).all()
    if parts.filter == "tail":
        assert (dropped >= gap[kept].max()).all()
    if parts.filter == "both":
        assert ((dropped <= gap[kept].min()) | (dropped >= gap[kept].max())).all()
    m = gap if reward == "implicit" else (rows["chosen_reward"] - rows["rejected_reward"]).to_numpy(float)
    mean, std = rows["running_mean"].iloc[0], rows["running_std"].iloc[0]
    wanted = expected_beta(parts, m, kept, mean, std, beta0)
    weight = expected_weight(parts, decision, rows)
    if parts.schedule == "weight_matched":
        wanted, weight = np.full(6, beta0), wanted / beta0
    if wanted is not None:
        np.testing.assert_allclose(rows["beta"], wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(decision.loss_weight[decision.kept], weight[kept], rtol=1e-9)
    margin = expected_margin(parts, m, gap, mean, std, beta0)
    if margin is None:
        assert (decision.margin is None) == (parts.schedule != "gamma_po")
    else:
        assert decision.margin is not None
        np.testing.assert_allclose(decision.margin, margin, rtol=1e-9, atol=1e-12)
    if parts.schedule == "gamma_po":  # its equation has a test of its own
        assert decision.margin is not None
        assert (np.diff(decision.margin.numpy()[gap.argsort()]) >= 0).all()


def expected_weight(parts: Combination, decision: StepDecision, rows: Any) -> Any:
    """Weights of the losses from the formulas; those by the reference have a test of their own."""
    losses, kept = decision.pair_losses().numpy(), decision.kept.numpy()
    if parts.schedule == "dr_dpo":
        shares = np.exp(-losses / 0.5)
        return shares / shares[kept].mean()
    if parts.schedule == "kldpo":
        return np.minimum(10.0, np.exp((losses - losses[kept].mean()) / 0.5))
    if parts.schedule == "madpo":
        r = (rows["chosen_reward"] - rows["rejected_reward"]).to_numpy(float)
        factor = 0.5 + 1.5 / (1 + 2 * np.exp(np.abs(r) - 2))
        return np.where(r > -2, (1 + np.exp(-r)) / (1 + np.exp(-factor * r)), 1.0)
    if parts.schedule == "reference_weights":
        assert float(decision.loss_weight[decision.kept].mean()) == pytest.approx(1.0)
        return decision.loss_weight.numpy()
    return np.ones(6)


def expected_margin(parts: Combination, m: Any, gap: Any, mean: float, std: float, beta0: float) -> Any:
    """Margins from the formulas; None where there are none and for γ-PO."""
    if parts.schedule == "standardised_margin":
        arguments = settings(SCHEDULES[parts.schedule])
        return arguments["gamma"] + arguments["alpha"] * (m - mean) / std if std > 1e-6 else np.zeros(6)
    if parts.schedule == "amapo":
        below = gap.mean() - gap
        return np.where(below > 0, beta0 * np.exp(below / gap.std(ddof=1) * gap.mean()), 0.0)
    return None


def check_reliabilities(decisions: list[StepDecision]) -> None:
    """Every confidence follows from the loss and the reliabilities that the steps before lead to."""
    reliability: dict[object, float] = {}
    for decision in decisions:
        names = decision.labels["kind"]
        eta = np.array([reliability.setdefault(name, 0.9) for name in names])
        p = 1 / (1 + np.exp(-decision.label_logits().numpy()))
        w = eta * p / (eta * p + (1 - eta) * (1 - p))
        assert decision.confidence is not None
        np.testing.assert_allclose(decision.confidence, w, rtol=1e-9)
        for name in set(names):
            reliability[name] = 0.7 * reliability[name] + 0.3 * w[[other == name for other in names]].mean()


def check_epsilon_steps(rows: Any, beta0: float) -> None:
    """Every β is one ε-step from the β that the steps before lead to; the gaps behind them have a test apart."""
    epsilon, current = settings(SCHEDULES["epsilon_dpo"])["epsilon"], beta0
    for number, of_step in rows.groupby("step"):
        steps = np.round((current / of_step["beta"].to_numpy() - 1) / epsilon)
        assert set(steps) <= ({0.0} if number == 0 else {-1.0, 0.0, 1.0})
        np.testing.assert_allclose(of_step["beta"], current / (1 + epsilon * steps), rtol=1e-9)
        current /= 1 + epsilon * steps.mean()


def expected_beta(parts: Combination, m: Any, kept: Any, mean: float, std: float, beta0: float) -> Any:
    """β of every pair from the paper's formulas; None for ε-DPO; a schedule that is not listed here fails."""
    schedule = parts.schedule
    if schedule == "epsilon_dpo":
        return None
    part = SCHEDULES[schedule]
    if part is None or part[0] is not BetaScheduler:
        return np.full(len(m), beta0)
    arguments = part[1]
    spread = std if std > 1e-6 else np.inf
    deviation = {
        "batch_level": lambda: m[kept].mean() - mean,
        "weight_matched": lambda: m[kept].mean() - mean,
        "instance_level": lambda: m - mean,
        "constant_m0": lambda: m[kept].mean() - arguments["m0"],
        "z_normalised": lambda: (m[kept].mean() - mean) / spread,
    }[schedule]()
    floor = arguments.get("floor", 0.25 if parts.loss in ("ipo", "ipo_length_normalised", "sppo_hard") else 0.01)
    beta = beta0 * np.clip(1 + arguments["alpha"] * deviation, floor, arguments.get("ceiling", np.inf))
    return np.broadcast_to(beta, m.shape)


def table(outcomes: dict[Combination, str], applying: dict[str, list[str]]) -> str:
    """Return the losses, a row per method with the losses that it refuses and its controls, and the reasons."""
    reasons: list[str] = []
    header = "| method | refused losses | controls that apply |"
    lines = [f"Losses: {', '.join(LOSSES)}.", "", header, "|---|---|---|"]
    for schedule in SCHEDULES:
        refused: dict[str, list[str]] = {}  # reason → losses
        for loss in LOSSES:
            found = {outcomes[Combination(loss, name, schedule)] for name in FILTERS}
            assert len(found) == 1, "a filter matters: give every filter a row"
            if (text := for_any_loss(found.pop(), loss)) != "runs":
                refused.setdefault(text, []).append(loss)
        reasons += [reason for reason in refused if reason not in reasons]
        cells = [f"{named(losses)} ({reasons.index(reason) + 1})" for reason, losses in refused.items()]
        lines.append(f"| {schedule} | {'; '.join(cells) or 'none'} | {', '.join(applying[schedule])} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""])


def named(losses: list[str]) -> str:
    """Return the losses as the table names them, those that are missing where they are fewer."""
    others = [loss for loss in LOSSES if loss not in losses]
    return f"all but {', '.join(others)}" if len(others) < len(losses) else ", ".join(losses)


def for_any_loss(reason: str, loss: str) -> str:
    """Return the reason with `LOSS` for the class of the loss that was refused, which begins its second part."""
    return reason.replace(f": {type(LOSSES[loss][0]).__name__} has", ": LOSS has")


def controls(folder: Path, model: str) -> dict[str, list[str]]:
    """Return the controls that change what each method with a filter decides."""
    return {
        name: [by for by in CONTROLS if controlled_by(by, name, part, folder / name, model)]
        for name, part in SCHEDULES.items()
    }


def controlled_by(by: Any, name: str, part: Any, folder: Path, model: str) -> bool:
    """Whether the control finds its slot filled and changes a decision in three steps."""
    control = Control(by, str(folder / "arm") if by == "static_beta" else None, seed=7)

    def arm(**more: Any) -> list[Any]:
        slot = slot_of(part[0]) if part else None
        own = {slot.name: part[0](**part[1])} if slot else {}
        return in_order({"statistics": RewardGapStatistics(), "filter": PairFilter(0.7, seed=1), **own, **more})

    def fit(place: Path, callbacks: list[Any]) -> None:
        loss, beta0 = LOSSES["simpo" if name == "amapo" else "sigmoid"]
        module = preference(model, lr=0.1, loss=loss, beta0=beta0)
        quiet_trainer(place, [*callbacks, PairAudit()], max_steps=3).fit(module, controlled(30, 10, seed=5))

    try:
        callbacks = arm(control=control)
    except UserError:
        return False
    if by == "static_beta":
        fit(folder / "arm", arm())
    fit(folder / by, callbacks)
    return control.changed_steps > 0


def committed() -> tuple[dict[Combination, str], dict[str, list[str]]]:
    """Return the outcomes that the committed table gives, the same for every filter, and the controls by method."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", written(), re.MULTILINE))
    losses = re.findall(r"\w+", re.findall(r"^Losses: (.*)\.$", written(), re.MULTILINE)[0])
    rows = re.findall(r"^\| (\w+) \| (.+) \| (.+) \|$", written(), re.MULTILINE)[1:]
    found = {}
    for loss, name, (schedule, cells, _) in itertools.product(losses, FILTERS, rows):
        found[Combination(loss, name, schedule)] = "runs"
        for cell, number in re.findall(r"(\w[\w, ]*) \((\d+)\)", cells):
            if (loss in re.findall(r"\w+", cell)) != cell.startswith("all but "):
                told = reasons[number].replace("LOSS has", f"{type(LOSSES[loss][0]).__name__} has")
                found[Combination(loss, name, schedule)] = told
    return found, {schedule: cell.split(", ") for schedule, _, cell in rows}


def written() -> str:
    """Return the table of the page."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def test_the_table_lists_everything() -> None:
    every: list[type[PairLoss]] = PairLoss.__subclasses__()
    found = set()
    while every:
        kind = every.pop()
        every += kind.__subclasses__()
        if not inspect.isabstract(kind) and kind.__module__ == SigmoidLoss.__module__:
            found.add(kind)
    assert {type(loss) for loss, _ in LOSSES.values()} == found
    kinds = {kind for slot in ("schedule", "margin", "confidence", "weights") for kind in BY_NAME[slot].kinds}
    assert {part[0] for part in SCHEDULES.values() if part} == kinds
    outcomes, applying = committed()
    assert list(outcomes) == EVERY, "update docs/choosing.md with UPDATE_COMBINATIONS=1: see docs/extending.md"
    assert table(outcomes, applying) == written()


# a logit, a square with a target, and no reference; the slow test below trains every loss
SLOW = [pytest.param(loss, marks=pytest.mark.slow) for loss in ("ipo", "simpo")]


@pytest.mark.parametrize("loss", ["sigmoid", *SLOW])
def test_every_schedule_under_a_loss_of_each_kind(loss: str, tiny_llama: str, tmp_path: Path) -> None:
    told, _ = committed()
    for parts in covering():
        if parts.loss == loss:
            assert outcome(tmp_path / parts.schedule, tiny_llama, parts) == told[parts], parts


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_filter_with_an_explicit_reward(schedule: str, tiny_llama: str, tmp_path: Path) -> None:
    filters = list(FILTERS)
    first = list(SCHEDULES).index(schedule)
    for name in {filters[first % len(filters)], "gaussian"}:
        parts = Combination("simpo" if schedule == "amapo" else "sigmoid", name, schedule)
        assert outcome(tmp_path / name, tiny_llama, parts, "explicit") == "runs"


@pytest.mark.slow
def test_every_combination(tiny_llama: str, tmp_path: Path) -> None:
    outcomes = {}
    for number, parts in enumerate(EVERY):
        outcomes[parts] = outcome(tmp_path / str(number), tiny_llama, parts)
    text = table(outcomes, controls(tmp_path / "controls", tiny_llama))
    if os.environ.get("UPDATE_COMBINATIONS"):
        PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(written(), text), encoding="utf-8")
    assert written() == text
