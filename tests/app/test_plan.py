"""What `beta-dpo plan` foretells is what a run takes; an export takes one model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_runs import ROOT, command, write_config
from tiny_runs import VOCABULARY, save_tiny_model, tiny_model
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from app.cli.planning import model_config
from app.core.errors import UserError
from app.main import main
from lightning_modules import PreferenceOptimization
from lightning_modules.memory import Sizes
from lightning_modules.pretrained import bare_model

# 48 million parameters, a third of them in embeddings and head: the interpreter's own memory does not hide them
BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 16000}
RUN = ["--config", "config.yaml", "--config", str(ROOT / "configs/strategy/fsdp.yaml"), "--trainer.max_steps", "2"]
RUN += ["--trainer.devices", "2", "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
MODELS = {name: ("--config", str(ROOT / f"configs/model/{name}.yaml")) for name in ("lora", "qlora")}
# what is freed goes back to the system, so that the peak is of what is held and not of what malloc keeps
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def planned(text: str) -> dict[str, float]:
    """The table of a plan, in bytes."""
    return {name.strip(): float(size) * 1e9 for name, size in re.findall(r"^  (\S.*?) +([\d.]+)$", text, re.M)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that measured itself."""
    return measure(tmp_path_factory.mktemp("measured"))


def measure(folder: Path, *options: str) -> Path:
    """Two steps of two ranks, under the options of `RUN` and these, leave their memory in `folder`; returns it."""
    model = save_tiny_model("llama", folder / "model", **BIG)
    write_config(folder, model, pairs=80, batch_size=40, micro_batch_tokens=512)
    probe = ("--trainer.callbacks+", "memory_probe.MemoryProbe")
    done = command(folder, "fit", *RUN, *options, *probe, **ALLOCATOR)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_peak_of_two_sharded_ranks_is_as_planned(measured: Path) -> None:
    assert_as_planned(measured, 4 * 48e6 / 2)


@pytest.mark.slow
def test_the_peak_of_adapters_on_two_ranks_is_as_planned(tmp_path: Path) -> None:
    options = (*MODELS["lora"], "--trainer.strategy.meta_init_above", "0")
    assert_as_planned(measure(tmp_path, *options), 4 * (48e6 + 1.1e6) / 2, *options)
    for rank in range(2):  # never holds the whole base
        seen = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        assert seen["start"] - seen["baseline"] < 0.85 * 4 * 48e6


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra quantize is not installed")
def test_the_peak_of_a_base_in_4_bits_is_as_planned(tmp_path: Path) -> None:
    alone = (*MODELS["qlora"], "--trainer.devices", "1", "--trainer.strategy", "auto")
    parameters = 31.5e6 * 4.13 / 8 + 4 * (16.4e6 + 1.1e6)
    assert_as_planned(measure(tmp_path, *alone), parameters, *alone, ranks=1)


@pytest.mark.slow
def test_the_peak_of_two_ranks_that_split_layers_is_as_planned(tmp_path: Path) -> None:
    split = ("--trainer.strategy.tensor_parallel_size", "2")
    assert_as_planned(measure(tmp_path, *split), 4 * (48e6 + 16.4e6) / 2, *split)  # embeddings and head are whole


