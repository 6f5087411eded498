"""Loading a causal language model from a folder or the Hub, or building a random one from a description."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from app.core.errors import UserError, refused
from app.core.files import folder_hash
from lightning_modules.measuring import parameter_count
from lightning_modules.private import hub_commit, keep_packing
from lightning_modules.refused_models import refuse_config, refuse_missing, refuse_path
from lightning_modules.sharded_loading import embedding_tables, refuse_values

log = logging.getLogger(__name__)

# a word in an error of transformers or torch, which advise to run whatever code the files hold → the reason to give
REASONS = {
    "trust_remote_code": "it brings code of its own, which is run only with model.trust_remote_code: true.",
    "weights_only": "a .bin file is damaged, or holds more than weights: fetch it again, or take safetensors",
}
# what transformers accepts and cannot be trained: float16 overflows, integers round, other storage is for sharding
QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "bnb_4bit_quant_type": ("fp4", "nf4"),
    "bnb_4bit_compute_dtype": ("float32", "bfloat16"),
    "bnb_4bit_quant_storage": ("uint8",),
    "llm_int8_has_fp16_weight": (False,),
}


def load_config(name: str | None, architecture: dict[str, Any] | None, trust_remote_code: bool) -> Any:
    """Return the Hugging Face configuration of one of `name` and `architecture`, without dropout."""
    if (name is None) == (architecture is None):
        raise UserError("Give either model.name (a folder or Hub id) or model.architecture (of a random model).")
    if name is not None:
        refuse_path(name)
        cure = "give a folder that holds config.json and weights, or a Hub id that this machine can reach"
        with refused(f"model.name: no model at {name!r} ({cure})", REASONS):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    else:
        with refused("model.architecture (a model_type that transformers knows, such as llama, and its settings)"):
            if not (architecture or {}).get("model_type"):
                raise UserError("model_type is missing or empty")
            config = AutoConfig.for_model(**(architecture or {}))
    refuse_config(config, name or "model.architecture")
    # with dropout, policy and reference would differ, and the two passes of a step
    for part in filter(None, (config, *(getattr(config, name, None) for name in config.sub_configs))):
        for field, value in vars(part).items():
            if "drop" in field and isinstance(value, float) and value > 0:
                log.info("dropout is off during preference training: %s %s → 0", field, value)
                setattr(part, field, 0.0)
    return config


def load_model(
    name: str | None,
    architecture: dict[str, Any] | None = None,
    *,
    attention: str | None = None,
    trust_remote_code: bool = False,
    meta_above: float = math.inf,
    quantized: BitsAndBytesConfig | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Return a float32 `transformers` causal language model; a `quantized` one is on `device`.

    With `architecture` the weights are random, from the global generator. If `attention` is None, transformers
    chooses. A named model of more than `meta_above` parameters is on the meta device, until `read_weights`. The
    attribute `base_dtype` is the dtype in its configuration, or None. Raises UserError if it cannot be read.
    """
    config = load_config(name, architecture, trust_remote_code)
    base_dtype = config.dtype
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    options["trust_remote_code"] = trust_remote_code
    may_be_bare = name is not None and quantized is None and math.isfinite(meta_above)
    bare = bare_model(config, **options) if may_be_bare else None
    if name is None:
        with refused("model.architecture"):
            model = AutoModelForCausalLM.from_config(config, **options)
    elif bare is not None and parameter_count(bare) > meta_above:
        model = bare
        with suppress(OSError):  # many models have no generation config
            model.generation_config = GenerationConfig.from_pretrained(name)
    else:
        if quantized is not None:
            options |= {"quantization_config": quantized, "device_map": {"": device}}
            # it says at every product that 8 bits are multiplied in float16
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with refused(f"model.name: cannot load {name!r}", REASONS):
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
        model, found = loaded
        refuse_missing(name, found)
        for one in getattr(quantized, "llm_int8_skip_modules", None) or []:
            if not any(one in layer for layer, _ in model.named_modules()):
                raise UserError(f"model.quantize.llm_int8_skip_modules: {one} names no layer.")
        refuse_values(name, model)
        head, text = model.get_output_embeddings(), model.config.get_text_config()
        apart = head is not None and head.weight is not model.get_input_embeddings().weight
        # the files hold both, and so must those of the exported model
        if apart and getattr(text, "tie_word_embeddings", False):
            log.warning("model.name: the head in %r is not its embeddings, which its configuration ties", name)
            text.tie_word_embeddings = model.config.tie_word_embeddings = False
    if quantized is not None:
        keep_packing(model)
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:  # a view, which would keep the whole file in memory
                parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.base_dtype = base_dtype
    return model


