"""A run that is stopped and resumed is, to the bit, the run that was never stopped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import Recorder, beta_dpo, controlled, preference, quiet_trainer, same_bits, weights

from app.core.errors import UserError
from callbacks import AnnotatorReliability, GammaPOMargin, LossWeights, RewardGapStatistics

PAIRS, STEPS_PER_EPOCH = 43, 5  # the last batch of an epoch holds three pairs


ADAM = partial(torch.optim.AdamW, lr=3e-3)
WARM_UP = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=9)


def train(
    folder: Path,
    model: str,
    steps: int,
    resume: str | None = None,
    batch_size: int = 10,
    optimizer: Any = ADAM,
    lr_scheduler: Any = WARM_UP,
    **settings: Any,
) -> tuple[Any, Recorder]:
    recorder = Recorder()
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = preference(model, optimizer=optimizer, lr_scheduler=lr_scheduler)
    options = {"max_steps": steps, "max_epochs": 9, "enable_checkpointing": True, **settings}
    rest = [GammaPOMargin(0.2, 1.0, window=25), AnnotatorReliability("kind"), LossWeights("kldpo")]
    trainer = quiet_trainer(folder, [*beta_dpo(), *rest, recorder, checkpoint], **options)
    trainer.fit(module, controlled(PAIRS, batch_size, micro_batch_tokens=300), ckpt_path=resume)
    return module, recorder


def flat(state: Any) -> list[Any]:
    """The leaves of nested dicts and lists, in order."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in [key, *flat(state[key])]]
    return [leaf for item in state for leaf in flat(item)] if isinstance(state, (list, tuple)) else [state]


@pytest.fixture(scope="module")
def whole(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Recorder]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder, tiny_llama, 12)


# in mid-epoch, at the end of an epoch, just after it, and in the second epoch; with validation between
@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (3, {}),
        (STEPS_PER_EPOCH, {}),
        (STEPS_PER_EPOCH + 1, {}),
        (8, {"limit_val_batches": 1, "val_check_interval": 2}),
    ],
)
def test_resumed_equals_uninterrupted(
    stop: int, settings: dict[str, Any], whole: tuple[Path, Any, Recorder], tiny_llama: str, tmp_path: Path
) -> None:
    folder, expected, expected_decisions = whole
    _, before = train(tmp_path, tiny_llama, stop, **settings)
    torch.manual_seed(99)
    resumed, after = train(tmp_path, tiny_llama, 12, str(tmp_path / f"step={stop}.ckpt"), **settings)
    decisions = before.decisions + after.decisions
    assert len(after.decisions) == 12 - stop
    for left, right in zip(expected_decisions.decisions, decisions, strict=True):
        assert left.step == right.step
        assert left.pair_ids == right.pair_ids
        assert torch.equal(left.gaps, right.gaps)
        assert torch.equal(left.kept, right.kept)
        assert torch.equal(left.beta, right.beta)
        for name in ("margin", "confidence", "loss_weight"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name
        assert left.moments == right.moments
    assert same_bits(weights(expected), weights(resumed))
    states = [torch.load(place / "step=12.ckpt", weights_only=True) for place in (folder, tmp_path)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        for one, other in zip(*(flat(state[part]) for state in states), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert states[0]["global_step"] == states[1]["global_step"] == 12


def test_every_pair_once_an_epoch(whole: tuple[Path, Any, Recorder]) -> None:
    decisions = whole[2].decisions
    epochs = [[id for d in decisions[start : start + 5] for id in d.pair_ids] for start in (0, 5)]
    assert len(set(epochs[0])) == PAIRS
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


# larger and smaller than the 10 before, with rests of the epoch that they divide and do not
@pytest.mark.parametrize(("stop", "batch_size"), [(3, 20), (1, 7), (2, 43), (4, 2), (STEPS_PER_EPOCH, 20)])
def test_another_batch_size_neither_loses_nor_repeats_pairs(
    stop: int, batch_size: int, whole: tuple[Path, Any, Recorder], tiny_llama: str, tmp_path: Path
) -> None:
    # two epochs in all, by `max_epochs`: Lightning's count of batches decides where an epoch ends
    options = {"max_epochs": 2, "batch_size": batch_size}
    _, after = train(tmp_path, tiny_llama, -1, str(whole[0] / f"step={stop}.ckpt"), **options)
    seen = [id for d in whole[2].decisions[:stop] + after.decisions for id in d.pair_ids]
    assert len(seen) == 2 * PAIRS
    assert len(set(seen[:PAIRS])) == len(set(seen[PAIRS:])) == PAIRS
    left = PAIRS - 10 * min(stop, 4) if stop < STEPS_PER_EPOCH else 0
    assert len(after.decisions) == -(-left // batch_size) + -(-PAIRS // batch_size)


def test_a_limited_epoch_keeps_its_length_with_another_batch_size(
    whole: tuple[Path, Any, Recorder], tiny_llama: str, tmp_path: Path
) -> None:
    options = {"max_epochs": 1, "batch_size": 5, "limit_train_batches": 4}
    _, after = train(tmp_path, tiny_llama, -1, str(whole[0] / "step=3.ckpt"), **options)
    assert len(after.decisions) == 1


@pytest.mark.parametrize("scheduled", [True, False])
def test_optimizer_settings_of_now_are_in_force(
    scheduled: bool, whole: tuple[Path, Any, Recorder], tiny_llama: str, tmp_path: Path
) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.3, betas=(0.8, 0.9))
    module, _ = train(
        tmp_path,
        tiny_llama,
        4,
        str(whole[0] / "step=3.ckpt"),
        optimizer=optimizer,
        lr_scheduler=WARM_UP if scheduled else None,
    )
    group = module.optimizers().optimizer.param_groups[0]
    # the fourth step was taken, so the schedule is at its position 4 of 9
    assert group["lr"] == pytest.approx(1e-4 * (0.1 + 0.9 * 4 / 9) if scheduled else 1e-4, rel=1e-9)
    assert group["weight_decay"] == 0.3
    assert group["betas"] == (0.8, 0.9)
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert {int(one["step"]) for one in state.values()} == {4}  # the moments were kept


def test_the_state_of_the_callbacks_is_what_makes_it_equal(
    whole: tuple[Path, Any, Recorder], tiny_llama: str, tmp_path: Path
) -> None:
    # without it the resumed run differs: the equality above is not for want of anything to restore
    checkpoint = torch.load(whole[0] / "step=3.ckpt", weights_only=True)
    for name in ("RewardGapStatistics", "GammaPOMargin", "AnnotatorReliability"):
        checkpoint["callbacks"].pop(name)
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    _, after = train(tmp_path, tiny_llama, 4, str(tmp_path / "bare.ckpt"))
    seen, expected = after.decisions[0], whole[2].decisions[3]
    assert seen.moments != expected.moments
    for name in ("margin", "confidence"):
        assert not torch.equal(getattr(seen, name), getattr(expected, name)), name


def test_other_settings_are_refused_on_resume(
    whole: tuple[Path, Any, Recorder], tiny_llama: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, [RewardGapStatistics(momentum=0.5)], max_steps=4)
    with pytest.raises(UserError, match=r"momentum=0\.9.*momentum=0\.5"):
        trainer.fit(preference(tiny_llama), controlled(PAIRS), ckpt_path=str(whole[0] / "step=3.ckpt"))
