"""`beta-dpo export`: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from app.errors import UserError
from app.files import atomic_folder
from app.model_card import model_card
from lightning_modules.checkpoint import read_for_export
from lightning_modules.lora import Lora
from lightning_modules.pretrained import bare_model

POLICY_PREFIX = "policy.model."


def export(checkpoint: str, out: str, adapter: bool = False) -> None:
    """Write the policy of CHECKPOINT to the folder OUT: safetensors, tokenizer, generation config, model card.

    Args:
        checkpoint: a file, or a folder of shards, written by `beta-dpo fit`.
        out: the folder to create; it appears only when complete.
        adapter: of a run with model.lora, write the adapter alone, for `peft`; else it is merged into the weights.
    """
    if Path(out).exists():
        raise UserError(f"{out} exists already: choose another folder, or remove it first.")
    state = read_for_export(Path(checkpoint))
    lora = state.get("lora")
    if adapter and (lora is None or lora["base"] is None):
        raise UserError(f"--adapter: {checkpoint} was not trained with model.lora on a model with a name.")
    model = policy_model(state, lora, merge=not adapter)
    with atomic_folder(out) as folder:
        for name, text in tokenizer_files(state, checkpoint).items():
            (folder / name).write_text(text, encoding="utf-8")
        if adapter:
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            settings = json.loads(state.get("generation_config", "{}"))
            model.generation_config = generation_config(settings, tokenizer)
            model.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(state, checkpoint), encoding="utf-8")
    print(f"exported {checkpoint} to {out}")


def policy_model(state: dict[str, Any], lora: dict[str, Any] | None, merge: bool) -> Any:
    """The policy of a checkpoint; one with adapters as a `PeftModel`, or with them merged into its weights."""
    settings = json.loads(state["model_config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    weights = policy_weights(state)
    model = bare_model(config, dtype=torch.float32)
    if lora is not None:
        from peft import get_peft_model

        settings = dict(lora)
        base = settings.pop("base")
        model = get_peft_model(model, Lora(**settings).peft_config(base))
        weights = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    if lora is None:
        model.tie_weights()
        return model
    model.get_base_model().tie_weights()
    return model.merge_and_unload() if merge else model


def generation_config(settings: dict[str, Any], tokenizer: Any) -> GenerationConfig:
    """The start model's, with the tokenizer's special tokens: training ends every response with its EOS.

    Further tokens at which the start model stops stay (chat models have several).
    """
    given = settings.get("eos_token_id")
    stops = dict.fromkeys([tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])])
    ends = [token for token in stops if token is not None]
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = GenerationConfig(**settings | tokens)
    try:
        config.validate(strict=True)
    except ValueError:  # published ones often set a temperature but no sampling, which transformers does not save
        config.do_sample = True
    return config


def policy_weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The policy's parameters under the names that transformers gives them."""
    return {
        name.removeprefix(POLICY_PREFIX): tensor
        for name, tensor in state["state_dict"].items()
        if name.startswith(POLICY_PREFIX)
    }


def tokenizer_files(state: dict[str, Any], checkpoint: str) -> dict[str, str]:
    """File name → text, as the data module put them in the checkpoint (under its class name).

    Raises UserError when there are none, or when one is no plain name: it would be written outside the folder.
    """
    files = next((part["tokenizer_files"] for part in state.values() if "tokenizer_files" in _keys(part)), None)
    if files is None or any(Path(name).name != name for name in files):
        raise UserError(f"{checkpoint} was not written by beta-dpo: it holds no tokenizer, or a damaged one.")
    return files


def _keys(part: object) -> tuple[str, ...]:
    return tuple(part) if isinstance(part, dict) else ()
