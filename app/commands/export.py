"""The command `beta-dpo export`, which writes a checkpoint as a folder that transformers, vLLM and others load."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from app.cli.mistakes import checked_command
from app.commands.export_files import generation_config, model_card, spell_for_others, write_chat_template
from app.core.errors import UserError, renamed
from app.core.files import atomic_folder
from app.method.ranges import PositiveFloat
from datamodules.tokenisation import FILE_TEXT
from lightning_modules.checkpoint import read_for_export
from lightning_modules.lora import MOVING, Lora
from lightning_modules.measuring import parameter_count
from lightning_modules.pretrained import bare_model, load_config, load_model, model_identity, quantization

POLICY_PREFIX = "policy.model."
TRUST = {"model.trust_remote_code: true": "--trust_remote_code true"}  # spelling of a run → spelling here
LARGEST = 2_000_000_000  # parameters; a larger model would take minutes and tens of GB to read back
TOLERANCE = 2e-3  # nats per token; merged adapters round far less, a lost tie or rotary base changes far more


@checked_command
def export(
    checkpoint: str,
    out: str,
    adapter: bool = False,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
    temperature: PositiveFloat = 1.0,
    trust_remote_code: bool = False,
) -> None:
    """Write the policy of CHECKPOINT to the folder OUT: safetensors, tokenizer, generation config, model card.

    Args:
        checkpoint: a file, or a folder of shards, written by `beta-dpo fit`.
        out: the folder to create; it appears only when the model, read back, agrees with the policy.
        adapter: for a run with model.lora, write only the adapter, for `peft`; else it is merged into the weights.
        base: where the model that the adapters belong to is now, if it is no longer at model.name of the run.
        dtype: type of the weights; float32 is exact, auto is the type of the model that training started from.
        temperature: divide the logits by it, by the weights of the last norm: the model then samples at 1 as the
            policy does at this temperature, and training from it has the exact log-probabilities.
        trust_remote_code: run the model's own code, read from model.name of the run.
    """
    if Path(out).exists():
        raise UserError(f"{out} exists already: choose another folder, or remove it first.")
    state = read_for_export(Path(checkpoint)) | {"trust_remote_code": trust_remote_code}
    lora = state.get("lora") or {}
    if base is not None and policy_weights(state)[0]:
        raise UserError(f"--base: {checkpoint} holds the whole model: leave it out.")
    if adapter and lora.get("base") is None:
        raise UserError(f"--adapter: {checkpoint} was not trained with model.lora on a model with a name.")
    if adapter and temperature != 1.0:
        raise UserError("temperature changes the model's own weights, which --adapter does not write.")
    if adapter and re.fullmatch(MOVING, str(lora["init_lora_weights"])):
        moved = "model.lora.init_lora_weights changed the base's weights, so the adapters fit no other copy of it"
        raise UserError(f"--adapter: {moved}: leave --adapter out, which merges them.")
    # the data module put the tokenizer there, under its class name; a path could lead outside the folder
    parts = (part for part in state.values() if isinstance(part, dict))
    tokenizer: dict[str, str] = next((part["tokenizer_files"] for part in parts if "tokenizer_files" in part), {})
    if not tokenizer or any(Path(name).name != name for name in tokenizer):
        raise UserError(f"{checkpoint} was not written by beta-dpo: it holds no tokenizer, or a damaged one.")
    base_dtype = state.get("base_dtype") or "float32"
    written = base_dtype if dtype == "auto" else dtype
    notes = [f"exported {checkpoint} to {out} in {written}"]
    if dtype == "float32" and base_dtype != dtype:
        notes.append(f"training started from {base_dtype}, which --dtype auto writes, in half the space")
    with atomic_folder(out) as folder:
        for name, text in tokenizer.items():
            (folder / name).write_bytes(text.encode(*FILE_TEXT))
        notes += write_chat_template(folder, state)
        (folder / "README.md").write_text(model_card(state, checkpoint, written, temperature), encoding="utf-8")
        notes += write_model(folder, state, adapter, base, written, temperature)
    print("; ".join(notes))


def write_model(
    folder: Path, state: dict[str, Any], adapter: bool, base: str | None, dtype: str, temperature: float
) -> list[str]:
    """Write weights and configuration, read them back as a check, and return notes for the user."""
    model = policy_model(state, base)
    notes = []
    if temperature != 1.0:
        divide_logits(model if state.get("lora") is None else model.get_base_model(), temperature)
        notes.append(f"its logits are divided by {temperature:g}")
    logps = sequence_logps(model) if parameter_count(model) <= LARGEST else None
    if state.get("lora") is not None and not adapter:
        notes += ["merged into the quantised base, dequantised"] if state.get("quantize") else []
        model, untied = merge(model)
        notes += ["the head is no longer tied to the embeddings, which alone have adapters"] if untied else []
    weights = [part for name, part in model.named_parameters() if not adapter or "lora_" in name]
    convert(weights, getattr(torch, dtype))
    if logps is not None and dtype != "float32":
        convert(weights, torch.float32)
        rounded = sequence_logps(model)
        apart = (logps - rounded).abs()
        moved = f"{apart.mean():.2g} nats per token, at most {apart.max():.2g}"
        notes.append(f"rounding moves log-probabilities by {moved}")
        logps = rounded
        convert(weights, getattr(torch, dtype))  # exact, because the weights are already rounded
    if adapter:
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        settings = json.loads(state.get("generation_config", "{}"))
        if temperature != 1.0:  # a server would apply the start model's own once more
            settings.pop("temperature", None)
        model.generation_config = generation_config(settings, tokenizer)
        model.save_pretrained(folder)
    spell_for_others(folder)
    if logps is None:
        return [*notes, f"not checked, for it has more than {LARGEST:.0e} parameters"]
    del model, weights  # one model at a time, unless an adapter needs its base
    if adapter:
        from peft import PeftModel

        exported: Any = PeftModel.from_pretrained(plain_model(state, base), folder)
    else:
        state.pop("state_dict")
        trust = state["trust_remote_code"]
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    most = float((logps - sequence_logps(exported)).abs().max())
    if not most <= TOLERANCE:
        wrong = f"does not compute what the policy does (up to {most:.3g} nats per token apart)"
        raise UserError(f"The export, read again, {wrong} and was removed: please report the model's family.")
    return [*notes, "checked: the exported model gives the same outputs"]


def policy_weights(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the policy and those of its adapters, each under their names in transformers."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, weight in state["state_dict"].items():
        if name.startswith(POLICY_PREFIX):
            found[".lora_" in name][name.removeprefix(POLICY_PREFIX)] = weight
    return found


def plain_model(state: dict[str, Any], base: str | None) -> Any:
    """Return the policy without adapters, in float32; from `base` if the checkpoint has adapters alone."""
    if weights := policy_weights(state)[0]:
        settings = json.loads(state["model_config"], object_hook=number)
        if "auto_map" in settings:  # code of its own
            run = yaml.safe_load(state.get("config", "{}"))
            name = run.get("model", {}).get("init_args", {}).get("name")
            with renamed(TRUST | {"model.name": "the code of the model"}):
                config = load_config(name, None, state["trust_remote_code"])
        else:
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = bare_model(config, dtype=torch.float32, trust_remote_code=state["trust_remote_code"])
        weights = {name.replace("base_layer.", ""): weight.float() for name, weight in weights.items()}
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        return model
    place = base or state["lora"]["base"]
    quantized = quantization(state.get("quantize"), torch.float32)
    with renamed(TRUST | {"model.name": "--base: the adapters need their model"}):
        model = load_model(place, quantized=quantized, trust_remote_code=state["trust_remote_code"])
    if model_identity(place, model.config) != state["lora"]["identity"]:
        raise UserError(f"--base: {place} is another model than the adapters belong to, or its files have changed.")
    return model if quantized is None else model.dequantize()


def number(fields: dict[str, Any]) -> Any:
    """Return the infinity or NaN that transformers writes as such `fields` of JSON; others unchanged."""
    return float(fields["__float__"]) if "__float__" in fields else fields


def policy_model(state: dict[str, Any], base: str | None) -> Any:
    """Return the policy of a checkpoint, a `PeftModel` if it has adapters. Raises UserError like `plain_model`."""
    model = plain_model(state, base)
    if state.get("lora") is None:
        return model
    from peft import get_peft_model

    settings = {name: value for name, value in state["lora"].items() if name not in ("base", "identity")}
    # its start is of no account, because all of its weights are loaded
    lora = replace(Lora(**settings), init_lora_weights=True)
    model = get_peft_model(model, lora.peft_config(state["lora"]["base"]))
    weights = {f"base_model.model.{name}": part for name, part in policy_weights(state)[1].items()}
    if model.load_state_dict(weights, strict=False, assign=True).unexpected_keys:
        raise UserError("The checkpoint holds other adapters than its settings describe.")
    return model


def merge(model: Any) -> tuple[Any, bool]:
    """Return the plain model with adapters merged into its weights, and whether its head had to be untied."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    # in training, adapters on the embeddings do not change a head that shares the weights; merging would
    untied = hasattr(base.get_input_embeddings(), "base_layer") and base.config.tie_word_embeddings
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return model.merge_and_unload(), untied


