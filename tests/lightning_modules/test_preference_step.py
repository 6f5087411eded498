"""One optimizer step: the textbook's DPO, however the batch is cut, and a reference that never moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import (
    Recorder,
    beta_dpo,
    controlled,
    plain_logps,
    preference,
    quiet_trainer,
    relative_difference,
    same_bits,
    save_tiny_model,
    weights,
)
from transformers import AutoModelForCausalLM

ONE_PASS, TWO_MICRO, FIVE_MICRO = 8192, 300, 115  # micro_batch_tokens


def run(
    folder: Path,
    name: str,
    callbacks: Sequence[Callback] = (),
    pairs: int = 40,
    tokens: int = ONE_PASS,
    trainer: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[Any, Recorder]:
    recorder = Recorder()
    module = preference(name, **model)
    settings = {"callbacks": [*callbacks, recorder], **(trainer or {})}
    quiet_trainer(folder, **settings).fit(module, controlled(pairs, micro_batch_tokens=tokens))
    return module, recorder


@pytest.mark.parametrize("tokens", [ONE_PASS, FIVE_MICRO])
@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.1}),
        ("opt", {"layerdrop": 0.9}),
        ("llama", {"model_type": "mixtral", "num_local_experts": 2, "router_jitter_noise": 0.3}),
    ],
)
def test_step_zero_is_exact_whatever_the_dropout(
    family: str, dropout: dict[str, float], tokens: int, tmp_path: Path
) -> None:
    name = save_tiny_model(family, tmp_path / "m", **dropout)
    module = preference(name)
    recorder = Recorder()
    trainer = quiet_trainer(tmp_path, [*beta_dpo(), recorder], max_steps=1)
    trainer.fit(module, controlled(10, micro_batch_tokens=tokens))
    (decision,) = recorder.decisions
    assert decision.gaps.tolist() == [0.0] * 10
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-7)
    assert trainer.callback_metrics["train/reward_accuracy"] == 0.5
    assert module.policy.training  # else gradient checkpointing would be off


def textbook_step(policy: Any, reference: Any, batch: Any, beta: float, chosen: Sequence[int]) -> float:
    """Mean −log σ(β·h) over the `chosen` pairs by plain rows, back-propagated into `policy`; returns the loss."""
    losses = []
    for index in chosen:
        pair = batch.share[index]
        gap = torch.zeros(())
        for sign, response in ((1, pair.chosen), (-1, pair.rejected)):
            with torch.no_grad():
                fixed = plain_logps(reference, pair.prompt, response).sum()
            gap = gap + sign * (plain_logps(policy, pair.prompt, response).sum() - fixed)
        losses.append(-torch.log(torch.sigmoid(beta * gap)))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("callbacks", [False, True])
@pytest.mark.parametrize("tokens", [ONE_PASS, FIVE_MICRO])
def test_three_steps_equal_the_textbook(tokens: int, callbacks: bool, tiny_llama: str, tmp_path: Path) -> None:
    """Loss and weights against plain PyTorch; with callbacks β and the kept pairs are taken from their record."""
    hooks = beta_dpo() if callbacks else []
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, *_: object) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    module, recorder = run(
        tmp_path, tiny_llama, [*hooks, Losses()], pairs=23, tokens=tokens, max_grad_norm=None, lr=0.05
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(2))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05, momentum=0.5)
    data = controlled(23)
    data.trainer = module.trainer
    data.setup("fit")
    assert [len(decision.gaps) for decision in recorder.decisions] == [10, 10, 3]
    for step, (batch, decision) in enumerate(zip(data.train_dataloader(), recorder.decisions, strict=True)):
        assert batch.pair_ids == decision.pair_ids
        kept = decision.kept.nonzero().flatten().tolist()
        assert len(kept) == (max(1, int(len(batch.pair_ids) * 0.6)) if callbacks else len(batch.pair_ids))
        optimizer.zero_grad()
        expected = textbook_step(policy, reference, batch, decision.beta_used, kept)
        assert losses[step] == pytest.approx(expected, rel=1e-4)
        optimizer.step()
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_llama).named_parameters())
    moved = {f"model.{name}": (tensor - before[name]).detach() for name, tensor in policy.named_parameters()}
    found = {
        name: tensor - before[name.removeprefix("model.")].detach() for name, tensor in weights(module).items()
    }
    assert relative_difference(moved, found) < 1e-3
    assert max(float(decision.gaps.abs().max()) for decision in recorder.decisions) > 0.1


def test_neutral_callbacks_leave_plain_dpo_to_the_bit(tiny_llama: str, tmp_path: Path) -> None:
    plain, _ = run(tmp_path, tiny_llama, pairs=30)
    neutral, recorder = run(tmp_path, tiny_llama, beta_dpo(keep_ratio=1.0, alpha=0.0), pairs=30)
    assert same_bits(weights(plain), weights(neutral))
    assert len(recorder.decisions) == 3
    active, _ = run(tmp_path, tiny_llama, beta_dpo(), pairs=30)
    assert not same_bits(weights(plain), weights(active))


def test_micro_batches_change_nothing(tiny_llama: str, tmp_path: Path) -> None:
    counts: list[set[int]] = []
    runs = []
    for tokens in (ONE_PASS, TWO_MICRO, FIVE_MICRO):
        module, recorder = run(tmp_path, tiny_llama, beta_dpo(), tokens=tokens)
        data = controlled(40, micro_batch_tokens=tokens)
        data.trainer = module.trainer
        data.setup("fit")
        balanced = module.policy.balanced_row
        counts.append({len(b.micro_batches(module.responses, "packed", balanced)) for b in data.train_dataloader()})
        assert module.trainer.callback_metrics["train/grad_norm"] > module.max_grad_norm  # clipping was at work
        runs.append((weights(module), recorder.decisions))
    assert counts[0] == {1}
    assert max(counts[1]) in (2, 3)
    assert min(counts[2]) >= 5
    first_weights, first = runs[0]
    for other_weights, other in runs[1:]:
        assert len(other) == 4
        for left, right in zip(first, other, strict=True):
            assert left.kept.tolist() == right.kept.tolist()
            assert right.beta_used == pytest.approx(left.beta_used, abs=1e-6)
            assert left.moments is not None
            assert right.moments is not None
            assert right.moments.mean == pytest.approx(left.moments.mean, abs=1e-5)
            assert right.moments.std == pytest.approx(left.moments.std, abs=1e-5)
        assert relative_difference(first_weights, other_weights) < 1e-5
    assert len({tuple(decision.kept.tolist()) for decision in first}) > 1
    assert abs(first[-1].beta_used - 0.1) > 1e-3


def test_the_reference_never_moves_and_never_enters_a_checkpoint(tiny_llama: str, tmp_path: Path) -> None:
    class Modes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
            assert not pl_module.measurer.reference.training
            assert pl_module.policy.training

    saving = {
        "enable_checkpointing": True,
        "limit_val_batches": 1,
        "val_check_interval": 1,
        "num_sanity_val_steps": 1,
    }
    module, _ = run(tmp_path, tiny_llama, [Modes(), ModelCheckpoint(tmp_path, "last")], pairs=20, trainer=saving)
    start = {f"model.{n}": p for n, p in AutoModelForCausalLM.from_pretrained(tiny_llama).named_parameters()}
    reference = dict(module.measurer.reference.named_parameters())
    assert same_bits(start, reference)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reference.values())
    assert not same_bits(start, weights(module))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {f"policy.{name}" for name in module.policy.state_dict()}
    assert len(list(module.parameters())) == len(reference)
