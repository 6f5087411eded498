"""Two ranks, replicated or sharded, decide and learn what one rank does."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import run_ranks
from distributed_run import ADAPTERS, EXACT, PLACES, SCENARIOS, STRATEGIES, fine_tune, train, train_exactly
from safetensors.torch import load_file
from tiny_runs import relative_difference, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.commands.export import export
from lightning_modules.checkpoint import read_for_export


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: str, tiny_gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios under both strategies, in one pair of processes."""
    folder = tmp_path_factory.mktemp("two-ranks")
    script = Path(__file__).with_name("distributed_run.py")
    run_ranks(script, tiny_llama, tiny_gpt2, str(folder), logs=folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(
    tiny_llama: str, tiny_gpt2: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[pa.Table, dict]]:
    folder = tmp_path_factory.mktemp("one-rank")
    runs = [(scenario, *numbers, "frozen") for scenario, numbers in SCENARIOS.items()]
    kinds = {**{kind: kind for kind in PLACES}, "other": tiny_gpt2}
    runs += [(name, *SCENARIOS["many_passes"], kind) for name, kind in kinds.items()]
    return {
        scenario: (audit(folder / scenario), final)
        for scenario, pairs, tokens, kind in runs
        for final in [train(tiny_llama, folder / scenario, pairs, tokens, kind)]
    }


def audit(folder: Path) -> pa.Table:
    return pq.read_table(folder / "audit")


def split(final: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and validation metrics."""
    metrics = {name: value for name, value in final.items() if name.startswith("val/")}
    return {name: value for name, value in final.items() if name not in metrics}, metrics


@pytest.mark.parametrize(
    ("strategy", "scenario"),
    [
        *product(STRATEGIES, [*SCENARIOS, "cached", "other"]),
        *((strategy, kind) for kind, strategies in PLACES.items() for strategy in strategies),
    ],
)
def test_two_ranks_equal_one(
    strategy: str, scenario: str, two_ranks: Path, one_rank: dict[str, tuple[pa.Table, dict]]
) -> None:
    # a cached reference on two ranks equals a frozen one on one
    expected, expected_final = one_rank["many_passes" if scenario == "cached" else scenario]
    seen = audit(two_ranks / f"{strategy}-{scenario}")
    assert seen.schema == expected.schema
    for column in ("step", "pair_id", "kept", "flipped"):
        assert seen[column].to_pylist() == expected[column].to_pylist(), column
    # rounding of float32 log-probabilities alone, as the float64 test below shows
    for column, tolerance in {"gap": 1e-5, "beta": 1e-6, "running_mean": 2e-6, "running_std": 2e-6}.items():
        apart = np.abs(seen[column].to_numpy() - expected[column].to_numpy())
        assert apart.max() < tolerance, column
    # the numbers are not all alike, so that equality means something
    assert np.abs(expected["gap"].to_numpy()).max() > 0.1
    assert len(set(expected["beta"].to_pylist())) == 3
    sizes = np.bincount(expected["step"].to_numpy())[1:]  # steps count from 1
    assert sizes.tolist() == [10, 10, 2 if scenario == "single_pass" else 1]

    expected_weights, expected_metrics = split(expected_final)
    seen_weights, seen_metrics = split(torch.load(two_ranks / f"{strategy}-{scenario}.pt"))
    assert relative_difference(expected_weights, seen_weights) < 1e-5
    assert len(expected_metrics) >= 8
    for name, value in expected_metrics.items():
        assert seen_metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("strategy", PLACES["adapters"])
def test_a_checkpoint_of_adapters_is_small_and_exported_to_the_bit(
    strategy: str, tiny_llama: str, two_ranks: Path, tmp_path: Path
) -> None:
    folder = two_ranks / f"{strategy}-adapters"
    adapters, _ = split(torch.load(two_ranks / f"{strategy}-adapters.pt"))
    state = read_for_export(folder / "run.ckpt")["state_dict"]
    assert {f"policy.{name}" for name in adapters} == state.keys()

    export(str(folder / "run.ckpt"), str(tmp_path / "adapter"), adapter=True)
    alone = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(alone) == len(adapters)
    export(str(folder / "run.ckpt"), str(tmp_path / "merged"))
    merged, base = (AutoModelForCausalLM.from_pretrained(name) for name in (tmp_path / "merged", tiny_llama))
    moved = 0
    for name, weight in base.state_dict().items():
        layer = name.removesuffix(".weight")
        a, b = (adapters.get(f"model.{layer}.lora_{part}.default.weight") for part in "AB")
        if a is not None and b is not None:
            assert torch.equal(alone[f"base_model.model.{layer}.lora_A.weight"], a)
            assert torch.equal(alone[f"base_model.model.{layer}.lora_B.weight"], b)
            moved += 1
            weight = weight + b @ a * (ADAPTERS.lora_alpha / ADAPTERS.r)
        assert torch.equal(merged.state_dict()[name], weight), name
    assert moved == len(adapters) // 2


@pytest.fixture(scope="module")
def exact_run(tiny_gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, dict[str, Tensor]]:
    """One process, one micro-batch, float64."""
    folder = tmp_path_factory.mktemp("exact")
    final = train_exactly(tiny_gpt2, folder, EXACT[1])
    return audit(folder), final


@pytest.mark.parametrize("micro_batches", EXACT)
@pytest.mark.parametrize("place", ["one process", "ddp"])
def test_what_float32_leaves_is_rounding_alone(
    place: str,
    micro_batches: int,
    two_ranks: Path,
    exact_run: tuple[pa.Table, dict[str, Tensor]],
    tiny_gpt2: str,
    tmp_path: Path,
) -> None:
    if place == "one process":
        final = train_exactly(tiny_gpt2, tmp_path, EXACT[micro_batches])
        seen = audit(tmp_path)
    else:
        label = f"{place}-exact-{micro_batches}"
        seen, final = audit(two_ranks / label), torch.load(two_ranks / f"{label}.pt")
    expected, expected_final = exact_run
    for column in ("step", "pair_id", "kept"):
        assert seen[column].to_pylist() == expected[column].to_pylist(), column
    decided = ("gap", "beta", "running_mean", "running_std", "margin", "label_confidence", "loss_weight")
    for column in decided:
        apart = np.abs(seen[column].to_numpy() - expected[column].to_numpy())
        assert apart.max() < 1e-9, column
    for column in ("margin", "label_confidence", "loss_weight"):
        assert np.ptp(expected[column].to_numpy()) > 1e-3, column
    # policy and reference start as the same float64 model
    assert np.abs(expected["gap"].to_numpy()[:10]).max() == 0
    assert np.abs(expected["gap"].to_numpy()).max() > 0.1
    assert {tensor.dtype for tensor in split(final)[0].values()} == {torch.float64}
    assert relative_difference(split(expected_final)[0], split(final)[0]) < 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fine_tuning_on_two_ranks_equals_one(
    strategy: str, tiny_llama: str, two_ranks: Path, tmp_path: Path
) -> None:
    expected_weights, expected_metrics = split(fine_tune(tiny_llama, tmp_path))
    seen_weights, seen_metrics = split(torch.load(two_ranks / f"{strategy}-sft.pt"))
    assert relative_difference(expected_weights, seen_weights) < 1e-5
    assert seen_metrics["val/loss"].item() == pytest.approx(expected_metrics["val/loss"].item(), rel=1e-5)