@torch.no_grad()
def divide_logits(model: Any, temperature: float) -> None:
    """Divide the logits of a model by `temperature`, in the last norm. Raises UserError if that cannot be exact."""
    ids = random_tokens(model)
    wanted = model.eval()(input_ids=ids).logits / temperature
    # the last norm has one weight per hidden unit, outside the layers
    outside = [part for name, part in model.named_modules() if not any(map(str.isdigit, name.split(".")))]
    norms = [part for part in outside if getattr(getattr(part, "weight", None), "ndim", None) == 1]
    if norms and not getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        weight = norms[-1].weight
        for part in (norms[-1], model.get_output_embeddings()):
            if getattr(part, "bias", None) is not None:
                part.bias /= temperature
        before = weight.clone()
        for shift in (0.0, 1.0):  # a Gemma's norm multiplies by 1 + weight
            weight.copy_((before + shift) / temperature - shift)
            apart = (model(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max()
            if apart < 1e-4:
                return
    why = f"the logits of a {model.config.model_type} are not a multiple of its last norm"
    raise UserError(f"temperature: {why}: export it without, and sample with --temperature.")


def convert(weights: list[nn.Parameter], dtype: torch.dtype) -> None:
    """Change the type of floating-point weights in place. Raises UserError if a value exceeds the type's range."""
    for weight in weights:
        if weight.is_floating_point() and weight.dtype != dtype:
            weight.data = weight.data.to(dtype)
            if not weight.data.isfinite().all():
                raise UserError(f"--dtype {str(dtype).removeprefix('torch.')}: a weight is beyond its range.")


def random_tokens(model: Any) -> Tensor:
    """Return random ids [2, 48], equal for models of one vocabulary; fewer if the model takes fewer positions."""
    config = model.config.get_text_config()
    length = min(48, getattr(config, "max_position_embeddings", None) or 48)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def sequence_logps(model: Any) -> Tensor:
    """Return log π [2, 47] of the `random_tokens` after the first. Raises UserError if a value is not finite."""
    ids = random_tokens(model)
    logps = torch.log_softmax(model.eval()(input_ids=ids).logits.float(), dim=-1)[:, :-1]
    found = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    if not found.isfinite().all():
        raise UserError("The policy's log-probabilities are not finite: export an earlier checkpoint.")
    return found
