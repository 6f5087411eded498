"""Options of the Trainer that would be silently without effect, or wrong, are refused with the cure."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import Recorder, controlled, preference, quiet_trainer

from app.core.errors import UserError
from lightning_modules import SupervisedFineTuning, WarmupCosine


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"accumulate_grad_batches": 2}, "data.micro_batch_tokens"),
        ({"gradient_clip_val": 1.0}, "model.max_grad_norm"),
        ({"gradient_clip_algorithm": "value"}, "model.max_grad_norm"),
        ({"limit_train_batches": 0}, "takes no step: raise"),
        ({"max_epochs": 0}, "takes no step: raise"),
        ({"max_time": "00:00:00:00"}, r"trainer\.max_time leaves no time for a step: raise it"),
        ({"min_steps": 9, "max_steps": 1}, r"trainer\.min_steps asks for 9 steps, but the run ends after 1"),
        ({"min_steps": 9, "max_epochs": 2}, r"min_steps asks for 9 steps, but the run ends after 2"),
        (
            {"min_epochs": 3, "max_steps": 2, "max_epochs": 9},
            r"min_epochs asks for 3 steps, but the run ends after 2",
        ),
        ({"precision": "bf16-true"}, "bf16-mixed"),
        ({"precision": "16-true"}, "bf16-mixed"),
    ],
)
def test_refused_with_the_cure(options: dict[str, Any], cure: str, tiny_llama: str, tmp_path: Path) -> None:
    for module in (preference(tiny_llama), SupervisedFineTuning(tiny_llama)):
        with pytest.raises(UserError, match=cure):
            quiet_trainer(tmp_path, **options).fit(module, controlled(4))


def test_a_device_without_float64_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    strategy: Any = trainer.strategy
    strategy._root_device = torch.device("mps")  # as `accelerator: auto` takes it on a Mac
    with pytest.raises(UserError, match=r"trainer\.accelerator: mps is no device .*: set it to cpu"):
        trainer.fit(preference(tiny_llama), controlled(4))


@pytest.mark.parametrize(
    ("options", "first"),
    [({"max_steps": 2}, 3), ({"max_epochs": 1, "check_val_every_n_epoch": 2}, 6), ({"max_epochs": 1}, None)],
)
def test_a_run_that_ends_before_its_first_validation_says_so(
    options: dict[str, Any], first: int | None, tiny_llama: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, **options, limit_val_batches=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(preference(tiny_llama), controlled(30))
    told = [str(one.message) for one in caught if "nothing will be validated" in str(one.message)]
    assert ("val/loss" in trainer.callback_metrics) == (first is None)
    assert [f"after step {first}, " in text for text in told] == [True] * (first is not None)


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_that_ends_before_its_first_point_of_a_curve_says_so(
    every: int, tiny_llama: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2, log_every_n_steps=every, logger=CSVLogger(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(preference(tiny_llama), controlled(30))
    told = [one for one in caught if "log_every_n_steps is 3, and the run takes 2 steps" in str(one.message)]
    assert len(told) == (every == 3)


@pytest.mark.parametrize("limit", [1, 2])  # 1 is one batch, and 1.0 all
def test_epochs_that_are_limited_are_of_equal_length_and_serve_pass_after_pass(
    limit: int, tiny_llama: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, [recorder := Recorder()], max_epochs=6 // limit, limit_train_batches=limit)
    trainer.fit(preference(tiny_llama), controlled(30))
    assert trainer.train_dataloader.endless  # type: ignore[union-attr]
    assert trainer.global_step == 6
    seen = [id for decision in recorder.decisions for id in decision.pair_ids]
    assert len(set(seen[:30])) == len(set(seen[30:])) == 30


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_stage_that_does_not_evaluate_so_is_named(command: str, tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"model: SupervisedFineTuning does not {command}: take `validate`"):
        getattr(quiet_trainer(tmp_path), command)(SupervisedFineTuning(tiny_llama), controlled(4))


def test_an_evaluation_of_no_pair_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, limit_predict_batches=0)
    with pytest.raises(UserError, match=r"trainer\.limit_predict_batches is 0"):
        trainer.predict(preference(tiny_llama), controlled(4))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"beta0": 0.0}, "beta0"),
        ({"max_nonfinite_share": 1.0}, "max_nonfinite_share"),
    ],
)
def test_settings_of_the_stage(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"PreferenceOptimization: {field}"):
        preference("anywhere", **settings)


def test_layers_cannot_be_compiled_without_a_compiler(tiny_llama: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"model\.compile_layers needs a C\+\+ compiler"):
        quiet_trainer(tmp_path).fit(preference(tiny_llama, compile_layers=True), controlled(4))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name: no model at .*nowhere"):
        quiet_trainer(tmp_path).fit(preference(str(tmp_path / "nowhere")), controlled(4))


def test_a_learning_rate_that_breaks_the_weights_stops_the_run(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"The gradient norm is (nan|inf) at step|have no finite reward gap at step"
    ):
        quiet_trainer(tmp_path).fit(preference(tiny_llama, lr=1e30, max_grad_norm=None), controlled(30))


def test_mixed_precision_trains(tiny_llama: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, precision="bf16-mixed", max_steps=2)
    trainer.fit(preference(tiny_llama, lr=0.01), controlled(20))
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_a_rate_of_zero_to_the_end_is_told(tiny_llama: str, tmp_path: Path) -> None:
    for settings, said in (
        ({"lr": 0.0}, "model.optimizer: its lr gives the rate 0 from step 1 to 3, the last"),
        (
            {"lr_scheduler": lambda of: WarmupCosine(of, 1, 2)},
            "WarmupCosine gives the rate 0 from step 3 to 3, the last",
        ),
    ):
        with pytest.warns(UserWarning, match=said):
            quiet_trainer(tmp_path).fit(preference(tiny_llama, **settings), controlled(30))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gives the rate 0")
        module = preference(tiny_llama, lr_scheduler=lambda of: WarmupCosine(of, 1, 3))
        quiet_trainer(tmp_path).fit(module, controlled(30))


def test_a_callback_that_freezes_everything_leaves_nothing_to_train(tiny_llama: str, tmp_path: Path) -> None:
    freeze = LambdaCallback(on_train_start=lambda _, module: module.policy.requires_grad_(False))
    with pytest.raises(UserError, match="a callback has frozen all weights"):
        quiet_trainer(tmp_path, [freeze]).fit(preference(tiny_llama), controlled(4))
