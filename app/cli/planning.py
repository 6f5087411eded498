"""The command `beta-dpo plan`: the memory of a run per device, computed without weights, data or devices."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoConfig

from app.cli.trainer import OwnOptions, PartsCLI
from app.core.errors import UserError, refused
from app.core.files import CONFIGS
from app.method.ranges import PositiveFloat, PositiveInt
from lightning_modules.attention import dense_mask_bytes
from lightning_modules.base import LanguageModelTraining
from lightning_modules.lora import add_lora
from lightning_modules.measuring import parameter_count
from lightning_modules.memory import WEIGHT, MemoryPlan, Sizes, activations
from lightning_modules.pretrained import bare_model, freeze_unread, load_config, store_linear_weights
from lightning_modules.sharding import ShardedStrategy, keep_local_part
from lightning_modules.start_checks import check_quantized, stepped

SHAPES = CONFIGS / "shapes"  # <owner>/<name>.json, with the content of config.json on the Hub
RESERVED = 0.1  # share of a device reserved for CUDA, communication buffers and fragmentation
OPTIONS: OwnOptions = {
    "memory_gb": (PositiveFloat | None, None, "memory of one device in 10⁹ bytes; says which micro-batch fits"),
    "devices_per_node": (PositiveInt | None, None, "devices per node, if trainer.devices is auto"),
    "shape": (str | None, None, "config.json, or name in configs/shapes, if model.name is not on this machine"),
}


def run_plan(arguments: list[str]) -> None:
    """Parse the options of `fit` and of the plan, and print the plan."""
    options = PartsCLI(arguments, OPTIONS).config_init["fit"]
    tokens, memory_gb = options["data"].micro_batch_tokens, options["memory_gb"]
    plan, words = memory_plan(options["model"], model_config(options["model"], options["shape"]), options)
    moment, held = plan.peak(tokens)
    print(f"{words}\ndata.micro_batch_tokens {tokens}: the peak is {moment}; per device, in GB:\n")
    for name, size in {**held, "sum": sum(held.values())}.items():
        if size:
            print(f"  {name:<28}{size / 1e9:>9.2f}")
    print()
    if memory_gb is None:
        return
    largest = plan.largest_budget(int(memory_gb * 1e9 * (1 - RESERVED)))
    memory = f"{memory_gb:g} GB, of which {RESERVED:.0%} are left free"
    if not largest:
        print(f"does not fit {memory_gb:g} GB with any micro-batch: shard over more devices.")
    elif largest < tokens:
        print(f"{tokens} tokens do not fit {memory}: set data.micro_batch_tokens {largest}")
    else:
        print(f"fits {memory}, up to data.micro_batch_tokens {largest}")


def model_config(module: LanguageModelTraining, shape: str | None) -> Any:
    """Return the configuration of the model, from its folder, a shape file or the Hub. Raises UserError."""
    if shape is not None or not (module.name is None or Path(module.name).is_dir()):
        for candidate in (Path(shape or ""), SHAPES / f"{shape or module.name}.json"):
            if candidate.is_file():
                with refused(f"--shape: {candidate} is not the config.json of a model"):
                    settings = json.loads(candidate.read_bytes())
                    return AutoConfig.for_model(settings.pop("model_type"), **settings)
    if shape is not None:
        known = ", ".join(sorted(path.relative_to(SHAPES).as_posix()[:-5] for path in SHAPES.rglob("*.json")))
        raise UserError(f"--shape: {shape} is no file, and not among the known shapes: {known}.")
    try:
        return load_config(module.name, module.architecture, module.trust_remote_code)
    except UserError as error:
        raise UserError(f"{error} Give its shape, for example --shape EleutherAI/pythia-2.8b.") from error


def memory_plan(module: LanguageModelTraining, config: Any, options: Any) -> tuple[MemoryPlan, str]:
    """Return the plan and two lines about model, devices and start. Raises UserError for what has no plan."""
    trainer = options["trainer"]
    on_cpu, nodes = trainer["accelerator"] == "cpu", int(trainer["num_nodes"])
    per_node = devices_per_node(trainer["devices"], options["devices_per_node"], on_cpu)
    strategy, precision = trainer["strategy"], str(trainer["precision"] or "32-true")
    sharded = isinstance(strategy, ShardedStrategy)
    if not sharded and not isinstance(strategy, DDPStrategy) and strategy not in ("auto", "ddp"):
        raise UserError("plan: trainer.strategy must be one device, ddp or ShardedStrategy (configs/strategy).")
    if precision not in ("32-true", "32", "bf16-mixed") or (sharded and precision == "bf16-mixed"):
        raise UserError(f"plan: trainer.precision {precision} does not go with this strategy (docs/clusters.md).")
    half, autocast, split, shards = "bf16" in precision, not sharded and "bf16" in precision, 1, 1
    if sharded:
        half = strategy.requested_dtype == "bfloat16" or (strategy.requested_dtype == "auto" and not on_cpu)
        split, shards = strategy.tensor_parallel_size, strategy.shards(nodes, per_node * nodes)
    if module.quantize is not None:
        check_quantized(module.quantize, module.lora, sharded, precision)
    second = module.lora is None or getattr(module, "other_reference", None) is not None
    needs_reference = getattr(getattr(module, "loss", None), "needs_reference", False) and second
    dtype = torch.bfloat16 if half and sharded else torch.float32
    model = bare_model(config, dtype=torch.float32)
    parameters = parameter_count(model)
    keep_local_part(model, split)
    if module.lora is not None:
        add_lora(model, replace(module.lora, init_lora_weights=True))
    freeze_unread(model)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if sharded:
        for weight in model.parameters():
            weight.data = weight.data.to(torch.float32 if weight.requires_grad else dtype)
    elif autocast and not (module.lora and module.lora.use_dora):
        store_linear_weights(model, torch.bfloat16)
    plan = MemoryPlan(
        sizes=Sizes.of(model, module.quantize),
        activations=activations(config, dtype, autocast, split),
        kind="sharded" if sharded else "ddp" if per_node * nodes > 1 else "single",
        device="cpu" if on_cpu else "cuda",
        strategy=strategy if sharded else None,
        shards=shards,
        compute_bytes=2 if half else 4,
        autocast=autocast,
        reference=needs_reference and getattr(module, "reference", "frozen") == "frozen",
        checkpointed=module.gradient_checkpointing,
        dense_mask=0 if module.layout == "separate" else dense_mask_bytes(module.attention, config),
        optimizer_state=optimizer_state(module.make_optimizer),
    )
    adapters = 0 if module.lora is None else trained
    kept = adapters + (0 if module.adapters_alone else parameters)
    disk = WEIGHT * (kept + trained * plan.optimizer_state)
    words = f"{parameters:,} parameters" + (f" and {adapters:,} of adapters" if adapters else "")
    words += f" on {nodes} × {per_node} {'CPU processes' if on_cpu else 'devices'}, {plan.kind}"
    words += f" in {shards} shards" if sharded else ""
    words += f" of {split} ranks each (tensor parallelism)" if split > 1 else ""
    words += f"; a checkpoint takes {disk / 1e9:.2f} GB on disk"
    return plan, f"{words}\n{start_memory(module, parameters, plan, per_node)}"


def start_memory(module: LanguageModelTraining, parameters: int, plan: MemoryPlan, processes: int) -> str:
    """Return a sentence on the host memory that the processes of a node need while they load the model."""
    if module.quantize is not None:
        return "At the start the base is read tensor by tensor and quantised on the device."
    in_shards = plan.strategy is not None and parameters > plan.strategy.meta_init_above
    if in_shards and not (module.lora is not None and module.lora.reads_base):
        return "At the start each process reads only its shards of the files (meta_init_above)."
    held, size = "the whole model", WEIGHT * parameters / 1e9
    if plan.reference and not in_shards:
        held, size = f"{held} and its reference", 2 * size
    why = " (DoRA, PiSSA and OLoRA start from its weights)" if in_shards else ""
    told = f"{held} in float32 in the host's memory{why}: {size:.1f} GB, on a node {size * processes:.1f} GB"
    return f"At the start each process holds {told}."


def devices_per_node(devices: Any, given: int | None, on_cpu: bool) -> int:
    """Return the number of devices per node. Raises UserError for `auto` on GPUs, which depends on the node."""
    text = str(devices)
    if given is None and on_cpu and text in ("auto", "-1"):
        return 1
    if given is None and ("," in text or isinstance(devices, list)):  # the numbers of the devices
        return len(re.findall(r"\d+", text))
    count = given or (int(text) if text.isdecimal() else 0)
    if not count:
        raise UserError(f"trainer.devices is {text}: give --devices_per_node, or a number as --trainer.devices.")
    return count


def optimizer_state(make_optimizer: Any) -> float:
    """Return the float32 numbers of optimizer state per parameter, measured by one step on a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    state = stepped(make_optimizer, [weight]).state[weight].values()
    return round(sum(value.nbytes for value in state if isinstance(value, torch.Tensor)) / weight.nbytes, 2)
