"""FSDP2 over all ranks or within replicas (HSDP), and tensor parallelism: the strategy and its parts."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.core.errors import UserError
from app.method.ranges import NonNegativeInt, PositiveInt, UpToInfinity, checked
from lightning_modules.checkpoint import unwritable
from lightning_modules.private import apply_tensor_parallelism, default_pg_timeout, replace_layer_number_by_wildcard
from lightning_modules.sharded_loading import read_weights, weight_files

# transformers' style of splitting a linear layer → the dimension of the weight that it splits
_SPLIT = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}
LOCAL = ("colwise", "rowwise")  # styles between which a rank holds only its part of the activations
SUMMED = "replicated_with_grad_allreduce"  # whole weights applied only to this rank's heads (Qwen 3's norms)


@checked
class ShardedStrategy(ModelParallelStrategy):
    """An FSDP2 strategy that shards weights, gradients, optimizer state and the frozen reference over the ranks.

    Weights, reduced gradients and optimizer state are float32; use `trainer.precision: 32-true`. Checkpoints are
    folders to which every rank writes its part (torch.distributed.checkpoint).

    Args:
        replicas: copies of the model. 1 is FSDP2 over all ranks; `nodes` or a larger number is HSDP: each copy is
            sharded over neighbouring ranks, and gradients are averaged over the copies.
        compute_dtype: dtype of the gathered weights, of forward and backward pass, and of the stored reference;
            `auto` is bfloat16 on CUDA and float32 elsewhere.
        reshard_after_forward: free a block's gathered weights after its forward pass and gather them again for
            the backward pass; false saves communication but needs memory for the whole gathered model.
        prefetch_blocks: number of blocks gathered ahead of the running one; 0 leaves the choice to FSDP2.
        offload_reference: keep the shards of the reference in the host's memory and copy them for each use.
        accumulate_whole_gradients: exchange gradients only on the last micro-batch of a step, as replicas always
            do; until then every rank holds the float32 gradient of the whole model.
        meta_init_above: ranks read only their shards of a model with more parameters from the safetensors files,
            but the whole model with DoRA, PiSSA and OLoRA, which start from the base's weights.
        tensor_parallel_size: number of neighbouring ranks that split every layer of a block, by the model's plan
            in transformers, and work on the same pairs. Each has the whole embeddings and head.
        process_group_backend: backend of torch.distributed; None is NCCL on CUDA and gloo on CPUs.
        timeout: the run ends if a rank does not join a collective within this time.
    """

    def __init__(
        self,
        replicas: PositiveInt | Literal["nodes"] = 1,
        compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        reshard_after_forward: bool = True,
        prefetch_blocks: NonNegativeInt = 1,
        offload_reference: bool = False,
        accumulate_whole_gradients: bool = False,
        meta_init_above: UpToInfinity = 1e9,
        tensor_parallel_size: PositiveInt = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ):
        processes: dict[str, Any] = {"process_group_backend": process_group_backend, "timeout": timeout}
        super().__init__(tensor_parallel_size=tensor_parallel_size, **processes)
        self.tensor_parallel_size = tensor_parallel_size
        self.replicas = replicas
        self.requested_dtype = compute_dtype
        self.reshard_after_forward = reshard_after_forward
        self.prefetch_blocks = prefetch_blocks
        self.offload_reference = offload_reference
        self.accumulate_whole_gradients = accumulate_whole_gradients
        self.meta_init_above = meta_init_above

    @property
    def compute_dtype(self) -> torch.dtype:
        auto = "bfloat16" if self.root_device.type == "cuda" else "float32"
        return getattr(torch, auto if self.requested_dtype == "auto" else self.requested_dtype)

    def shards(self, nodes: int, ranks: int) -> int:
        """Return the shards per copy of the model. Raises UserError for copies of unequal size."""
        replicas, split = nodes if self.replicas == "nodes" else self.replicas, self.tensor_parallel_size
        if ranks % split:
            raise UserError(f"trainer.strategy: tensor_parallel_size {split} does not divide the {ranks} ranks.")
        if ranks // split % replicas:
            groups = f"{ranks // split} groups of {split} ranks" if split > 1 else f"{ranks} ranks"
            raise UserError(f"trainer.strategy: {groups} do not make {replicas} replicas of equal size.")
        return ranks // split // replicas

    def setup_environment(self) -> None:
        ranks, split = self.num_nodes * self.num_processes, self.tensor_parallel_size
        shards = self.shards(self.num_nodes, ranks)
        self._data_parallel_size = ranks // split
        super().setup_environment()
        if shards == self._data_parallel_size:
            mesh, shared = self.device_mesh, self.device_mesh["data_parallel"]
        else:  # neighbouring ranks share a replica, because they share a node
            shape, names = (ranks // split // shards, shards, split), ("replicate", "shard", "tensor_parallel")
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
            shared = mesh["replicate", "shard"]
        self._sharding_mesh, self._tensor_mesh = shared, mesh["tensor_parallel"]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the shards beside the folder `filepath`, and rename. Raises UserError if the disk is full."""
        path = Path(self.broadcast(filepath))
        part = path.with_name(f".{path.name}.shards.part")
        self.remove(part)
        self.barrier("shards of before")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
        except (OSError, RuntimeError, CheckpointException) as error:  # CheckpointException is no Exception
            self.remove(part)
            raise unwritable(path) from error
        self.barrier("shards written")
        self.remove(path)  # a checkpoint of the same step, which was repeated
        if self.is_global_zero:
            os.replace(part, path)
        self.barrier("shards in place")

    def remove(self, folder: Path) -> None:
        if self.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)

    def place(self, scorer: Any, frozen: bool) -> None:
        """Shard `scorer` in place by FSDP2: a group per block, the rest in the root. Read weights left out."""
        for parameter in scorer.parameters():  # not buffers: rotary positions need float32
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.compute_dtype)
        if self.tensor_parallel_size > 1:
            plan = split_layers(scorer.model, self._tensor_mesh)
            if self.accumulate_whole_gradients and SUMMED in plan.values():
                # transformers would sum these gradients of earlier micro-batches again in every backward pass
                clash = f"with tensor_parallel_size above 1 for {scorer.model.config.model_type} models"
                raise UserError(f"trainer.strategy: set accumulate_whole_gradients to false {clash}.")
        precision = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mesh": self._sharding_mesh, "mp_policy": precision}
        if offloaded := frozen and self.offload_reference:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        blocks: list[Any] = list(transformer_blocks(scorer))
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **options)
        # FSDP2 keeps the root (embeddings, head) gathered for the backward pass, but a frozen model has none
        fully_shard(scorer, reshard_after_forward=True if frozen else None, **options)
        ahead = self.prefetch_blocks
        for number, block in enumerate(blocks if ahead else []):
            block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(0, number - ahead) : number][::-1])
        if any(parameter.is_meta for parameter in scorer.parameters()):
            files = weight_files(scorer.model.name_or_path)
            read_weights(scorer.model, files, "cpu" if offloaded else self.root_device)


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's layers: the largest `ModuleList`. Raises UserError if there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError("trainer.strategy: this model has no list of layers to shard by; use ddp or one device.")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def leave_gathered(scorer: nn.Module) -> None:
    """Free gathered weights: `parameters()` would return them instead of the shards that an update changes."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gradient_sync(strategy: Any, policy: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients only for the `last` micro-batch; FSDP2 reduces all to shards by default."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(last or not strategy.accumulate_whole_gradients)
        policy.set_requires_all_reduce(last)
    accumulates = isinstance(strategy.model, DistributedDataParallel) and not last
    with strategy.model.no_sync() if accumulates else nullcontext():
        yield


def keeps_gradients(strategy: Any) -> bool:
    """Return whether FSDP2 keeps gradients between micro-batches in buffers that `zero_grad` cannot reach."""
    return getattr(strategy, "accumulate_whole_gradients", False) or getattr(strategy, "replicas", 1) != 1


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clip the norm of all gradients to `max_norm` and return the norm before; the host waits for the device."""
    # torch's `clip_grad_norm_` multiplies smaller ones by 1, and refuses the several meshes of tensor parallelism
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups.values()]
    total = get_total_norm([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])
    if (norm := float(total)) + 1e-6 > max_norm:  # torch's own margin
        for group in groups.values():
            clip_grads_with_norm_(group, max_norm, total)
    return norm


