"""The files of an export besides its weights, as other programs read them: settings, chat template, model card."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from transformers import AutoTokenizer, GenerationConfig

from callbacks import arguments, entries
from datamodules.tokenisation import Tokenisation, stop_ids

Fields = dict[str, Any]
# the trainer settings that affect the training; the others concern places and logging
TRAINER_SETTINGS = ("max_epochs", "max_steps", "precision", "num_nodes", "devices", "strategy")
# internal fields that transformers adds when it reads a folder
_NOTES = ("is_local", "local_files_only", "backend", "_from_model_config", "_commit_hash")


def spell_for_others(folder: Path) -> None:
    """Rewrite the JSON files in `folder` so that transformers 4.57, transformers 5 and vLLM read the same model."""
    own = {"config.json": _config, "tokenizer_config.json": _tokenizer_config}
    for file in map(folder.joinpath, (*own, "generation_config.json")):
        if file.is_file():
            fields = own.get(file.name, dict)(json.loads(file.read_text(encoding="utf-8")))
            kept = {key: value for key, value in fields.items() if key not in _NOTES}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_chat_template(folder: Path, state: dict[str, Any]) -> list[str]:
    """Write a chat template if training used plain dialogue; return notes for the user."""
    if not any(isinstance(part, dict) and part.get("plain_dialogue") for part in state.values()):
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    dialogue = files("app.commands").joinpath("assets", "plain_dialogue.jinja").read_text(encoding="utf-8")
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    # the leading special tokens are part of it, because the text of a chat template is tokenised without them
    leading = "".join(tokenizer.convert_ids_to_tokens(ids[: ids.index(plain[0])]))
    template = (f"{{{{- {json.dumps(leading)} }}}}\n" if leading else "") + dialogue.rstrip("\n")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    replaced = " in place of the tokenizer's own" if tokenizer.chat_template else ""
    return [f"the chat template is that of the plain dialogue that was trained on{replaced}"]


def generation_config(settings: dict[str, Any], tokenizer: Any) -> GenerationConfig:
    """Return the start model's generation config with the tokenizer's special tokens and all stop ids."""
    ends = stop_ids(tokenizer, Tokenisation(), settings.get("eos_token_id"))
    ends.sort(key=lambda token: token != tokenizer.eos_token_id)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = GenerationConfig(**settings | tokens)
    try:
        config.validate(strict=True)
    except ValueError:  # transformers refuses to save a temperature without sampling, which is common
        config.do_sample = True
    return config


def model_card(state: dict[str, Any], checkpoint: str, dtype: str, temperature: float = 1.0) -> str:
    """Return the card of a `checkpoint` with this `state`: data, method, β settings, final metrics, as recorded."""
    config = yaml.safe_load(state["config"]) if "config" in state else None
    base = arguments(config["model"]).get("name") if config else None
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["beta-dpo"]}
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        head["base_model"] = base  # the Hub accepts only Hub ids here
    environment = Environment(
        loader=PackageLoader("app.commands", "assets"), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters |= {"arguments": arguments, "cell": _cell}
    return environment.get_template("model_card.md.j2").render(
        head=yaml.safe_dump(head).strip(),
        version=version("beta-dpo"),
        state=state,
        checkpoint=checkpoint,
        dtype=dtype,
        temperature=temperature,
        config=config,
        base=base,
        callbacks=[(part["class_path"], arguments(part)) for part in entries(config or {})],
        hardware=[(name, config["trainer"][name]) for name in TRAINER_SETTINGS] if config else [],
        metrics=[(name, f"{value:.6g}") for name, value in sorted(state.get("metrics", {}).items())],
    )


def _config(fields: Fields) -> Fields:
    """Add `torch_dtype`, `rope_theta` and `rope_scaling` for transformers 4, which else takes a base of 10000."""
    if "dtype" in fields:
        fields |= {"torch_dtype": fields["dtype"]}
    rope = fields.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if full and sliding and fields["model_type"].startswith("gemma3"):
        return fields | _rope(full, fields) | {"rope_local_base_freq": sliding["rope_theta"]}
    return fields | _rope(rope, fields) if "rope_theta" in rope else fields


def _rope(rope: Fields, config: Fields) -> Fields:
    rest, older = dict(rope), {"rope_theta": rope["rope_theta"]}
    del rest["rope_theta"]
    if (share := rest.pop("partial_rotary_factor", None)) is not None:
        older["partial_rotary_factor"] = share
    if config["model_type"] == "gpt_neox":
        older |= {"rotary_emb_base": older["rope_theta"], "rotary_pct": share}
    if rest.get("rope_type", "default") == "default":
        return older
    if config["model_type"] == "phi3":  # accepts only these three fields
        rest = {"type": rest["rope_type"], **{name: rest[name] for name in ("short_factor", "long_factor")}}
    return older | {"rope_scaling": rest}


def _tokenizer_config(fields: Fields) -> Fields:
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):  # transformers 4 expects a mapping under this name
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return fields


def _cell(value: Any) -> str:
    """Return a value as text in a Markdown table, a nested one in one line of YAML."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return str(text).removesuffix("...\n").strip().replace("\n", " ").replace("|", "\\|")
