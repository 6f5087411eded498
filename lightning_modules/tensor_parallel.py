"""Tensor parallelism, which splits the matrices of every block over a group of ranks by the model's own plan."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from app.core.errors import UserError
from lightning_modules.private import apply_tensor_parallelism, replace_layer_number_by_wildcard
from lightning_modules.sharding import transformer_blocks

# transformers' style of splitting a linear layer → the dimension of the weight that it splits
_SPLIT = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}
LOCAL = ("colwise", "rowwise")  # styles between which a rank holds only its part of the activations
SUMMED = "replicated_with_grad_allreduce"  # whole weights applied only to this rank's heads (Qwen 3's norms)


def split_plan(model: Any, size: int) -> dict[str, str]:
    """Return for modules of transformer blocks how `size` ranks split them, by the model's own plan (`tp_plan`).

    Modules outside the blocks (embeddings, final norm, head) are left out, so every rank has them whole. Raises
    UserError if the model has no plan, if the plan splits other than linear layers, or if `size` does not divide
    the number of heads or a layer's width.
    """
    blocks = transformer_blocks(model)
    inside = next(name for name, module in model.named_modules() if module is blocks) + "."
    rules = {name: style for name, style in model.tp_plan.items() if name.startswith(inside)}
    named = {name: replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
    plan = {name: rules[general] for name, general in named.items() if general in rules}
    kind = model.config.model_type
    if not plan:
        raise UserError(
            f"trainer.strategy: transformers has no tensor-parallel plan for {kind} models: set "
            "tensor_parallel_size to 1 and shard over more ranks instead."
        )
    modules = dict(model.named_modules())
    others = rules.keys() - {named[name] for name in plan}
    others |= {named[name] for name, style in plan.items() if not _understood(modules[name], style)}
    if others:
        raise UserError(
            f"trainer.strategy: the tensor-parallel plan of {kind} models splits more than linear layers "
            f"({min(others)}), which is not supported: set tensor_parallel_size to 1."
        )
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    sizes |= {named[n]: modules[n].weight.shape[_SPLIT[style]] for n, style in plan.items() if style in _SPLIT}
    for name, whole in sizes.items():
        if whole is not None and whole % size:
            raise UserError(
                f"trainer.strategy: tensor_parallel_size {size} does not divide this model's {name}, "
                f"which is {whole}: choose a size that does."
            )
    return plan


def split_layers(model: Any, mesh: DeviceMesh) -> dict[str, str]:
    """Split the layers of `split_plan` over the ranks of a one-dimensional `mesh` in place, and return the plan.

    Apply FSDP2 over the other mesh dimensions afterwards. The hooks of transformers communicate: one all-reduce
    after attention and one after the MLP in the forward pass, and the same for the inputs' gradients in the
    backward pass (Megatron, arXiv 1909.08053 §3).
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
        if style not in _SPLIT or style not in styles:
            continue
        module, dimension = model.get_submodule(name), _SPLIT[style]
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim > dimension:  # a layer split along its inputs keeps its whole bias
                part = parameter.detach().narrow(dimension, 0, parameter.shape[dimension] // size)
                setattr(module, own, nn.Parameter(part.clone()))


def _understood(module: nn.Module, style: str) -> bool:
    return isinstance(module, nn.Linear) if style in _SPLIT else style == SUMMED
