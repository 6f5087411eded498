"""FSDP2 and tensor parallelism of a scorer, gradient exchange between ranks, and clipping across meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from app.core.errors import UserError
from lightning_modules.private import apply_tensor_parallelism, replace_layer_number_by_wildcard

# transformers' style of splitting a linear layer → the dimension of the weight that it splits
_SPLIT = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}
LOCAL = ("colwise", "rowwise")  # styles between which a rank holds only its part of the activations
SUMMED = "replicated_with_grad_allreduce"  # whole weights applied only to this rank's heads (Qwen 3's norms)


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's list of layers, which is the `ModuleList` with the most parameters.

    Raises UserError if the model has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError("trainer.strategy: this model has no list of layers to shard by; use ddp or one device.")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def gather_root(scorer: nn.Module) -> None:
    """Gather the FSDP2 root group (embeddings, head) for use outside `forward`, until `leave_gathered`."""
    if isinstance(scorer, FSDPModule):
        scorer.unshard()


def leave_gathered(scorer: nn.Module) -> None:
    """Free gathered weights, which FSDP2 keeps after a forward pass without a backward pass, before an update.

    Until then `parameters()` returns them instead of the shards, which alone have gradients and change.
    """
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
    accumulates = isinstance(strategy.model, DistributedDataParallel) and not last
    with strategy.model.no_sync() if accumulates else nullcontext():
        yield


def keeps_gradients(strategy: Any) -> bool:
    """Return whether FSDP2 keeps gradients between micro-batches in buffers that `zero_grad` cannot reach."""
    return getattr(strategy, "accumulate_whole_gradients", False) or getattr(strategy, "replicas", 1) != 1


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clip the norm of all gradients to `max_norm` and return the norm before; the host waits for the device.

    torch's `clip_grad_norm_` also multiplies smaller gradients, by one, and refuses parameters on several meshes,
    which tensor parallelism has for split and whole ones.
    """
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
    """Return for modules of transformer blocks how `size` ranks split them, by the model's own plan (`tp_plan`).

    Every rank has all other modules (embeddings, final norm, head) whole. Raises UserError if the model has no plan
    or one that splits other than linear layers, or if `size` does not divide the heads or a layer's width.
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
    """Split the layers of `split_plan` over the ranks of a one-dimensional `mesh` in place, and return the plan.

    The hooks of transformers communicate: one all-reduce after attention and one after the MLP in the forward pass,
    and the same for the inputs' gradients in the backward pass (Megatron, arXiv 1909.08053 §3).
    """
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
