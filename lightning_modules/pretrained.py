"""Loading a causal language model, from a folder or the Hub, or building one at random from a description."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from app.errors import UserError

log = logging.getLogger(__name__)


def load_config(name: str | None, architecture: dict[str, Any] | None, trust_remote_code: bool) -> Any:
    """The Hugging Face configuration, with every dropout set to zero.

    Dropout would make the policy differ from the reference at step 0 and the two passes of a step from each
    other. Raises UserError unless exactly one of `name` and `architecture` is given, or if it cannot be read.
    """
    if (name is None) == (architecture is None):
        raise UserError(
            "Give either model.name (a folder or Hub id with weights) or model.architecture "
            "(a description of a new random model), not both and not neither."
        )
    if architecture is not None:
        settings = dict(architecture)
        try:
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        except KeyError as error:
            raise UserError(
                "model.architecture needs a field model_type that transformers knows, for example llama."
            ) from error
    else:
        assert name is not None
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.name: no model at {name!r} (give a folder that holds config.json and weights, "
                f"or a Hub id that this machine can reach): {_reason(error)}"
            ) from error
    for field, value in config.to_dict().items():
        if ("dropout" in field or field.endswith("pdrop")) and isinstance(value, float) and value > 0:
            log.info("dropout is off during preference training: %s %s → 0", field, value)
            setattr(config, field, 0.0)
    return config


def load_model(
    name: str | None,
    architecture: dict[str, Any] | None = None,
    *,
    attention: str | None = None,
    trust_remote_code: bool = False,
    meta_above: float = math.inf,
) -> Any:
    """A float32 `transformers` causal language model.

    From `architecture` the weights are random, drawn from the global generator (Lightning seeds it).
    `attention` None leaves the choice to transformers. A model that has a `name` and more than `meta_above`
    parameters comes without weights: its parameters are on the meta device, for `read_weights` to fill.
    `base_dtype` of the model is the type that its configuration names, None where it names none.
    Raises UserError when the model cannot be found or read.
    """
    config = load_config(name, architecture, trust_remote_code)
    base_dtype = config.dtype
    options = {"attn_implementation": attention, "dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if name is None:
        model = AutoModelForCausalLM.from_config(config, **options)
    elif math.isfinite(meta_above) and parameter_count(bare := bare_model(config, **options)) > meta_above:
        model = bare
        with suppress(OSError):  # many models have none
            model.generation_config = GenerationConfig.from_pretrained(name)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(name, config=config, **options)
        except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
            raise UserError(f"model.name: cannot load {name!r}: {_reason(error)}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.base_dtype = base_dtype
    return model


def bare_model(config: Any, **options: Any) -> Any:
    """The model of `config` with parameters on the meta device and buffers, such as rotary frequencies, real.

    The model's own constructor computes the buffers: those that no checkpoint holds are right.
    """
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, **options)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within the block, every parameter that a module registers keeps its shape and type and loses its memory."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # as it is: tied weights stay one parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of linear layers that no embedding shares: what autocast rounds before each use."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {id(module.weight): module.weight for module in model.modules() if type(module) is nn.Linear}
    return [weight for key, weight in weights.items() if key not in embeddings]


def store_linear_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the linear weights of a frozen `model` in the `dtype` of its autocast, in place.

    Autocast would round them to it at every forward pass: the outputs are the same, to the bit. Biases, norms and
    embeddings stay as they are, because some families use them outside of products.
    """
    for weight in linear_weights(model):
        weight.data = weight.data.to(dtype)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is run only with model.trust_remote_code: true."
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop_at(model: nn.Module, ends: Sequence[int]) -> None:
    """Have a model stop at the ids that its trained responses end with, before those that it stopped at.

    They are saved with the policy, so that whatever serves an export stops at the end of turn, too.
    """
    generation: Any = model.generation_config
    given = generation.eos_token_id
    known = given if isinstance(given, list) else [] if given is None else [given]
    stops = list(dict.fromkeys([*ends, *known]))
    generation.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
