"""A resume compares: what it cannot carry over is refused in one sentence, the rest applies and is listed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from command_runs import command, fit, write_config
from tiny_runs import save_tiny_model

from app.cli.run_record import RunRecord, compared, differences, models_of
from app.core.errors import UserError

RUN = Path("runs") / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of its own, and a run of four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    write_config(folder, save_tiny_model("llama", folder / "model"))
    done = fit(folder, "", "--trainer.max_steps", "4")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"log folder: {RUN}") == 1
    assert f"first checkpoint: {RUN}/checkpoints/step=2.ckpt, 0.4 MB; the newest is kept" in done.stderr
    assert done.stderr.endswith(f"\nnext: beta-dpo report {RUN}; beta-dpo audit {RUN}\n")
    return folder


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--model.loss", "app.method.losses.HingeLoss"), "model.loss is HingeLoss"),
        (
            ("--model.optimizer", "torch.optim.RMSprop"),
            "model.optimizer is RMSprop, but the run of the checkpoint had",
        ),
        (("--reward", "ExplicitRewardGap"), "reward is ExplicitRewardGap, but the run of the checkpoint had none"),
        (("--data.pairs", "44"), "other training pairs (data.pairs was 43 and is 44)"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(options: tuple[str, ...], told: str, stopped: Path) -> None:
    record = (stopped / RUN / "config.yaml").read_bytes()
    refused = fit(stopped, "", *options)
    assert refused.returncode == 2, refused.stderr
    assert told in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (stopped / RUN / "config.yaml").read_bytes() == record


def test_a_resume_without_a_step_says_so(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    again = fit(folder, "", "--trainer.max_steps", "4")
    assert again.returncode == 0
    assert "nothing was left to train: the checkpoint is of step 4" in again.stderr
    hourly = ("--trainer.val_check_interval", "00:01:00:00")
    longer = fit(folder, "", "--trainer.max_steps", "12", *hourly)
    assert "nothing was validated: the run ended before trainer.val_check_interval, 3600" in longer.stderr
    refused = fit(folder, "", "--trainer.max_epochs", "1")
    assert "--ckpt_path: the checkpoint is of epoch 2: raise trainer.max_epochs, which is 1." in refused.stderr


def test_a_run_that_a_callback_stops_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("app.cli.run_record.rank_zero_info", told.append)
    record, settings = RunRecord.__new__(RunRecord), {"fast_dev_run": False, "callbacks": [], "global_step": 8}
    record.folder, record.already_saved = Path("run"), True
    for stops in (False, True):
        trainer: Any = SimpleNamespace(should_stop=stops, **settings)
        record.on_fit_end(trainer, trainer)
    assert told == [
        "log folder: run",
        "the run ends after step 8: a callback or max_time stops it",
        "log folder: run",
    ]


def test_another_reference_under_the_same_name_is_refused(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "copy", symlinks=True)
    save_tiny_model("llama", stopped / "model", seed=5)
    refused = fit(stopped)
    evaluated = command(
        stopped, "validate", "--config", "config.yaml", "--ckpt_path", f"{RUN}/checkpoints/last.ckpt"
    )
    shutil.copytree(tmp_path / "copy" / "model", stopped / "model", dirs_exist_ok=True)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "another model than model.name, which is the reference here" in evaluated.stderr
    assert refused.returncode == 2, refused.stderr
    assert (
        "another model than the run started from (the files that model.name names have changed)" in refused.stderr
    )


def test_models_are_compared_by_the_content_of_their_folders_or_by_their_hub_ids(tmp_path: Path) -> None:
    record: Any = RunRecord.__new__(RunRecord)
    module: Any = SimpleNamespace(name="org/model", reference_name=str(tmp_path))
    record._resumed, record._differences = {"content": models_of(module)}, {}
    (tmp_path / "weights").write_text("other")
    record.content = models_of(module)
    with pytest.raises(UserError, match=r"another reference than the run had \(the files that model\.ref"):
        record._compare_content()
    record.content = record._resumed["content"] | {"model": "org/other"}
    with pytest.raises(UserError, match="another model than the run started from"):
        record._compare_content()


def test_what_can_be_applied_applies_and_is_listed(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    other = ("--model.optimizer.init_args.lr", "0.001", "--data.batch_size", "5", "--trainer.max_steps", "6")
    done = fit(folder, "", *other, "--model.max_nonfinite_share", "0.2")
    assert done.returncode == 0, done.stderr
    for line in (
        "model.optimizer.lr: 0.003 → 0.001",
        "data.batch_size: 10 → 5",
        "model.max_nonfinite_share: 0.1 → 0.2",
    ):
        assert f"  {line}" in done.stderr
    assert "train: resumes after 40 of 43 pairs in pass 1, with 5 pairs a step" in done.stderr
    assert "will be seen" not in done.stderr
    state = torch.load(folder / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 0.001
    now, before = (
        yaml.safe_load((folder / RUN / name).read_text()) for name in ("config.yaml", "config.until-step-4.yaml")
    )
    rates = [config["model"]["init_args"]["optimizer"]["init_args"]["lr"] for config in (now, before)]
    assert rates == [0.001, 0.003]


@pytest.mark.parametrize(
    "slot",
    [
        {"statistics": {"class_path": "callbacks.RewardGapStatistics", "init_args": {"gap_scale": "beta0"}}},
        {"schedule": {"class_path": "callbacks.EpsilonBeta"}},
        {"margin": {"class_path": "callbacks.GammaPOMargin"}},
    ],
)
def test_another_beta0_is_refused_where_a_state_is_in_its_units(slot: dict[str, Any]) -> None:
    before, now = ({"checkpoint": None, "model": {"beta0": beta0}} for beta0 in (0.1, 0.2))
    raw = {"statistics": {"gap_scale": "raw"}}
    assert compared(before | raw, now | raw) == {"model.beta0": (0.1, 0.2)}
    with pytest.raises(UserError, match=r"model\.beta0 is 0\.2, but the run of the checkpoint had 0\.1"):
        compared(before | slot, now | slot)


def test_another_control_is_refused() -> None:
    before, now = (
        {"checkpoint": None, "control": {"class_path": "callbacks.Control", "init_args": {"by": by}}}
        for by in ("shuffled_beta", "static_beta")
    )
    with pytest.raises(UserError, match=r"control\.by is static_beta, but the run of the checkpoint had shuffled"):
        compared(before, now)


def test_checkpoints_in_another_place_are_found_or_asked_for(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    refused = fit(folder, "", "--checkpoint.dirpath", "elsewhere")
    assert "checkpoint.dirpath is elsewhere, but the run had none" in refused.stderr
    assert refused.returncode == 2
    refused = fit(folder, "", "--checkpoint", "null")
    assert "checkpoint is none, but the run had RunCheckpoint" in refused.stderr
    done = fit(folder, "", "--trainer.max_steps", "6", "--schedule", "EpsilonBeta")
    assert f"--ckpt_path last: {folder / RUN}/checkpoints/last.ckpt, saved after step 4" in done.stderr
    assert "  schedule: BetaScheduler → EpsilonBeta\n" in done.stderr
    assert "schedule.epsilon" not in done.stderr  # an option of the new class


def test_fast_dev_run_leaves_nothing(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    samples = ("--samples", "PolicySamples", "--samples.max_new_tokens", "2")
    for _ in range(2):
        done = fit(tmp_path, "", "--trainer.fast_dev_run", "true", *samples)
        assert done.returncode == 0, done.stderr
        assert "--ckpt_path last: trainer.fast_dev_run has no log folder" in done.stderr
        assert "trainer.fast_dev_run decides" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != ".cache"] == ["config.yaml"]


def test_unknown_keys_are_differences() -> None:
    before = {
        "model": {"class_path": "a.B", "init_args": {"x": 1}},
        "trainer": {"callbacks": [{"class_path": "c.D"}]},
        "schedule": None,
    }
    now = {
        "trainer": {"callbacks": None},
        "schedule": {"class_path": "c.S", "init_args": {"alpha": 2}},
        "model": {"class_path": "other.B", "init_args": {"x": 1, "y": [2]}},
        "ckpt_path": "last",
    }
    assert differences(before, now) == {
        "trainer.callbacks.D": ("D", "none"),
        "schedule": ("none", "S"),
        "schedule.alpha": ("none", 2),
        "model.y": ("none", [2]),
    }
