"""Loading a causal language model from a folder or the Hub, or building a random one from a description."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from app.core.errors import UserError
from lightning_modules.sharded_loading import embedding_tables, few, refuse_values

log = logging.getLogger(__name__)


def load_config(name: str | None, architecture: dict[str, Any] | None, trust_remote_code: bool) -> Any:
    """Return the Hugging Face configuration with every dropout set to zero.

    With dropout the policy would differ from the reference at step 0, and the two passes of a step from each
    other. Raises UserError unless exactly one of `name` and `architecture` is given and can be read.
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
        except Exception as error:  # inconsistent values may raise anything
            raise UserError(f"model.architecture: {_reason(error)}") from error
    else:
        assert name is not None
        refuse_path(name)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except Exception as error:  # a damaged config.json may raise anything
            raise UserError(
                f"model.name: no model at {name!r} (give a folder that holds config.json and weights, "
                f"or a Hub id that this machine can reach): {_reason(error)}"
            ) from error
    refuse_config(config, name or "model.architecture")
    for field, value in config.to_dict().items():
        if ("dropout" in field or field.endswith("pdrop")) and isinstance(value, float) and value > 0:
            log.info("dropout is off during preference training: %s %s → 0", field, value)
            setattr(config, field, 0.0)
    return config


def refuse_path(name: str) -> None:
    """Raise UserError if `name` is an existing path but no model folder, and name the remedy."""
    path = Path(name)
    if not path.exists():
        return  # a Hub id, or a path that does not exist
    found = path if path.suffix in (".ckpt", ".gguf") else next(_sources(path), None) if path.is_dir() else path
    if found is not None and found.name == "adapter_config.json":
        raise UserError(
            f'model.name: {name} holds adapters alone: merge them into their model first, python -c "from peft '
            f"import AutoPeftModelForCausalLM as M; M.from_pretrained('{name}').merge_and_unload()"
            ".save_pretrained('MERGED')\", and copy the tokenizer's files there."
        )
    if found is not None and found.suffix in (".ckpt", ".gguf"):
        command, kind = ("convert", "GGUF") if found.suffix == ".gguf" else ("export", "checkpoint")
        of = f"{found} is a {kind} file" if found == path else f"{name} holds no model, but the {kind} {found.name}"
        raise UserError(f"model.name: {of}: run `beta-dpo {command} {found} FOLDER` and give that FOLDER.")
    if path.is_file():
        raise UserError(f"model.name: {name} is a file: give the folder that holds config.json and weights.")
    if found is not None and found.parent != path:
        raise UserError(f"model.name: {name} has no config.json: did you mean {found.parent}?")
    if found is None:
        raise UserError(
            f"model.name: {name!r} has no config.json: give the folder of a model, as transformers saves it."
        )


def _sources(folder: Path) -> Iterator[Path]:
    """Yield the files that identify the kind of a folder, the most telling first."""
    for pattern in (
        "adapter_config.json",
        "config.json",
        "last.ckpt",
        "checkpoints/last.ckpt",
        "*.ckpt",
        "checkpoints/*.ckpt",
        "*/checkpoints/*.ckpt",
        "*.gguf",
        "*/config.json",
        "snapshots/*/config.json",
    ):
        yield from sorted(folder.glob(pattern))


