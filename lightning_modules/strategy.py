"""The strategy for large models: FSDP2 over all ranks or within replicas (HSDP), and tensor parallelism."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from app.core.errors import UserError
from app.method.ranges import NonNegativeInt, PositiveInt, UpToInfinity, checked
from lightning_modules.checkpoint import unwritable
from lightning_modules.private import default_pg_timeout
from lightning_modules.scorer import ResponseScorer
from lightning_modules.sharded_loading import read_weights, weight_files
from lightning_modules.sharding import SUMMED, split_layers, transformer_blocks


@checked
class ShardedStrategy(ModelParallelStrategy):
    """An FSDP2 strategy that shards weights, gradients, optimizer state and the frozen reference over the ranks.

    The device mesh follows from the number of ranks. Weights, reduced gradients and optimizer state are always
    float32; use `trainer.precision: 32-true`. Checkpoints are folders to which every rank writes its part
    (torch.distributed.checkpoint).

    Args:
        replicas: copies of the model. 1 is FSDP2 over all ranks; `nodes` or a larger number is HSDP: each copy is
            sharded over neighbouring ranks, and gradients are averaged over the copies.
        compute_dtype: dtype of the gathered weights, of forward and backward pass, and of the stored reference;
            `auto` is bfloat16 on CUDA and float32 elsewhere.
        reshard_after_forward: free a block's gathered weights after its forward pass and gather them again for
            the backward pass; false saves communication but needs memory for the whole gathered model.
        prefetch_blocks: number of blocks gathered ahead of the running one; 0 leaves the choice to FSDP2.
        offload_reference: keep the shards of the reference in the host's memory and copy them for each use.
        accumulate_whole_gradients: exchange gradients only on the last micro-batch of a step; until then every
            rank holds the float32 gradient of the whole model. Replicas always exchange theirs only on the last
            micro-batch.
        meta_init_above: no rank ever holds the whole of a model with more parameters: each rank reads its shards
            from the safetensors files. DoRA, PiSSA and OLoRA start from the base's weights: with them, every rank
            loads the whole model first.
        tensor_parallel_size: number of neighbouring ranks that split every layer of a block, by the model's plan
            in transformers, and work on the same pairs. Each has the whole embeddings and head.
        process_group_backend: backend of torch.distributed; None is NCCL on CUDA and gloo on CPUs.
        timeout: the run ends if a rank does not join a collective within this time.
    """

    _sharding_mesh: DeviceMesh
    _tensor_mesh: DeviceMesh

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
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
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
        """Return the compute dtype; `auto` depends on the device."""
        if self.requested_dtype == "auto":
            return torch.bfloat16 if self.root_device.type == "cuda" else torch.float32
        return getattr(torch, self.requested_dtype)

    def shards(self, nodes: int, ranks: int) -> int:
        """Return the number of shards per copy of the model; `tensor_parallel_size` ranks share a shard.

        Raises UserError if that does not divide the ranks, or the copies are not of equal size.
        """
        replicas, split = nodes if self.replicas == "nodes" else self.replicas, self.tensor_parallel_size
        if ranks % split:
            raise UserError(f"trainer.strategy: tensor_parallel_size {split} does not divide the {ranks} ranks.")
        if ranks // split % replicas:
            groups = f"{ranks // split} groups of {split} ranks" if split > 1 else f"{ranks} ranks"
            raise UserError(f"trainer.strategy: {groups} do not make {replicas} replicas of equal size.")
        return ranks // split // replicas

    def setup_environment(self) -> None:
        """Set up the processes and their device mesh. Raises UserError like `shards`."""
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
        """Write the shards beside the folder `filepath` and rename, so that a full disk leaves no partial folder.

        Raises UserError if the shards cannot be written.
        """
        path = Path(self.broadcast(filepath))
        part = path.with_name(f".{path.name}.shards.part")
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
        self.barrier("shards of before")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
        except (OSError, RuntimeError, CheckpointException) as error:  # CheckpointException is no Exception
            if self.is_global_zero:
                shutil.rmtree(part, ignore_errors=True)
            raise unwritable(path) from error
        self.barrier("shards written")
        if self.is_global_zero:
            shutil.rmtree(path, ignore_errors=True)  # a checkpoint of the same step, which was repeated
            os.replace(part, path)
        self.barrier("shards in place")

    def place(self, scorer: ResponseScorer, frozen: bool) -> None:
        """Shard `scorer` in place by FSDP2: a group per transformer block; the rest, tied weights too, in the root.

        Frozen weights are stored in `compute_dtype`; weights that were left out at loading are read now. Raises
        UserError if that fails, or if the model cannot be split over `tensor_parallel_size` ranks.
        """
        for parameter in scorer.parameters():  # not buffers: rotary positions need float32
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.compute_dtype)
        if self.tensor_parallel_size > 1:
            plan = split_layers(scorer.model, self._tensor_mesh)
            if self.accumulate_whole_gradients and SUMMED in plan.values():
                # transformers would sum these gradients of earlier micro-batches again in every backward pass
                clash = f"with tensor_parallel_size above 1 for {scorer.model.config.model_type} models"
                raise UserError(f"trainer.strategy: set accumulate_whole_gradients to false {clash}.")
        options: dict[str, Any] = {
            "mesh": self._sharding_mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32),
        }
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
