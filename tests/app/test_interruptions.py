"""A run killed, told to stop or broken, then restarted by the same command, is the run that never stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import ROOT, STEPS, assert_same_run, audit_of, command, environment, fit, write_config
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from app.core.errors import RESUME

RUN = Path("runs") / "run"


@pytest.fixture(scope="module")
def whole(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder, tiny_llama)
    done = fit(folder)
    assert done.returncode == 0, done.stderr
    assert "there is no checkpoint yet, so the run starts from the beginning" in done.stderr
    assert "WARNING" not in done.stderr
    table = audit_of(folder / RUN)
    assert sorted(set(table["step"].to_pylist())) == list(range(1, STEPS + 1))
    assert len(set(table["beta"].to_pylist())) > STEPS // 2
    return folder


def assert_loadable(run: Path) -> None:
    """The link leads to a whole checkpoint, whatever has just happened."""
    link = run / "checkpoints" / "last.ckpt"
    if link.is_symlink():
        assert link.resolve(strict=True).stat().st_size > 0
    assert len(list(link.parent.glob("step=*.ckpt"))) <= 2  # the newest, and one that a kill kept from deletion


SIGNALS = [
    ("SIGTERM", 143),
    pytest.param("SIGUSR1", 138, marks=pytest.mark.slow),
    pytest.param("SIGINT", 130, marks=pytest.mark.slow),
    ("SIGHUP", 129),
]


@pytest.mark.parametrize(("name", "status"), SIGNALS)
def test_a_signal_costs_no_step(name: str, status: int, whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    stopped = fit(tmp_path, f"signal {name}@6")
    assert stopped.returncode == status, stopped.stderr
    assert f"{name}: the step is finished and saved first." in stopped.stderr
    # the seventh step, and no multiple of every_n_steps
    sentence = f"beta-dpo: stopped by {name} after step 7, saved in {RUN}/checkpoints/last.ckpt: the same command"
    assert sentence in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert audit_of(tmp_path / RUN)["step"].to_pylist()[-1] == 7
    assert fit(tmp_path).returncode == 0
    command = "beta-dpo fit --config config.yaml --ckpt_path last\n"
    assert (tmp_path / RUN / "commands.txt").read_text(encoding="utf-8") == 2 * command
    assert_same_run(whole / RUN, tmp_path / RUN)
    assert [file.name for file in sorted((tmp_path / RUN / "checkpoints").iterdir())] == [
        "last.ckpt",
        f"step={STEPS}.ckpt",
    ]


def test_a_run_without_checkpoints_ends_at_once(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    stopped = fit(tmp_path, "signal SIGTERM@3", "--checkpoint", "null")
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == f"beta-dpo: stopped by SIGTERM. {RESUME}"
    assert "Received SIGTERM" not in stopped.stderr  # by Lightning's handler, which waits for other ranks


# in mid-epoch, and in the first step of an epoch; neither number is a multiple of every_n_steps
@pytest.mark.parametrize("step", [5, pytest.param(9, marks=pytest.mark.slow)])
def test_too_many_nonfinite_pairs_cost_no_step(step: int, whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    stopped = fit(tmp_path, f"nonfinite@{step}")
    assert stopped.returncode == 2, stopped.stderr
    assert f"step {step}, the last good one, is saved in {RUN}/checkpoints/last.ckpt" in stopped.stderr
    assert "pairs have no finite reward gap at step" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (tmp_path / RUN / "checkpoints" / "last.ckpt").readlink() == Path(f"step={step}.ckpt")
    assert fit(tmp_path).returncode == 0
    assert_same_run(whole / RUN, tmp_path / RUN)


@pytest.mark.slow
def test_signals_in_validation_and_failures_in_a_step(whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    # before the first checkpoint, in a validation, and in the first step after a resume
    for fault, status in [
        ("raise@1", 1),
        ("validation SIGTERM@3", 143),
        ("raise@4", 1),
        ("signal SIGTERM@4", 143),
        ("signal SIGINT@19", 130),
    ]:
        stopped = fit(tmp_path, fault)
        assert stopped.returncode == status, stopped.stderr
        assert_loadable(tmp_path / RUN)
    assert fit(tmp_path).returncode == 0
    assert_same_run(whole / RUN, tmp_path / RUN)
    # once it is done, the same command does nothing more
    assert fit(tmp_path).returncode == 0
    assert_same_run(whole / RUN, tmp_path / RUN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_quickstart_that_is_stopped_saves_its_step(name: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "app.main", "quickstart", "--out", "qs"]
    place: Any = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    place["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # which a `&` ignores
    with subprocess.Popen(line, **place, text=True, start_new_session=True) as started:
        assert started.stdout is not None
        for said in started.stdout:
            if said.startswith("step "):
                # a terminal sends Ctrl-C to all processes, a scheduler SIGTERM to the first
                to = os.killpg if name == "SIGINT" else os.kill
                to(started.pid, signal.Signals[name])
                break
        rest = started.stdout.read()
    assert "the step is finished and saved first" in rest
    assert "The same command starts from the beginning" in rest
    assert_loadable(tmp_path / "qs" / "sft")
    assert (tmp_path / "qs" / "sft" / "checkpoints" / "last.ckpt").exists()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_killed_at_random_moments(whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    moments, step = random.Random(5), 0
    for _ in range(7):
        step += moments.randint(1, 4)
        killed = fit(tmp_path, f"kill {moments.uniform(0, 2)}@{step}")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert_loadable(tmp_path / RUN)
    assert fit(tmp_path).returncode == 0
    assert_same_run(whole / RUN, tmp_path / RUN)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    size = (whole / RUN / "checkpoints" / "last.ckpt").stat().st_size
    folder = tmp_path / RUN / "checkpoints"
    for step, share in [(2, 0.5), (4, 0.3), (6, 0.6), (12, 0.999)]:
        stopped = fit(tmp_path, f"write {int(size * share)}@{step}")
        assert stopped.returncode == -signal.SIGXFSZ, stopped.stderr
        assert_loadable(tmp_path / RUN)
        # the half file bears another name, and the one before is still what `last` means
        half = [file.stat().st_size for file in folder.glob(".step=*.part")]
        assert len(half) == 1
        assert 0 < half[0] <= size * share
        assert not (folder / f"step={step}.ckpt").exists()
        assert (folder / "last.ckpt").exists() == (step > 2)
    assert fit(tmp_path).returncode == 0
    assert not list(folder.glob(".*"))
    assert_same_run(whole / RUN, tmp_path / RUN)


def test_numbered_folders_go_on_in_the_newest(whole: Path, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama, version=None)
    # an older run, which is none of this one's business
    older = command(tmp_path, "fit", "--config", "config.yaml", "--trainer.max_steps", "2")
    assert older.returncode == 0
    stopped = command(tmp_path, "fit", "--config", "config.yaml", fault="signal SIGTERM@8")
    assert stopped.returncode == 143
    assert fit(tmp_path).returncode == 0
    assert sorted(path.name for path in (tmp_path / RUN).iterdir()) == ["version_0", "version_1"]
    assert_same_run(whole / RUN, tmp_path / RUN / "version_1")
    assert audit_of(tmp_path / RUN / "version_0")["step"].to_pylist()[-1] == 2


SHARDED = (
    "--config",
    str(ROOT / "configs/strategy/fsdp.yaml"),
    "--trainer.devices",
    "2",
    "--trainer.max_steps",
    "10",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("signal SIGTERM@4", "stopped by SIGTERM after step 5"),
        ("nonfinite@5", "step 5, the last good one, is saved in"),
    ],
)
def test_two_sharded_ranks_stop_together_and_go_on(fault: str, told: str, tiny_llama: str, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("whole", "stopped")]
    for folder in runs:
        write_config(folder, tiny_llama)
    done = fit(runs[0], "", *SHARDED)
    assert done.returncode == 0, done.stderr
    stopped = fit(runs[1], fault, *SHARDED)
    assert told in stopped.stderr
    assert stopped.returncode == (143 if "signal" in fault else 2)
    assert (runs[1] / RUN / "checkpoints" / "last.ckpt" / ".metadata").is_file()
    done = fit(runs[1], "", *SHARDED)
    assert done.returncode == 0, done.stderr
    expected, table = (audit_of(folder / RUN).to_pandas() for folder in runs)
    decided = ["gap", "beta", "running_mean", "running_std"]
    assert (
        expected.drop(columns=decided)
        .drop(columns="log_weight")
        .equals(table.drop(columns=decided).drop(columns="log_weight"))
    )
    np.testing.assert_allclose(table[decided], expected[decided], rtol=0, atol=1e-6)
    weights = [sharded_weights(folder / RUN / "checkpoints" / "last.ckpt", folder / "whole.pt") for folder in runs]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-6)


def sharded_weights(shards: Path, whole: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(shards, whole)
    return torch.load(whole, weights_only=True)["state_dict"]
