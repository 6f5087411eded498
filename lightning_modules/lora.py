"""Low-rank adapters (LoRA, arXiv 2106.09685) through `peft`; the policy without its adapters is the reference."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from app.core.errors import UserError
from app.method.ranges import PositiveFloat, PositiveInt, checked

log = logging.getLogger(__name__)


@checked
@dataclass
class Lora:
    """The settings of LoRA, W·x + (lora_alpha/r)·B·A·x with B = 0 at the start, under the names of `peft`.

    Args:
        r: rank of A and B.
        lora_alpha: scale of the adapter, divided by r.
        target_modules: `all-linear` (except the output head), or a list of last parts of layer names (`q_proj`, …).
        use_rslora: divide by √r instead of r.
    """

    r: PositiveInt = 16
    lora_alpha: PositiveFloat = 32.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False

    def peft_config(self, base: str | None = None) -> Any:
        """Return the `peft.LoraConfig` for adapters of the model `base`, without dropout and biases.

        Raises UserError if peft is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UserError("model.lora needs one more package: pip install 'beta-dpo[lora]'.") from error
        fixed: dict[str, Any] = {
            "lora_dropout": 0.0,
            "bias": "none",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
        }
        return LoraConfig(**asdict(self), **fixed)


def add_lora(model: Any, lora: Lora) -> None:
    """Add adapters to `model` in place and freeze all other weights.

    Raises UserError if one of the `target_modules` matches no layer; warns of fused experts, which get no adapter.
    """
    refuse_unmatched(model, lora.target_modules)
    try:
        model.add_adapter(lora.peft_config())
    except ValueError as error:
        raise UserError(f"model.lora: {str(error).splitlines()[0]}") from error

    # peft wraps the experts of model families that it supports; those carry base_layer in their names
    left = [name for name, weight in model.named_parameters() if weight.ndim == 3 and ".base_layer." not in name]
    experts = {re.sub(r"\.\d+\.", ".*.", name) for name in left if "lora_" not in name}
    if experts:
        log.warning(
            "model.lora: %s are no linear layers (the fused experts of a mixture) and get no adapter: they stay as "
            "they are.",
            ", ".join(sorted(experts)),
        )


def refuse_unmatched(model: Any, targets: str | list[str]) -> None:
    """Raise UserError for entries of `target_modules` that match no layer or the output head."""
    layers = {
        name: kind for name, kind in model.named_modules() if isinstance(kind, (nn.Linear, nn.Embedding, Conv1D))
    }
    names = sorted({name.rpartition(".")[2] for name in layers})
    found = {one: [name for name in layers if f".{name}".endswith(f".{one}")] for one in targets}
    if targets == "all-linear":
        return
    if isinstance(targets, str):
        try:
            found = {targets: [name for name in layers if re.fullmatch(targets, name)]}
        except re.error as error:
            raise UserError(f"model.lora.target_modules: {targets!r} is no pattern: {error}.") from error
    unmatched = [one for one, fitting in found.items() if not fitting]
    if not targets or unmatched:
        near = [name for one in unmatched for name in get_close_matches(one, names, 2)]
        hint = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else "."
        if targets in names:
            hint = f"; write [{targets}]: text by itself is a pattern for whole names."
        raise UserError(
            f"model.lora.target_modules: {', '.join(unmatched) or 'an empty list'} names no layer; there are "
            f"{', '.join(names)}{hint}"
        )
    head = model.get_output_embeddings()
    for one, fitting in found.items():
        if any(layers[name] is head for name in fitting):
            raise UserError(
                f"model.lora.target_modules: {one} is the output head, which stays as it is: leave it out."
            )


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Disable the adapters within the block, so that outputs equal those before `add_lora` bit for bit."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
