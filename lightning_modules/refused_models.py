"""Refusals of models that cannot be trained, or do not fit the data, each with the remedy."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoTokenizer

from app.core.errors import UserError
from app.core.files import refuse_absent, refuse_pointers
from lightning_modules.sharded_loading import few

log = logging.getLogger(__name__)

# the files that identify the kind of a folder, the most telling first
CHECKPOINTS = ("last.ckpt", "checkpoints/last.ckpt", "*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")
TABLES = r"\b(wpe|embed_positions|position_embeddings|pos_emb\w*)(\.weight)?$"  # of positions
SOURCES = ("adapter_config.json", "config.json", *CHECKPOINTS, "*.gguf", "*/config.json", "snapshots/*/config.json")


def refuse_path(name: str) -> None:
    """Raise UserError if `name` is a path but no model folder, and name the remedy."""
    refuse_absent("model.name", "model", name)
    path = Path(name)
    if not path.exists():
        return  # a Hub id
    inside = (file for pattern in SOURCES for file in sorted(path.glob(pattern)))
    found = path if path.is_file() or path.suffix == ".ckpt" else next(inside, path)
    if found != path / "config.json":
        merge = f"AutoPeftModelForCausalLM.from_pretrained('{name}').merge_and_unload().save_pretrained('MERGED')"
        cures = {
            "adapter_config.json": "it holds adapters alone: merge them into their model first, python -c "
            f'"from peft import AutoPeftModelForCausalLM; {merge}", and copy the tokenizer\'s files there.',
            "config.json": f"did you mean {found.parent}?",
            ".ckpt": f"run `beta-dpo export {found} FOLDER` and give that FOLDER.",
            ".gguf": f"run `beta-dpo convert {found} FOLDER` and give that FOLDER.",
        }
        cure = cures.get(found.name) or cures.get(found.suffix, "give the folder of one, as transformers saves it.")
        raise UserError(f"model.name: {name!r} is no model, a folder with config.json and weights: {cure}")
    refuse_pointers(*path.iterdir())
    file = path / "generation_config.json"  # transformers would leave out a bad one, stop ids and all
    try:
        ends = json.loads(file.read_bytes()).get("eos_token_id") if file.exists() else None
        if not all(one is None or isinstance(one, int) for one in (ends if isinstance(ends, list) else [ends])):
            raise ValueError(f"its eos_token_id is {ends!r}")
    except (ValueError, AttributeError) as error:
        raise UserError(f"model.name: {file} is no generation config ({error}): correct or remove it.") from error


def refuse_config(config: Any, name: str) -> None:
    """Raise UserError for a model whose configuration shows that it cannot be trained here."""
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        cure = "which cannot be trained: take the model that they were made from"
        raise UserError(f"model.name: {name} holds quantised weights ({method}), {cure}.")
    if getattr(config, "is_encoder_decoder", False):
        cure = "whose tokens attend to later ones: take a causal model (decoder only)"
        raise UserError(f"model.name: {name} is a {config.model_type}, {cure}.")


def refuse_missing(name: str, found: dict[str, Any]) -> None:
    """Raise UserError for absent or misshapen weights, which would be random; warn of those without a place."""
    shapes = ((key, list(stored), list(own)) for key, stored, own in found["mismatched_keys"])
    other = [f"{key} ({stored} in the files, not {own})" for key, stored, own in shapes]
    lacking, more = sorted([*other, *found["missing_keys"]]), sorted(found["unexpected_keys"])
    if lacking:
        instead = f" (they hold {few(more)} instead)" if more else ""
        said = f"the files of {name!r} lack {few(lacking)}{instead}, which would be random"
        raise UserError(f"model.name: {said}: take a complete model, with its own config.json.")
    if more:
        log.warning("model.name: the files of %r hold %s, for which the model has no place", name, few(more))


def refuse_beyond(model: Any, longest: int, largest_id: int, tokenizer: str, length: str) -> None:
    """Raise UserError that blames the option `tokenizer` or `length` if ids or rows exceed the model's tables."""
    known = model.get_input_embeddings().num_embeddings
    if largest_id >= known:
        cure = "take the tokenizer of this model, or a larger model.architecture.vocab_size"
        raise UserError(f"{tokenizer}: its token {largest_id} is beyond the {known} that the model embeds: {cure}.")
    table = learned_positions(model)
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    said = f"the longest prompt with its response has {longest} tokens, and this {model.config.model_type}"
    if table is not None and longest > table:
        raise UserError(f"{length}: {said} has no more than {table} positions: lower it to {table}.")
    if table is None and isinstance(trained, int) and longest > trained:
        log.warning("%s was trained on %d (max_position_embeddings): lower %s", said, trained, length)


def learned_positions(model: Any) -> int | None:
    """Return the length of a model's table of positions; None if it has none."""
    if model.config.model_type == "mpt":  # its attention biases have this length
        return int(model.config.max_seq_len)
    decoder = model.get_decoder()  # a vision tower has positions of its own
    named, tensors = re.compile(TABLES), (*decoder.named_parameters(), *decoder.named_buffers())
    tables = [len(table) for name, table in tensors if named.search(name)]
    # OPT's table has two extra rows
    return int(min(*tables, getattr(model.config, "max_position_embeddings", math.inf))) if tables else None


def check_tokens(
    name: str,
    ours: Any,
    trust: bool,
    refuse: bool = True,
    option: str = "model.name",
    tokenizer: str = "data.tokenizer",
) -> None:
    """Raise UserError, or warn, if the tokenizer of the model `name` has other tokens at the numbers of `ours`."""
    if ours.name_or_path == name:
        return
    try:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    except Exception:  # weights without a tokenizer may raise anything
        log.warning("%r holds no tokenizer: its tokens are taken to be those of %s", name, tokenizer)
        return
    known = {number: token for token, number in theirs.get_vocab().items()}
    other = sorted(token for token, number in ours.get_vocab().items() if known.get(number, token) != token)
    said = f"{option}: {name!r} has other tokens than {tokenizer} ({few(other)}; {len(other)} of {len(ours)})"
    if other and refuse:
        raise UserError(f"{said}: take a model with the same.")
    if other:  # new names may be meant
        rank_zero_warn(f"{said}, which it was not trained with: check {tokenizer}.")
