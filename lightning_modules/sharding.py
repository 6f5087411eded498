"""FSDP2 sharding of a scorer, gradient exchange between ranks, and gradient clipping across meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.core.errors import UserError


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's list of layers, which is the `ModuleList` with the most parameters.

    Raises UserError if the model has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError("trainer.strategy: this model has no list of layers to shard by; use ddp or one device.")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def shard(
    scorer: nn.Module,
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
    reshard_after_forward: bool = True,
    reshard_root: bool = False,
    prefetch_blocks: int = 0,
    offload: OffloadPolicy | None = None,
) -> None:
    """Apply FSDP2 in place: one group per transformer block, the rest (embeddings, head) in the root group.

    `mesh` has one dimension, or two: replicas, then shards. While a block runs, the next `prefetch_blocks` blocks
    are gathered. Tied embeddings stay one tensor because both their modules are in the root group.
    """
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload or OffloadPolicy()}
    blocks = [
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        for block in transformer_blocks(scorer)
    ]
    fully_shard(scorer, reshard_after_forward=True if reshard_root else None, **options)
    for number, block in enumerate(blocks if prefetch_blocks else []):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + prefetch_blocks])
        block.set_modules_to_backward_prefetch(blocks[max(0, number - prefetch_blocks) : number][::-1])


def gather_root(scorer: nn.Module) -> None:
    """Gather the FSDP2 root group (embeddings, head), for use outside `forward`; do nothing without FSDP2.

    After a forward pass FSDP2 keeps it gathered anyway; the next backward pass or optimizer step reshards it.
    """
    if isinstance(scorer, FSDPModule):
        scorer.unshard()


@contextmanager
def gradient_sync(strategy: Any, policy: nn.Module, last: bool) -> Iterator[None]:
    """Reduce gradients across ranks within the block only for the `last` micro-batch, except as follows.

    FSDP2 reduces those of earlier micro-batches to shards as well, because whole gradients would cost the memory
    that sharding saves; `accumulate_whole_gradients` of the strategy turns this off. Replicas of a sharded model
    exchange theirs only for the last micro-batch.
    """
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(last or not strategy.accumulate_whole_gradients)
        policy.set_requires_all_reduce(last)
        yield
    elif isinstance(strategy.model, DistributedDataParallel) and not last:
        with strategy.model.no_sync():
            yield
    else:
        yield


def keeps_gradients(strategy: Any) -> bool:
    """Return whether FSDP2 keeps gradients between micro-batches in buffers that `zero_grad` cannot reach."""
    return getattr(strategy, "accumulate_whole_gradients", False) or getattr(strategy, "replicas", 1) != 1


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clip the norm of all gradients to `max_norm` and return the norm before; the host waits for the device.

    Gradients of a smaller norm are not touched, while torch multiplies them by one. torch's `clip_grad_norm_`
    refuses parameters on several meshes, and under tensor parallelism split and whole parameters are on different
    meshes.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups.values()]
    total = get_total_norm([_whole(norm) for norm in norms])
    norm = float(total)
    if norm + 1e-6 > max_norm:  # torch's own margin
        for group in groups.values():
            clip_grads_with_norm_(group, max_norm, total)
    return norm


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
