"""The fields by which transformers 4.57 and vLLM read the model that transformers 5 wrote, and a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Fields = dict[str, Any]
# what transformers notes for itself when it reads a folder
_NOTES = ("is_local", "local_files_only", "backend", "_from_model_config", "_commit_hash")
# a dialogue in plain text, as Anthropic's HH data writes it; the answer is followed by the EOS
_PLAIN_DIALOGUE = """\
{%- for message in messages %}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{- raise_exception('This model knows turns of user and assistant in alternation, from the user on.') }}
{%- endif %}
{{- '\\n\\nHuman: ' if message['role'] == 'user' else '\\n\\nAssistant: ' }}{{ message['content'] | trim }}
{%- if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"""


def spell_for_others(folder: Path) -> None:
    """Rewrite the JSON files in `folder` so that transformers 4.57, 5 and vLLM read the same from them."""
    for name, respelt in _FILES.items():
        if (folder / name).is_file():
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
            kept = {key: value for key, value in respelt(fields).items() if key not in _NOTES}
            (folder / name).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plain_dialogue_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that renders what training on HH-style text tokenises, leading special tokens included.

    A chat template's text is tokenised without the special tokens that the tokenizer puts before plain text.
    """
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    leading = "".join(tokenizer.convert_ids_to_tokens(ids[: ids.index(plain[0])]))
    return (f"{{{{- {json.dumps(leading)} }}}}\n" if leading else "") + _PLAIN_DIALOGUE


def _config(fields: Fields) -> Fields:
    """Add `rope_theta` and `rope_scaling`, which transformers 4 knows (else it takes 10000), and `torch_dtype`."""
    if "dtype" in fields:
        fields |= {"torch_dtype": fields["dtype"]}
    rope = fields.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if full and sliding:  # Gemma 3
        return fields | _rope(full, fields) | {"rope_local_base_freq": sliding["rope_theta"]}
    return fields | _rope(rope, fields) if "rope_theta" in rope else fields


def _rope(rope: Fields, config: Fields) -> Fields:
    rest = dict(rope)
    older = {"rope_theta": rest.pop("rope_theta")}
    share = rest.pop("partial_rotary_factor", None)
    if share is not None:
        older["partial_rotary_factor"] = share
    if config["model_type"] == "gpt_neox":
        older |= {"rotary_emb_base": older["rope_theta"], "rotary_pct": share}
    if rest.get("rope_type", "default") == "default":
        return older
    if config["model_type"] == "phi3":  # takes these three fields and no other
        rest = {"type": rest["rope_type"], **{name: rest[name] for name in ("short_factor", "long_factor")}}
    return older | {"rope_scaling": rest}


def _tokenizer_config(fields: Fields) -> Fields:
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):  # transformers 4 takes a mapping under this name
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return fields


_FILES: dict[str, Callable[[Fields], Fields]] = {
    "config.json": _config,
    "tokenizer_config.json": _tokenizer_config,
    "generation_config.json": lambda fields: fields,
}