def freeze_unread(model: Any) -> None:
    """Freeze the weights that no text reaches, such as a vision tower: DDP would wait for their gradients."""
    if model.config.get_text_config() is model.config:
        return
    parts = model.get_decoder(), model.get_output_embeddings()
    read = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    others = [weight.requires_grad_(False) for weight in model.parameters() if id(weight) not in read]
    if count := sum(map(torch.numel, others)):
        rank_zero_info(f"model.name: {count:,} parameters, which no text reaches, stay as they are")


def model_identity(name: str, config: Any) -> str | list[str | None]:
    """Return what tells a model from others: its folder's hash, or its Hub id and the commit in its `config`."""
    return folder_hash(name) if Path(name).is_dir() else [name, hub_commit(config)]


def quantization(settings: dict[str, Any] | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the `BitsAndBytesConfig` of `settings`, with products in `dtype`, or raise UserError."""
    if settings is None:
        return None
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise UserError("model.quantize needs more packages: pip install 'beta-dpo[quantize]'.")
    known = signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    unknown = sorted(settings.keys() - known)
    if unknown or not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        wrong = f"no {', '.join(unknown)} in" if unknown else "neither load_in_4bit nor load_in_8bit is true in"
        raise UserError(f"model.quantize: {wrong} the settings of BitsAndBytesConfig: {', '.join(sorted(known))}.")
    for name, fitting in QUANTIZATION.items():
        if settings.get(name) not in (None, *fitting):
            said = f"must be {' or '.join(map(str, fitting))}, not {settings[name]!r}"
            raise UserError(f"model.quantize.{name} {said}.")
    with refused("model.quantize"):
        return BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype, **settings})


def bare_model(config: Any, **options: Any) -> Any:
    """Return the model on the meta device, but with real buffers: no checkpoint holds rotary frequencies."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # unchanged, so that tied weights stay one
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    finally:
        hook.remove()


@contextmanager
def stand_ins_for_meta(model: nn.Module) -> Iterator[None]:
    """Put zeros without memory in place of parameters on the meta device, so that `peft` adds real adapters."""
    absent = [weight for weight in model.parameters() if weight.is_meta]
    pairs = [(weight, nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))) for weight in absent]
    for weight, zero in pairs:
        torch.utils.swap_tensors(weight, zero)
    yield
    for weight, zero in pairs:
        zero.requires_grad_(weight.requires_grad)
        torch.utils.swap_tensors(weight, zero)


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of linear layers that no embedding shares, which autocast rounds before each use."""
    embeddings = embedding_tables(model)
    weights = {id(module.weight): module.weight for module in model.modules() if type(module) is nn.Linear}
    return [weight for key, weight in weights.items() if key not in embeddings]


def store_linear_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the frozen linear weights of `model` to the autocast `dtype`, in place: outputs stay bit for bit."""
    # not biases, norms and embeddings, which some families use outside of matrix products
    for weight in linear_weights(model):
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def stop_at(model: nn.Module, ends: Sequence[int]) -> None:
    """Put the `ends` of trained responses first among the model's stop ids, for servers of an exported model."""
    generation: Any = model.generation_config
    given = generation.eos_token_id
    known = given if isinstance(given, list) else [] if given is None else [given]
    stops = list(dict.fromkeys([*ends, *known]))
    generation.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