def assert_as_planned(folder: Path, parameters: float, *options: str, ranks: int = 2) -> None:
    """The peak that was measured in `folder` is that of the plan, which counts so many bytes of parameters."""
    done = command(folder, "plan", *RUN, *options)
    assert done.returncode == 0, done.stderr
    plan = planned(done.stdout)
    assert plan["parameters"] == pytest.approx(parameters, rel=0.06)
    for rank in range(ranks):
        seen = json.loads((folder / f"memory-{rank}.json").read_text())
        assert seen["peak"] - seen["baseline"] == pytest.approx(plan["sum"], rel=0.2), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_export_holds_one_model(form: str, measured: Path, tmp_path: Path) -> None:
    shards = (measured / "runs/run/checkpoints/last.ckpt").resolve()
    checkpoint = shards
    if form == "file":  # weights and optimizer in one, as a single process would write them
        checkpoint = tmp_path / "whole.ckpt"
        dcp_to_torch_save(shards, checkpoint)
        parts = torch.load(checkpoint, weights_only=True)
        torch.save(torch.load(shards / "meta.pt", weights_only=True) | parts, checkpoint)
        assert checkpoint.stat().st_size > 3 * 4 * 47e6
    script = """
import sys
import memory_probe
from app.commands.export import export
from tiny_runs import tiny_model
sys.modules["app.commands.export"].LARGEST = 0  # as above 2e9 parameters: read again, it takes a second model
tiny_model("llama")  # what transformers loads when it is first used
before = memory_probe.memory_status("VmRSS")
memory_probe.forget_peak()
export(*sys.argv[1:])
print(memory_probe.memory_status("VmHWM") - before)
"""
    line = [sys.executable, "-c", script, str(checkpoint), str(tmp_path / "out")]
    places = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        line, env={"PYTHONPATH": places, **ALLOCATOR}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert weights > 4 * 47e6
    assert int(done.stdout.splitlines()[-1]) < 1.15 * weights


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, float]]:
    main(["plan", *arguments])
    text = capsys.readouterr().out
    return text, planned(text)


SMALL = "EleutherAI/pythia-410m"
HH = ("--config", str(ROOT / "configs/hh_pythia.yaml"), "--devices_per_node", "8")


# published sizes: EleutherAI/pythia's README, and the parameter counts that the Hub shows
@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("EleutherAI/pythia-410m", 405_334_016),
        ("EleutherAI/pythia-1.4b", 1_414_647_808),
        ("EleutherAI/pythia-2.8b", 2_775_208_960),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
    ],
)
def test_known_shapes_have_their_published_size(shape: str, parameters: int) -> None:
    config = model_config(PreferenceOptimization(name=shape), None)
    assert Sizes.of(bare_model(config, dtype=torch.float32)).weights.all == parameters


def test_a_bias_of_the_head_is_counted_with_the_head() -> None:
    assert Sizes.of(tiny_model("gptj")).trained.head == VOCABULARY * (32 + 1)


def test_a_plan_names_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    fsdp = ("--config", str(ROOT / "configs/strategy/fsdp.yaml"))
    text, plan = plan_of(capsys, *HH, *fsdp, "--shape", SMALL, "--memory_gb", "80")
    assert text.startswith("405,334,016 parameters on 1 × 8 devices, sharded in 8 shards")
    assert plan["parameters"] == pytest.approx(4 * 405_334_016 / 8, abs=6e6)
    assert plan["optimizer state"] == pytest.approx(plan["parameters"], abs=1e7)  # RMSprop: one number
    assert plan["reference"] == pytest.approx(plan["parameters"] / 2, abs=1e7)  # bfloat16
    assert plan["sum"] == pytest.approx(sum(plan.values()) - plan["sum"], abs=5e7)
    assert "fits 80 GB" in text


