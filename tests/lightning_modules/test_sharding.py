"""Every way to shard gives one process's training; a model is filled on two ranks without ever being whole."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import run_ranks
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from sharded_run import VARIANTS, rows, train
from tiny_runs import (
    FAMILIES,
    controlled,
    preference,
    quiet_trainer,
    relative_difference,
    same_bits,
    save_tiny_model,
    weights,
)
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from app.commands.export import export
from app.core.errors import UserError
from lightning_modules import ShardedStrategy
from lightning_modules.lora import Lora, add_lora
from lightning_modules.pretrained import load_model, stand_ins_for_meta
from lightning_modules.scorer import ResponseScorer
from lightning_modules.sharded_loading import read_weights, weight_files

SCRIPT = Path(__file__).with_name("sharded_run.py")
EAGER = [name for name in VARIANTS if name != "compiled"]


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of each family; some of them tie their embeddings by default."""
    folder = tmp_path_factory.mktemp("two-shards") / "families"
    for family in FAMILIES:
        save_tiny_model(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: str, tied_llama: str, families: Path) -> Path:
    folder = families.parent
    run_ranks(SCRIPT, "2", tiny_llama, tied_llama, str(folder), *EAGER, logs=folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(tiny_llama: str, tied_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """Final weights and audit of one process, by whether embeddings are tied."""
    folder = tmp_path_factory.mktemp("one-rank")
    return {
        tied: (train(name, folder / str(tied), {}), pq.read_table(folder / str(tied) / "audit"))
        for tied, name in ((False, tiny_llama), (True, tied_llama))
    }


@pytest.mark.parametrize("variant", EAGER)
def test_two_ranks_equal_one(variant: str, two_ranks: Path, one_rank: dict[bool, Any]) -> None:
    assert_one_process_agrees(variant, two_ranks, one_rank)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_two_ranks_of_compiled_layers_equal_one(one_rank: dict[bool, Any], tiny_llama: str, tmp_path: Path) -> None:
    run_ranks(SCRIPT, "2", tiny_llama, tiny_llama, str(tmp_path), "compiled", logs=tmp_path)
    assert_one_process_agrees("compiled", tmp_path, one_rank)


def assert_one_process_agrees(variant: str, two_ranks: Path, one_rank: dict[bool, Any]) -> None:
    expected, expected_audit = one_rank["tied" in variant]
    seen = torch.load(two_ranks / f"{variant}.pt", weights_only=False)
    audit = pq.read_table(two_ranks / variant / "audit")
    half = "bfloat16" in variant
    for column in ("step", "pair_id", "kept"):
        assert audit[column].to_pylist() == expected_audit[column].to_pylist(), column
    for column, tolerance in {"gap": 1e-5, "beta": 1e-6, "running_mean": 2e-6, "running_std": 2e-6}.items():
        apart = np.abs(audit[column].to_numpy() - expected_audit[column].to_numpy())
        assert apart.max() < (0.2 if half else tolerance), column  # bfloat16 has two to three digits
    assert np.abs(expected_audit["gap"].to_numpy()).max() > 0.1
    assert relative_difference(expected["weights"], seen["weights"]) < (1e-3 if half else 1e-5)

    # master weights stay float32; the reference is stored in the compute type, and gives the policy's very numbers
    assert seen["types"] == [{torch.float32}, {torch.bfloat16 if half else torch.float32}]
    assert set(seen["buffers"].values()) == {torch.float32}
    assert np.abs(audit["gap"].to_numpy()[:10]).max() == 0
    shares = [own / whole for own, whole in zip(seen["rows"], seen["all_rows"], strict=True)]
    assert set(shares) == {1.0 if variant == "replicas" else 0.5}


@pytest.mark.slow
def test_two_replicas_of_two_shards_equal_one_rank(
    one_rank: dict[bool, Any], tiny_llama: str, tmp_path: Path
) -> None:
    run_ranks(SCRIPT, "4", tiny_llama, tiny_llama, str(tmp_path), "replicas", logs=tmp_path, ranks=4)
    expected, expected_audit = one_rank[False]
    seen, audit = (
        torch.load(tmp_path / "replicas.pt", weights_only=False),
        pq.read_table(tmp_path / "replicas/audit"),
    )
    assert audit["kept"].to_pylist() == expected_audit["kept"].to_pylist()
    np.testing.assert_allclose(audit["beta"], expected_audit["beta"], rtol=0, atol=1e-6)
    assert relative_difference(expected["weights"], seen["weights"]) < 1e-5
    assert {own / whole for own, whole in zip(seen["rows"], seen["all_rows"], strict=True)} == {0.5}
    export(str(tmp_path / "replicas/run.ckpt"), str(tmp_path / "out"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, seen["weights"][f"model.{name}"]) for name, p in exported.named_parameters())


@pytest.mark.parametrize("variant", ["replicas", "meta", "tied", "tied_meta", "bfloat16"])
def test_shards_are_exported_to_the_bit(variant: str, two_ranks: Path, tmp_path: Path) -> None:
    shards = two_ranks / variant / "run.ckpt"
    size = sum(file.stat().st_size for file in shards.glob("*.distcp"))
    export(str(shards), str(tmp_path / "out"))
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").named_parameters())
    trained = torch.load(two_ranks / f"{variant}.pt", weights_only=False)["weights"]
    assert {f"model.{name}" for name in exported} == trained.keys()
    if variant == "replicas":  # weights and momentum are written once, though every rank has all of them
        assert size < 1.5 * (2 * 4 * sum(tensor.numel() for tensor in trained.values()))
    for name, parameter in exported.items():
        assert torch.equal(parameter, trained[f"model.{name}"]), name
    assert ("lm_head.weight" in exported) == ("tied" not in variant)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 2
    # no run of the command, so there is nothing to tell of
    assert "Not recorded" in (tmp_path / "out" / "README.md").read_text()


def test_a_shard_that_is_flipped_cut_or_lost_is_not_exported(two_ranks: Path, tmp_path: Path) -> None:
    shards = tmp_path / "run.ckpt"
    shutil.copytree(two_ranks / "meta" / "run.ckpt", shards)
    places = FileSystemReader(shards).read_metadata().storage_data.values()
    largest = max(places, key=lambda place: place.length)
    one = shards / largest.relative_path
    whole = one.read_bytes()
    flipped = bytearray(whole)
    flipped[largest.offset + largest.length // 2] ^= 64
    one.write_bytes(flipped)
    with pytest.raises(UserError, match="is damaged"):
        export(str(shards), str(tmp_path / "out"))
    one.write_bytes(whole[:20_000])
    with pytest.raises(UserError, match="is damaged"):
        export(str(shards), str(tmp_path / "out"))
    one.unlink()
    with pytest.raises(UserError, match="is damaged"):
        export(str(shards), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_checkpointing_runs_blocks_again(two_ranks: Path) -> None:
    forwards = {
        variant: torch.load(two_ranks / f"{variant}.pt", weights_only=False)["block_forwards"]
        for variant in ("checkpointed", "meta")
    }
    assert forwards["checkpointed"] > forwards["meta"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_never_whole_scores_like_the_eager_one(
    family: str, two_ranks: Path, families: Path
) -> None:
    scores = torch.load(two_ranks / "scores.pt", weights_only=True)[family]
    with torch.no_grad():
        expected = ResponseScorer(load_model(str(families / family)))(rows())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert scores.unique().numel() > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_the_rest_is_there(family: str, families: Path) -> None:
    """Buffers that no file holds, ties, and after reading every tensor to the bit."""
    name = str(families / family)
    bare, eager = load_model(name, meta_above=0), load_model(name)
    assert all(parameter.is_meta for parameter in bare.parameters())
    read_weights(bare, weight_files(name))
    assert bare.state_dict(keep_vars=True).keys() == eager.state_dict().keys()
    for (left_name, left), (right_name, right) in zip(
        [*bare.named_parameters(), *bare.named_buffers()],  # tied ones once
        [*eager.named_parameters(), *eager.named_buffers()],
        strict=True,
    ):
        assert left_name == right_name
        assert torch.equal(left, right), left_name
    assert bare.generation_config.eos_token_id == eager.generation_config.eos_token_id


@pytest.mark.skipif(find_spec("peft") is None, reason="the extra lora is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_a_model_without_weights_start_as_usual(family: str, families: Path) -> None:
    name = str(families / family)
    bare, eager = load_model(name, meta_above=0), load_model(name)
    layers = dict(eager.named_modules())
    linear = {name.rpartition(".")[2] for name, layer in layers.items() if isinstance(layer, (nn.Linear, Conv1D))}
    embeddings = next(name for name, layer in layers.items() if layer is eager.get_input_embeddings())
    for model in (bare, eager):
        torch.manual_seed(0)
        with stand_ins_for_meta(model):
            add_lora(model, Lora(r=2, target_modules=[*sorted(linear - {"lm_head"}), embeddings]))
            assert not any(parameter.is_meta for parameter in model.parameters())
    assert {parameter.is_meta for parameter in bare.parameters() if not parameter.requires_grad} == {True}
    assert not any(parameter.is_meta for parameter in bare.parameters() if parameter.requires_grad)
    read_weights(bare, weight_files(name))
    for (left_name, left), (right_name, right) in zip(
        bare.named_parameters(), eager.named_parameters(), strict=True
    ):
        assert (left_name, left.requires_grad) == (right_name, right.requires_grad)
        assert torch.equal(left, right), left_name


def test_small_models_are_loaded_whole(tiny_llama: str) -> None:
    parameters = sum(p.numel() for p in load_model(tiny_llama).parameters())
    assert not any(p.is_meta for p in load_model(tiny_llama, meta_above=parameters).parameters())
    assert all(p.is_meta for p in load_model(tiny_llama, meta_above=parameters - 1).parameters())


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    name = save_tiny_model("llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    some = "model.layers.1.mlp.up_proj.weight"
    for changed, said in (
        (tensors | {some: torch.zeros(3, 32)}, rf"{some} in .* has shape \[3, 32\], but .* \[64, 32\]"),
        (
            {n: t for n, t in tensors.items() if n != some},
            f"hold no tensor {some}, or .*: save the model once more",
        ),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=said):
            read_weights(load_model(name, meta_above=0), weight_files(name))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        weight_files(name)
    path.unlink()
    with pytest.raises(UserError, match="has no safetensors files"):
        weight_files(name)


@pytest.mark.parametrize(
    ("strategy", "precision", "said"),
    [
        (ModelParallelStrategy(1, 1), "32-true", r"class_path: lightning_modules\.ShardedStrategy"),
        (ShardedStrategy(), "bf16-mixed", "set 32-true with ShardedStrategy"),
        (ShardedStrategy(replicas=2), "32-true", "1 ranks do not make 2 replicas"),
    ],
)
def test_what_cannot_work_is_refused(
    strategy: Any, precision: str, said: str, tiny_llama: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, strategy=strategy, precision=precision)
    with pytest.raises(UserError, match=said):
        trainer.fit(preference(tiny_llama), controlled(10))
    assert not torch.distributed.is_initialized()


def test_an_optimizer_that_knows_no_shards_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, strategy=ShardedStrategy(process_group_backend="gloo"))
    module = preference(tiny_llama, optimizer=partial(torch.optim.Adafactor, lr=1e-3))
    with pytest.raises(UserError, match=r"Adafactor knows no sharded weights"):
        trainer.fit(module, controlled(10))
    torch.distributed.destroy_process_group()


class Measuring(Callback):
    """Measures the KL between backward pass and update, as the dashboard does."""

    def on_step_decided(self, trainer: Any, pl_module: Any, decision: Any) -> None:
        decision.measure_kl()


@pytest.mark.parametrize("reshard", [True, False])
def test_a_measurement_before_the_update_changes_nothing(reshard: bool, tiny_llama: str, tmp_path: Path) -> None:
    def trained(*callbacks: Callback) -> dict[str, torch.Tensor]:
        strategy = ShardedStrategy(process_group_backend="gloo", reshard_after_forward=reshard)
        module = preference(tiny_llama)
        quiet_trainer(tmp_path, callbacks, strategy=strategy, max_steps=3).fit(module, controlled(30))
        shards: Any = weights(module)
        return {name: weight.full_tensor() for name, weight in shards.items()}

    try:
        assert same_bits(trained(Measuring()), trained())
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_stay_in_the_checkpoint_when_gathered_weights_are_kept(tiny_llama: str, tmp_path: Path) -> None:
    strategy = ShardedStrategy(process_group_backend="gloo", reshard_after_forward=False)
    module = preference(tiny_llama, lora=Lora(r=2, target_modules=["q_proj", "embed_tokens"]))
    try:
        quiet_trainer(tmp_path, strategy=strategy, max_steps=2).fit(module, controlled(20))
        assert len(module.state_dict()) == 6  # A and B of two layers and of the embeddings
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a whole number from 1"),
        ({"replicas": 0}, "replicas must be a whole number from 1"),
        ({"prefetch_blocks": -1}, "prefetch_blocks must be a whole number from 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ShardedStrategy(**settings)
