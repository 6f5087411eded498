"""Ranks that split every layer between them decide and learn what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import run_ranks
from distributed_run import SCENARIOS, fine_tune, train
from sharded_run import train as train_and_save
from tensor_parallel_run import VARIANTS, score
from tiny_runs import controlled, preference, quiet_trainer, relative_difference, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

from app.commands.export import export
from app.core.errors import UserError
from lightning_modules import ShardedStrategy
from lightning_modules.sharding import keep_local_part, split_plan

FAMILIES = sorted({family for variants in VARIANTS.values() for family, *_ in variants.values()})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(family, folder / family)
    return folder


def ranks_of(count: int, models: Path, folder: Path) -> Path:
    script = Path(__file__).with_name("tensor_parallel_run.py")
    run_ranks(script, str(count), str(models), str(folder), logs=folder, ranks=count)
    return folder


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks_of(2, models, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks_of(4, models, tmp_path_factory.mktemp("four"))


def assert_one_process_agrees(family: str, models: Path, seen: Path, alone: Path) -> None:
    """`seen` is the folder of a run on several ranks, with its result beside it; `alone` is empty."""
    expected = train_and_save(str(models / family), alone, {})
    result = torch.load(seen.with_suffix(".pt"), weights_only=False)
    assert_same_audit(seen, alone)
    assert relative_difference(expected["weights"], result["weights"]) < 1e-5


def assert_same_audit(seen: Path, alone: Path, first_gap: float = 0.0) -> None:
    audit, expected = pq.read_table(seen / "audit"), pq.read_table(alone / "audit")
    for column in ("step", "pair_id", "kept"):
        assert audit[column].to_pylist() == expected[column].to_pylist(), column
    # M0 and σ are means over ten gaps, each within 1e-5 nats of rounding, which differs between processors
    for column, tolerance in {"gap": 1e-5, "beta": 1e-6, "running_mean": 5e-6, "running_std": 5e-6}.items():
        np.testing.assert_allclose(audit[column], expected[column], rtol=0, atol=tolerance, err_msg=column)
    assert np.abs(audit["gap"].to_numpy()[:10]).max() <= first_gap  # policy and reference are one at first
    assert np.abs(audit["gap"].to_numpy()).max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS[2])
def test_two_ranks_equal_one(variant: str, models: Path, two_ranks: Path, tmp_path: Path) -> None:
    assert_one_process_agrees(VARIANTS[2][variant][0], models, two_ranks / variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS[4])
def test_four_ranks_equal_one(variant: str, models: Path, four_ranks: Path, tmp_path: Path) -> None:
    assert_one_process_agrees(VARIANTS[4][variant][0], models, four_ranks / variant, tmp_path)


def test_evaluation_fine_tuning_and_a_cached_reference_agree(models: Path, two_ranks: Path, tmp_path: Path) -> None:
    llama = str(models / "llama")
    alone = {
        "cached": train(llama, tmp_path / "cached", *SCENARIOS["many_passes"], "cached"),
        "sft": fine_tune(llama, tmp_path),
    }
    # another run may have scored the reference, on ranks that add up in another order
    assert_same_audit(two_ranks / "cached", tmp_path / "cached", first_gap=1e-5)
    for name, expected in alone.items():
        seen = torch.load(two_ranks / f"{name}.pt")
        metrics = {metric for metric in expected if metric.startswith("val/")}
        for metric in metrics:
            assert seen.pop(metric).item() == pytest.approx(expected.pop(metric).item(), rel=1e-4, abs=1e-5), metric
        assert ("val/val/pairs" in metrics) == (name == "cached")
        assert relative_difference(expected, seen) < 1e-5, name


def test_every_pair_is_scored_once(models: Path, two_ranks: Path, tmp_path: Path) -> None:
    score(str(models / "llama"), tmp_path / "scores.parquet")
    seen, expected = pq.read_table(two_ranks / "scores.parquet"), pq.read_table(tmp_path / "scores.parquet")
    assert seen["pair_id"].to_pylist() == expected["pair_id"].to_pylist()
    for side in ("chosen", "rejected"):
        column = f"policy_{side}_logp"
        np.testing.assert_allclose(seen[column], expected[column], rtol=1e-5)
    assert sorted(path.name for path in two_ranks.glob("scores*")) == ["scores.parquet"]


def assert_exported_to_the_bit(checkpoint: Path, out: Path) -> None:
    export(str(checkpoint), str(out))
    exported = dict(AutoModelForCausalLM.from_pretrained(out, dtype="auto").named_parameters())
    trained = torch.load(checkpoint.parent.with_suffix(".pt"), weights_only=False)["weights"]
    assert {f"model.{name}" for name in exported} == trained.keys()
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in exported.items())


@pytest.mark.parametrize("variant", VARIANTS[2])
def test_parts_are_exported_to_the_bit(variant: str, two_ranks: Path, tmp_path: Path) -> None:
    assert_exported_to_the_bit(two_ranks / variant / "run.ckpt", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS[4])
def test_shards_of_parts_are_exported_to_the_bit(variant: str, four_ranks: Path, tmp_path: Path) -> None:
    assert_exported_to_the_bit(four_ranks / variant / "run.ckpt", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "settings", "size", "said"),
    [
        ("gpt2", {}, 2, "no tensor-parallel plan for gpt2 models: set tensor_parallel_size to 1"),
        ("llama", {}, 3, "tensor_parallel_size 3 does not divide this model's num_attention_heads, which is 4"),
        ("llama", {}, 4, "tensor_parallel_size 4 does not divide this model's num_key_value_heads, which is 2"),
        ("llama", {"intermediate_size": 65}, 2, r"does not divide this model's model\.layers\.\*\.mlp\.\S+, which"),
        (
            "llama",
            {"model_type": "mixtral"},
            2,
            r"of mixtral models splits more than linear layers \(model\.layers",
        ),
    ],
)
def test_models_that_cannot_be_split_are_refused(family: str, settings: Any, size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        split_plan(tiny_model(family, **settings), size)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2 does not divide the 3 ranks"),
        ({"replicas": 2}, "3 ranks do not make 2 replicas"),
        ({"tensor_parallel_size": 3, "replicas": 2}, "1 groups of 3 ranks do not make 2 replicas"),
    ],
)
def test_ranks_that_do_not_go_up_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ShardedStrategy(**settings).shards(1, 3)


def test_a_refusal_comes_before_any_process_group(models: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, strategy=ShardedStrategy(tensor_parallel_size=2), precision="32-true")
    with pytest.raises(UserError, match="does not divide the 1 ranks"):
        trainer.fit(preference(str(models / "llama")), controlled(10))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_part_holds_its_share_of_the_blocks(family: str) -> None:
    whole, part = tiny_model(family), tiny_model(family)
    keep_local_part(part, 2)
    plan = split_plan(whole, 2)
    for (name, before), (_, after) in zip(whole.named_parameters(), part.named_parameters(), strict=True):
        split = plan.get(name.rpartition(".")[0], "")
        halved = "wise" in split and not ("rowwise" in split and name.endswith("bias"))
        assert after.numel() * (2 if halved else 1) == before.numel(), name
    assert "head" not in " ".join(plan)
    assert "embed" not in " ".join(plan)