@pytest.mark.slow
def test_strategies_hold_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    model = (*HH, "--shape", SMALL)
    size = 4 * 405_334_016
    _, ddp = plan_of(capsys, *model)
    assert ddp["parameters"] == pytest.approx(size, rel=2e-2)
    # weights of linear layers, the head's among them, in bfloat16; 50,304 embeddings of width 1,024 in float32
    assert ddp["reference"] == pytest.approx(size / 2 + 2 * 50_304 * 1024, rel=1e-2)
    _, full = plan_of(capsys, *model, "--trainer.precision", "32-true")
    assert full["reference"] == pytest.approx(size, rel=1e-2)
    assert ddp["gradients"] == pytest.approx(2 * size, rel=1e-2)  # and buckets
    sharded = {"class_path": "lightning_modules.ShardedStrategy", "init_args": {"replicas": "nodes"}}
    strategy = ("--trainer.strategy", json.dumps(sharded), "--trainer.precision", "32-true")
    text, hsdp = plan_of(capsys, *model, *strategy, "--trainer.num_nodes", "2")
    assert "2 × 8 devices, sharded in 8 shards" in text
    assert hsdp["parameters"] == pytest.approx(size / 8, rel=5e-2)
    _, offloaded = plan_of(capsys, *model, *strategy, "--trainer.strategy.offload_reference", "true")
    assert "reference" not in offloaded
    _, whole = plan_of(capsys, *model, *strategy, "--trainer.strategy.accumulate_whole_gradients", "true")
    assert whole["gradients"] == pytest.approx(hsdp["gradients"] + size, rel=1e-2)


def test_a_layer_that_is_split_takes_its_part(capsys: pytest.CaptureFixture[str]) -> None:
    fsdp, split = (("--config", str(ROOT / f"configs/strategy/{name}.yaml")) for name in ("fsdp", "fsdp_tp"))
    _, whole = plan_of(capsys, *HH, *fsdp, "--shape", SMALL)
    text, halves = plan_of(capsys, *HH, *split, "--shape", SMALL)
    assert "405,334,016 parameters on 1 × 8 devices, sharded in 4 shards of 2 ranks each" in text
    # embeddings and head are in four shards where they were in eight, halves of all else still in eight
    assert halves["parameters"] == pytest.approx(whole["parameters"] + 4 * 103e6 / 8, rel=0.01)
    assert halves["activations"] < 0.9 * whole["activations"]
    with pytest.raises(SystemExit) as stop:
        main(["plan", *HH, *split, "--shape", SMALL, "--trainer.strategy.tensor_parallel_size", "3"])
    assert stop.value.code == 2
    assert "tensor_parallel_size 3 does not divide the 8 ranks" in capsys.readouterr().err


