"""A run that was stopped goes on with another number of ranks, as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from command_runs import ROOT, audit_of, command, fit, fresh_command, write_config
from test_interruptions import sharded_weights
from tiny_runs import relative_difference

CHECKPOINT = Path("runs") / "run" / "checkpoints" / "last.ckpt"
# plain momentum: rounding stays rounding, which Adam's division would blow up
COMMON = ["--trainer.max_steps", "10", "--model.optimizer", "torch.optim.SGD"]
COMMON += ["--model.optimizer.lr", "0.2", "--model.optimizer.momentum", "0.5", "--model.max_grad_norm", "0.5"]
WITH_STATE = ("--confidence", "AnnotatorReliability", "--confidence.column", "kind", "--margin", "GammaPOMargin")
TRAINED = {
    "all weights": COMMON,
    "adapters": (*COMMON, "--model.lora", "{r: 4, lora_alpha: 8}"),
    "methods with a state": (*COMMON, *WITH_STATE),
}


def sharded(ranks: int) -> tuple[str, ...]:
    return ("--config", str(ROOT / "configs/strategy/fsdp.yaml"), "--trainer.devices", str(ranks))


PLACES = {
    "one process": (),
    "two replicas": ("--trainer.devices", "2", "--trainer.strategy", "ddp"),
    "one shard": sharded(1),
    "two shards": sharded(2),
    "two halves of shards": (*sharded(2), "--trainer.strategy.tensor_parallel_size", "2"),
}
SHARDS = [("one shard", "two shards"), ("two shards", "one shard")]
RANKS = [("one process", "two replicas"), ("two replicas", "one process"), *SHARDS]
HALVES = [("two halves of shards", "two shards"), ("one shard", "two halves of shards")]
CHANGES = {"all weights": [*RANKS, *HALVES], "adapters": RANKS, "methods with a state": SHARDS}


@pytest.fixture(scope="module")
def whole(
    tiny_llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[pa.Table, dict[str, torch.Tensor]]]:
    """A function that gives audit and weights of a run that one process took from beginning to end."""

    @cache
    def run(trained: str) -> tuple[pa.Table, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("whole")
        write_config(folder, tiny_llama)
        done = fit(folder, "", *TRAINED[trained])
        assert done.returncode == 0, done.stderr
        weights = weights_of(folder)
        # of adapters alone, whose difference the weights of the base would hide
        assert all("lora_" in name for name in weights) == (trained == "adapters")
        return audit_of(folder / "runs" / "run"), weights

    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / CHECKPOINT).is_dir():
        return sharded_weights(folder / CHECKPOINT, folder / "whole.pt")
    return torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "before", "after"),
    [(trained, *change) for trained, changes in CHANGES.items() for change in changes],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    trained: str,
    before: str,
    after: str,
    whole: Callable[[str], tuple[pa.Table, dict[str, torch.Tensor]]],
    tiny_llama: str,
    tmp_path: Path,
) -> None:
    options, (expected, weights) = TRAINED[trained], whole(trained)
    write_config(tmp_path, tiny_llama)
    stopped = fit(tmp_path, "signal SIGTERM@3", *options, *PLACES[before])
    assert "stopped by SIGTERM after step 4" in stopped.stderr, stopped.stderr
    assert (tmp_path / CHECKPOINT).is_dir() == ("shard" in before)
    done = fit(tmp_path, "", *options, *PLACES[after])
    assert done.returncode == 0, done.stderr
    seen = audit_of(tmp_path / "runs" / "run")
    for column in ("step", "pair_id", "kept"):
        assert seen[column].to_pylist() == expected[column].to_pylist(), column
    close = {"gap": 1e-5, "beta": 1e-6, "running_mean": 1e-5, "running_std": 1e-5}
    close |= {"label_confidence": 1e-5, "margin": 1e-5} if trained == "methods with a state" else {}
    for column, tolerance in close.items():
        assert len(set(expected[column].to_pylist())) >= 10, column
        np.testing.assert_allclose(seen[column], expected[column], rtol=tolerance, atol=tolerance, err_msg=column)
    assert relative_difference(weights, weights_of(tmp_path)) < 1e-5


SHIPPED = ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp_tp"))]


@pytest.mark.parametrize("strategy", SHIPPED)
def test_the_shipped_configuration_runs_on_two_ranks(strategy: str, tiny_llama: str, tmp_path: Path) -> None:
    # with every callback that it names: one that asks for a collective on one rank alone would wait for ever
    options = ["--config", str(ROOT / "configs/quickstart.yaml")]
    options += ["--trainer.strategy", "ddp"]
    if strategy != "ddp":
        options[2:] = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml")]
    sizes = {"pairs": 40, "validation_pairs": 8, "batch_size": 10}
    options += [word for name, size in sizes.items() for word in (f"--data.{name}", str(size))]
    place = ("--trainer.devices", "2", "--trainer.logger.save_dir", "runs", "--model.name", tiny_llama)
    start = fresh_command if strategy == "ddp" else command
    done = start(tmp_path, "fit", *options, *place)
    assert done.returncode == 0, done.stderr
    # said by the first rank alone; a fork has loaded all
    loading = "beta-dpo fit: loading PyTorch, Lightning and transformers\n"
    assert done.stderr.count(loading) == done.stderr.startswith(loading) == (strategy == "ddp")
    run = tmp_path / "runs" / "beta_dpo"
    assert audit_of(run)["step"].to_pylist()[-1] == 4
    assert (run / "commands.txt").read_text(encoding="utf-8").count("beta-dpo fit") == 1
    assert (run / "checkpoints" / "last.ckpt").exists()