# --- tensor parallelism: the matrices of every block are split by the model's own plan -------------------------


def split_plan(model: Any, size: int) -> dict[str, str]:
    """Return how `size` ranks split the modules of transformer blocks, by the model's own plan (`tp_plan`).

    Raises UserError if there is none, if it splits other than linear layers, or if `size` does not divide them.
    """
    blocks, modules = transformer_blocks(model), dict(model.named_modules())
    inside = next(name for name, module in modules.items() if module is blocks) + "."
    rules = {name: style for name, style in model.tp_plan.items() if name.startswith(inside)}
    named = {name: replace_layer_number_by_wildcard(name) for name in modules}
    plan = {name: rules[rule] for name, rule in named.items() if rule in rules}
    linear = {n for n, style in plan.items() if style in _SPLIT and isinstance(modules[n], nn.Linear)}
    supported = linear | {name for name, style in plan.items() if style == SUMMED}
    others = (rules.keys() - {named[name] for name in plan}) | {named[name] for name in plan.keys() - supported}
    kind, cure = model.config.model_type, "set tensor_parallel_size to 1 and shard over more ranks instead"
    if not plan:
        raise UserError(f"trainer.strategy: transformers has no tensor-parallel plan for {kind} models: {cure}.")
    if others:
        said = f"the tensor-parallel plan of {kind} models splits more than linear layers ({min(others)})"
        raise UserError(f"trainer.strategy: {said}: {cure}.")
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    sizes |= {named[name]: modules[name].weight.shape[_SPLIT[plan[name]]] for name in linear}
    for name, whole in sizes.items():
        if whole is not None and whole % size:
            said = f"tensor_parallel_size {size} does not divide this model's {name}, which is {whole}"
            raise UserError(f"trainer.strategy: {said}: choose a size that does.")
    return plan


def split_layers(model: Any, mesh: DeviceMesh) -> dict[str, str]:
    """Split the layers of `split_plan` over the ranks of a one-dimensional `mesh` in place, and return the plan."""
    # hooks of transformers all-reduce after attention and MLP in both passes (Megatron, arXiv 1909.08053, §3)
    plan = split_plan(model, mesh.size())
    modules = dict(model.named_modules())
    entries: dict[str, str] = {}
    for name, style in plan.items():  # parameters first: they must be split before their module is hooked
        entries |= {f"{name}.{own}": style for own, _ in modules[name].named_parameters(recurse=False)}
        entries[name] = style
    apply_tensor_parallelism(model, mesh, entries)
    return plan


def keep_local_part(model: Any, size: int, styles: Collection[str] = tuple(_SPLIT)) -> None:
    """Cut the layers of the plan with a style in `styles` to the first of `size` parts, in place."""
    for name, style in split_plan(model, size).items() if size > 1 else ():
        if style not in styles:
            continue
        module, dimension = model.get_submodule(name), _SPLIT[style]
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim > dimension:  # a layer split along its inputs keeps its whole bias
                part = parameter.detach().narrow(dimension, 0, parameter.shape[dimension] // size)
                setattr(module, own, nn.Parameter(part.clone()))