def test_adapters_are_counted_alone(capsys: pytest.CaptureFixture[str]) -> None:
    one = (*HH[:2], "--trainer.devices", "1", "--shape", "EleutherAI/pythia-1.4b")
    text, plan = plan_of(capsys, *one, *MODELS["lora"], "--memory_gb", "24")
    (trained,) = (int(count.replace(",", "")) for count in re.findall(r"and ([\d,]+) of adapters", text))
    # 24 layers of width 2048: query_key_value, dense and two of the MLP, r = 16
    assert trained == 24 * 16 * (2048 + 3 * 2048 + 2 * 2048 + 2 * (2048 + 4 * 2048))
    assert plan["optimizer state"] == pytest.approx(8 * trained, abs=6e6)
    assert "reference" not in plan
    assert "fits 24 GB" in text
    assert f"a checkpoint takes {12 * trained / 1e9:.2f} GB" in text
    # linear layers in bfloat16, 50,304 embeddings of width 2,048 in float32
    assert plan["parameters"] == pytest.approx(2 * 1_414_647_808 + 2 * 50_304 * 2048 + 4 * trained, abs=1e7)
    _, other = plan_of(capsys, *one, *MODELS["lora"], "--model.reference_name", "another")
    assert other["reference"] == pytest.approx(plan["parameters"], rel=0.03)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "reads only its shards of the files"),
        (("--trainer.strategy.meta_init_above", "2e9"), "the whole model in float32 in the host's memory: 5.7 GB"),
        (
            ("--model.lora.use_dora", "true"),
            "(DoRA, PiSSA and OLoRA start from its weights): 5.7 GB, on a node 45.3",
        ),
    ],
)
def test_a_plan_says_what_the_start_needs(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sharded = (*HH, *MODELS["lora"], "--config", str(ROOT / "configs/strategy/fsdp.yaml"))
    text, _ = plan_of(capsys, *sharded, "--shape", "EleutherAI/pythia-1.4b", *options)
    assert said in text.splitlines()[1]


def test_an_8b_model_in_4_bits_fits_24_gb_at_4096_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--trainer.devices", "1", "--shape", "meta-llama/Meta-Llama-3-8B-Instruct", "--memory_gb", "24")
    recipe = ("--config", str(ROOT / "configs/ultrafeedback_instruct.yaml"), *MODELS["qlora"], *shape)
    text, plan = plan_of(capsys, *recipe, "--trainer.precision", "bf16-mixed", "--trainer.strategy", "auto")
    # 6.98e9 numbers in 4.13 bits, the head in bfloat16, as many embeddings in float32
    assert plan["parameters"] == pytest.approx(6.98e9 * 4.13 / 8 + 6 * 128256 * 4096 + 4 * 42e6, rel=0.01)
    largest = re.search(r"fits? 24 GB.*micro_batch_tokens (\d+)", text)
    assert largest is not None, text
    assert int(largest[1]) >= 4096


def test_dense_masks_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ("--shape", SMALL, "--data.micro_batch_tokens", "32768", "--model.gradient_checkpointing", "true")
    held = {}
    for attention in ("pairwise", "sdpa", "eager"):
        _, plan = plan_of(capsys, *HH, *fixed, "--trainer.accelerator", "cpu", "--model.attention", attention)
        held[attention] = plan["activations"]
    assert held["sdpa"] - held["pairwise"] == pytest.approx(32768**2, abs=2e7)  # a boolean for each two tokens
    assert held["eager"] - held["pairwise"] == pytest.approx(4 * 32768**2, abs=2e7)


def test_checkpointing_and_memory_move_the_largest_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    model = (*HH, "--shape", SMALL, "--config", str(ROOT / "configs/strategy/fsdp.yaml"))

    def largest(*options: str) -> int:
        text, _ = plan_of(capsys, *model, *options)
        found = re.search(r"micro_batch_tokens (\d+)$", text.strip())
        assert found, text
        return int(found[1])

    plain = ("--model.gradient_checkpointing", "false")
    most = largest("--memory_gb", "40")
    assert most < largest("--memory_gb", "80")
    assert largest("--memory_gb", "40", *plain) < most / 4
    for tokens, fits in ((most, True), (most + 512, False)):
        text, plan = plan_of(capsys, *model, "--data.micro_batch_tokens", str(tokens), "--memory_gb", "40")
        assert (plan["sum"] < 36e9 + 1e7) == fits
        assert (f"\nfits 40 GB, of which 10% are left free, up to data.micro_batch_tokens {most}" in text) == fits
        assert (f"\n{tokens} tokens do not fit 40 GB" in text) != fits
    text, _ = plan_of(capsys, *model, "--memory_gb", "1")
    assert "does not fit 1 GB with any micro-batch: shard over more devices." in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trainer.strategy", "deepspeed", "--shape", SMALL), "must be one device, ddp or ShardedStrategy"),
        (("--trainer.precision", "64-true", "--shape", SMALL), "64-true does not go with this strategy"),
        (("--shape", "nobody/nothing"), "nobody/nothing is no file, and not among the known shapes: EleutherAI/"),
        (("--model.name", "runs/nowhere/model"), "Give its shape, for example --shape"),
    ],
)
def test_what_cannot_be_planned_is_said(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *HH, *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    for devices, answer in (
        ("auto", "trainer.devices is auto: give --devices_per_node, or a number as --trainer.devices."),
        ("x", "trainer.devices is x: give --devices_per_node, or a number as --trainer.devices."),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *HH[:2], "--shape", "EleutherAI/pythia-410m", "--trainer.devices", devices])
        assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_type": "nope"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_shape_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"--shape: .*config\.json is not the config\.json of a model"):
        model_config(SimpleNamespace(name="x"), str(tmp_path / "config.json"))  # type: ignore[arg-type]
