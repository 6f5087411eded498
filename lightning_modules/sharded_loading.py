"""Safetensors files: refusal of values that cannot be trained, and filling a sharded model part by part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from app.core.errors import UserError, refused
from lightning_modules.private import (
    WeightConverter,
    WeightRenaming,
    compute_local_shape_and_global_offset,
    dtensor_like,
    get_model_conversion_mapping,
    rename_source_key,
)

log = logging.getLogger(__name__)

FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes in safetensors' spelling


def weight_files(name: str) -> dict[str, Path]:
    """Return the safetensors file of each tensor of a folder or Hub id. Raises UserError without any."""
    folder = Path(name)
    if not folder.is_dir():
        with refused(f"model.name: the weights of {name!r} cannot be fetched from the Hub"):
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with refused(f"model.name: {path} is damaged"), safe_open(path, "pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        cure = "convert it by save_pretrained, or raise trainer.strategy's meta_init_above"
        raise UserError(f"model.name: {name!r} has no safetensors files to read shards from: {cure}.")
    return files


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_values(name: str, model: nn.Module) -> None:
    """Raise UserError if weights are not finite, or if the files of the folder `name` hold them as codes."""
    state = {key: tensor for key, tensor in model.named_parameters() if tensor.is_floating_point()}
    tables = embedding_tables(model)
    for key, tensor in state.items():
        refuse_nonfinite(name, key, tensor.data, id(tensor) in tables)
    for path in sorted(Path(name).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in state.keys() & set(file.keys()):  # transformers would convert codes without their scales
                refuse_codes(path, key, file.get_slice(key).get_dtype())


def embedding_tables(model: nn.Module) -> set[int]:
    """Return the identities of the weights that embed tokens or positions."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def refuse_nonfinite(source: str, name: str, values: Tensor, embeds: bool) -> None:
    """Raise UserError if `values` are not finite; warn if they embed tokens, which may be unused."""
    bad = ~values.isfinite()
    if not bad.any():
        return
    if not embeds:
        cure = "take a sound copy, or an earlier checkpoint of the run that made it"
        raise UserError(f"model.name: {name} of {source!r} is not finite (NaN or infinite): {cure}.")
    said = f"tokens that {name} of {source!r} embeds are not finite (NaN or infinite)"
    log.warning("model.name: %d of the %s: pairs with them will be left out", int(bad.any(-1).sum()), said)


def refuse_codes(path: Path, tensor: str, dtype: str) -> None:
    if dtype not in FLOATS:
        cure = "which cannot be trained: take the model that they were made from"
        raise UserError(f"model.name: {path} holds quantised weights ({tensor} is {dtype}), {cure}.")


def read_weights(model: Any, files: dict[str, Path], device: torch.device | str = "cpu") -> None:
    """Fill the parameters on the meta device, sharded or not, in place, with their dtype, on `device`.

    This rank never holds more than its shards and its part of one more tensor. Raises UserError if a tensor is
    missing or has another shape.
    """
    whole = model.state_dict(keep_vars=True)
    real = {name for name, weight in model.named_parameters() if not weight.is_meta}
    state = {name.replace("base_layer.", ""): tensor for name, tensor in whole.items() if name not in real}
    sources: dict[int, str] = {}  # by the identity of the parameter: tied ones are read once and stay tied
    for name, source in _stored_names(model, state, files).items():
        first = sources.setdefault(id(state[name]), source)
        if first != source and not torch.equal(*(safe_open(files[n], "pt").get_tensor(n) for n in (first, source))):
            said = f"the files hold other values for {source} than for {first}, and config.json ties them"
            raise UserError(f"model.name: {said}: set its tie_word_embeddings to false.")
    read: dict[int, Tensor] = {}
    tables = embedding_tables(model)
    for name, tensor in state.items():
        if id(tensor) not in sources:
            cure = "save the model once more by from_pretrained and save_pretrained, or raise meta_init_above"
            said = f"the files hold no tensor {name}, or one that must be computed from others"
            raise UserError(f"model.name: {said}: {cure}.")
        if id(tensor) not in read:
            source = sources[id(tensor)]
            read[id(tensor)] = _read(files[source], source, tensor, device, id(tensor) in tables)
    model.load_state_dict({name: read.get(id(tensor), tensor) for name, tensor in whole.items()}, assign=True)


def _stored_names(model: Any, state: dict[str, Tensor], files: dict[str, Path]) -> dict[str, str]:
    """Return the name in the files for each name of `state`, by transformers' table of earlier names."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    given = renamings, converters, model.base_model_prefix, state
    found = {stored: rename_source_key(stored, *given) for stored in files}
    names = {name: stored for stored, (name, conversion) in found.items() if conversion is None}
    return {name: names[name] for name in state if name in names}


def _read(path: Path, name: str, like: Tensor, device: torch.device | str, embeds: bool) -> Tensor:
    """Return this rank's part of a stored tensor, with the layout and dtype of `like`."""
    shape, start = tuple(like.shape), (0,) * like.ndim
    if isinstance(like, DTensor):
        shape, start = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    # the file is opened for each tensor, because closing it frees the mapped pages
    with safe_open(path, "pt") as file:
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != tuple(like.shape):
            shapes = f"has shape {stored.get_shape()}, but config.json asks for {list(like.shape)}"
            raise UserError(f"model.name: tensor {name} in {path} {shapes}.")
        if like.is_floating_point():
            refuse_codes(path, name, stored.get_dtype())
        part = stored[tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))]
        local = part.to(device, like.dtype, copy=True)
    refuse_nonfinite(str(path), name, local, embeds)
    local = dtensor_like(local, like) if isinstance(like, DTensor) else local
    return nn.Parameter(local, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else local