def refuse_config(config: Any, name: str) -> None:
    """Raise UserError for a model whose configuration shows that it cannot be trained here."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise UserError(
            f"model.name: {name} holds quantised weights ({method}), which cannot be trained: take the model that "
            "they were made from."
        )
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model.name: {name} is a {config.model_type}, whose tokens see those after them: take a causal model "
            "(decoder only)."
        )


def load_model(
    name: str | None,
    architecture: dict[str, Any] | None = None,
    *,
    attention: str | None = None,
    trust_remote_code: bool = False,
    meta_above: float = math.inf,
) -> Any:
    """Return a float32 `transformers` causal language model.

    With `architecture` the weights are random, drawn from the global generator (Lightning seeds it). If `attention`
    is None, transformers chooses. A named model of more than `meta_above` parameters has its parameters on the meta
    device, and `read_weights` must fill them. The attribute `base_dtype` is the dtype in its configuration, or
    None. Raises UserError if the model cannot be found or read.
    """
    config = load_config(name, architecture, trust_remote_code)
    base_dtype = config.dtype
    options = {"attn_implementation": attention, "dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if name is None:
        try:
            model = AutoModelForCausalLM.from_config(config, **options)
        except Exception as error:  # inconsistent values again
            raise UserError(f"model.architecture: {_reason(error)}") from error
    elif math.isfinite(meta_above) and parameter_count(bare := bare_model(config, **options)) > meta_above:
        model = bare
        with suppress(OSError):  # many models have no generation config
            model.generation_config = GenerationConfig.from_pretrained(name)
    else:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:  # damaged files or another model's configuration may raise anything
            raise UserError(f"model.name: cannot load {name!r}: {_reason(error)}") from error
        model, found = loaded
        refuse_missing(name, found)
        refuse_values(name, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.base_dtype = base_dtype
    return model


def refuse_missing(name: str, found: dict[str, Any]) -> None:
    """Raise UserError for weights that the files lack or hold in another shape, because they would be random.

    Warns of stored weights that the model does not use.
    """
    other = sorted(
        f"{key} ({list(stored)} in the files, not {list(own)})" for key, stored, own in found["mismatched_keys"]
    )
    if other:
        raise UserError(
            f"model.name: config.json of {name!r} is of another model than the weights: {few(other)}; take both "
            "from one place."
        )
    missing, more = (sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys"))
    instead = f" (they hold {few(more)} instead)" if more else ""
    if missing:
        raise UserError(
            f"model.name: the files of {name!r} lack {few(missing)}{instead}, which would be random: take a "
            "complete model."
        )
    if more:
        log.warning("model.name: the files of %r hold %s, for which the model has no place", name, few(more))


def refuse_beyond(model: Any, longest: int, largest_id: int, tokenizer: str, length: str) -> None:
    """Raise UserError if `largest_id` or rows of `longest` tokens exceed the model's embedding tables.

    `tokenizer` and `length` name the options to blame. A model without a table of positions, trained on shorter
    rows, only causes a warning.
    """
    known = model.get_input_embeddings().num_embeddings
    if largest_id >= known:
        raise UserError(
            f"{tokenizer}: its token {largest_id} is beyond the {known} that the model embeds: take the tokenizer "
            "of this model, or a larger model.architecture.vocab_size."
        )
    table, trained = learned_positions(model), getattr(model.config, "max_position_embeddings", None)
    if table is not None and longest > table:
        raise UserError(
            f"{length}: the longest prompt with its response has {longest} tokens, and this "
            f"{model.config.model_type} has no more than {table} positions: lower it to {table}."
        )
    if table is None and isinstance(trained, int) and longest > trained:
        log.warning(
            "the longest prompt with its response has %d tokens, and the model was trained on %d "
            "(max_position_embeddings): lower %s",
            longest,
            trained,
            length,
        )


def learned_positions(model: Any) -> int | None:
    """Return the number of positions in a model's table of positions, or None if it has no table."""
    most = [getattr(model.config, "max_position_embeddings", math.inf)]
    if model.config.model_type == "mpt":  # its attention biases have this length
        return int(model.config.max_seq_len)
    tables = [
        len(table)
        for name, table in (*model.named_parameters(), *model.named_buffers())
        if re.search(r"\b(wpe|embed_positions|position_embeddings|pos_emb\w*)(\.weight)?$", name)
    ]
    return int(min(tables + most)) if tables else None  # OPT's table has two extra rows


def bare_model(config: Any, **options: Any) -> Any:
    """Return the model of `config` with parameters on the meta device and real buffers (rotary frequencies).

    The constructor computes the buffers, so those that no checkpoint holds are correct.
    """
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, **options)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every parameter that a module registers within the block on the meta device."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # unchanged, so that tied weights stay one parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of linear layers that no embedding shares; autocast rounds these before each use."""
    embeddings = embedding_tables(model)
    weights = {id(module.weight): module.weight for module in model.modules() if type(module) is nn.Linear}
    return [weight for key, weight in weights.items() if key not in embeddings]


def store_linear_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the linear weights of a frozen `model` to the autocast `dtype`, in place.

    Autocast would round them to it in every forward pass, so the outputs are the same bit for bit. Biases, norms
    and embeddings keep their dtype, because some families use them outside of matrix products.
    """
    for weight in linear_weights(model):
        weight.data = weight.data.to(dtype)


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is run only with model.trust_remote_code: true."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return text if " " in text else f"{type(error).__name__} {text}"


def stop_at(model: nn.Module, ends: Sequence[int]) -> None:
    """Put the ids `ends` of the trained responses' ends first among the model's stop ids.

    They are saved with the policy, so that a server of an exported model also stops at the end-of-turn token.
    """
    generation: Any = model.generation_config
    given = generation.eos_token_id
    known = given if isinstance(given, list) else [] if given is None else [given]
    stops = list(dict.fromkeys([*ends, *known]))
    generation.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
