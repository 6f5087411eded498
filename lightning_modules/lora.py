"""Low-rank adapters (LoRA, arXiv 2106.09685) through `peft`, whose checkpoints hold the adapters alone."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.core.errors import UserError, first_line
from app.method.ranges import PositiveFloat, PositiveInt, checked

log = logging.getLogger(__name__)

TO_ADAPT = "they are fused into weights that are no layers: name {} in model.lora.target_parameters"
# options that name some of the layers → the pattern of a layer's whole name for one of their entries, as in peft
SOME = dict.fromkeys(("exclude_modules", "rank_pattern", "alpha_pattern"), r"(.*\.)?({})")
SOME |= {"layers_to_transform": r".*\.{}\..*"}
MOVING = r"olora|pissa(_niter_[1-9]\d*)?"  # starts for which peft subtracts the adapters from the base's weights


@checked
@dataclass
class Lora:
    """The settings of LoRA, W·x + (lora_alpha/r)·B·A·x with B = 0 at the start, as `peft.LoraConfig` names them.

    Args:
        r: rank of A and B.
        lora_alpha: scale of the adapter, divided by r.
        target_modules: `all-linear` (except the output head), or a list of last parts of layer names (`q_proj`, …).
        target_parameters: weights that are no layers, such as the fused experts of a mixture, by the last parts of
            their names (`experts.gate_up_proj`, …): every expert gets adapters of rank r.
        exclude_modules: layers that get no adapter, though `target_modules` names them.
        layers_to_transform: numbers of the blocks that get adapters; none: all.
        rank_pattern: ranks of single layers, by name.
        alpha_pattern: scales of single layers, by name.
        use_rslora: divide by √r instead of r (arXiv 2312.03732).
        use_dora: train the norms of the weights' columns as well (DoRA, arXiv 2402.09353).
        init_lora_weights: true, or `gaussian` for A. `pissa`, `pissa_niter_N` (arXiv 2404.02948) and `olora` change
            the base's weights: so a frozen reference is a second model, and checkpoints hold the base, too.
    """

    r: PositiveInt = 16
    lora_alpha: PositiveFloat = 32.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    @property
    def moves_base(self) -> bool:
        """Return whether the start changes the base's weights, so that the base alone is another model."""
        return re.fullmatch(MOVING, str(self.init_lora_weights)) is not None

    @property
    def reads_base(self) -> bool:
        """Return whether the start depends on the base's weights."""
        return self.use_dora or self.moves_base

    def peft_config(self, base: str | None = None) -> Any:
        """Return the `peft.LoraConfig` for `base`. Raises UserError without peft, or if the start needs data."""
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UserError("model.lora needs one more package: pip install 'beta-dpo[lora]'.") from error
        if self.init_lora_weights not in (True, "gaussian") and not self.moves_base:
            said = f"{self.init_lora_weights!r} is none of true, gaussian, pissa, pissa_niter_N and olora"
            raise UserError(f"model.lora.init_lora_weights: {said}: others need data, or another base.")
        alphas = self.alpha_pattern or {}
        patterns = {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": alphas}
        if zero := [name for name, alpha in alphas.items() if not 0 < alpha < math.inf]:
            said = f"{zero[0]} needs a finite number above 0, else nothing is learned"
            raise UserError(f"model.lora.alpha_pattern: {said}.")
        fixed = {"lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
        return LoraConfig(**asdict(self) | patterns | fixed)


def add_lora(model: Any, lora: Lora) -> None:
    """Add adapters in place, freeze all else, and say what got adapters. Raises UserError for unmatched targets."""
    experts = fused_experts(model)
    refuse_unmatched(model, lora, experts)
    try:
        model.add_adapter(lora.peft_config())
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        said = first_line(error)
        if experts and lora.reads_base:
            cure = "list layers without them in target_modules, for example [q_proj, k_proj, v_proj, o_proj]."
            said = f"DoRA, PiSSA and OLoRA do not go with fused experts, which would get adapters: {cure}"
        raise UserError(f"model.lora: {said}") from error
    counts = adapted(model)
    rank_zero_info("model.lora: adapters on " + ", ".join(f"{many} × {name}" for name, many in counts.items()))
    if experts := fused_experts(model):
        log.warning("model.lora: the experts get no adapter; %s", TO_ADAPT.format(", ".join(experts)))


def adapted(model: Any) -> Counter[str]:
    """Return the last parts of the names of layers and weights that have adapters, with their numbers."""
    from peft.tuners.lora import LoraLayer

    found: Counter[str] = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = getattr(layer, "parameter_name", None)  # of a weight that is no layer
            last = name.replace(".base_layer", "").rpartition(".")[2]
            found[last if weight is None else f"{last}.{weight}"] += 1
    return found


def fused_experts(model: Any) -> list[str]:
    """Return the last two parts of the names of weights that hold all experts of a mixture and have no adapter."""
    others = re.compile(r"conv|\.base_layer\.")  # convolutions have three dimensions, too; layers with adapters
    weights = model.get_decoder().named_parameters()
    left = [name for name, weight in weights if weight.ndim == 3 and not others.search(name)]
    return sorted({".".join(name.split(".")[-2:]) for name in left})


def save_adapters_alone(module: nn.Module) -> None:
    """Leave the frozen weights out of the state dict of `module`, and keep its own when one is loaded."""

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        trained = {prefix + name for name, weight in module.named_parameters() if weight.requires_grad}
        for name in [name for name in state if name not in trained]:
            del state[name]

    def keep(module: nn.Module, found: Any) -> None:
        trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
        found.missing_keys[:] = [name for name in found.missing_keys if name in trained]

    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_post_hook(keep)


def refuse_unmatched(model: Any, lora: Lora, experts: list[str]) -> None:
    """Raise UserError for targets that match no layer or weight, or the output head."""
    head, kinds = model.get_output_embeddings(), (nn.Linear, nn.Embedding, Conv1D)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    targets, ends = lora.target_modules, r"(.*\.)?"
    rules = {targets: targets} if isinstance(targets, str) else {one: ends + re.escape(one) for one in targets}
    try:
        found = {one: [layers[name] for name in layers if re.fullmatch(rule, name)] for one, rule in rules.items()}
        for option, inside in SOME.items():
            given, names = getattr(lora, option) or [], [*layers, *(name for name, _ in model.named_parameters())]
            for one in [given] if isinstance(given, (str, int)) else given:
                if not any(re.fullmatch(inside.format(one), name) for name in names):
                    raise UserError(f"model.lora.{option}: {one} names no layer.")
    except re.error as error:
        raise UserError(f"model.lora: {error.pattern!r} is no pattern: {error}.") from error
    if lora.init_lora_weights == "olora" and any(isinstance(layer, Conv1D) for layer in layers.values()):
        raise UserError(
            "model.lora.init_lora_weights: peft has no olora for Conv1D, this model's layers: take pissa."
        )
    wrong = [one for one, fitting in found.items() if not fitting or head in fitting]
    if targets != "all-linear" and (wrong or not targets):
        known = sorted({name.rpartition(".")[2] for name, layer in layers.items() if layer is not head})
        near = [name for one in wrong for name in get_close_matches(one, known, 2)]
        hint = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else "."
        if targets in known:
            hint = f"; write [{targets}]: text by itself is a pattern for whole names."
        if experts:
            hint = f". If the experts are meant, {TO_ADAPT.format(', '.join(experts))}."
        said = f"{', '.join(wrong) or 'an empty list'} names no layer, or the output head, which stays as it is"
        raise UserError(f"model.lora.target_modules: {said}; there are {', '.join(known)}{hint}")
    for one in lora.target_parameters or []:
        if not any(re.fullmatch(ends + re.escape(one), name) for name, _ in model.named_parameters()):
            there = ", ".join(experts) or "none, and target_modules names layers"
            raise UserError(f"model.lora.target_parameters: {one} names no weight: the fused experts are {there}.")


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Disable the adapters within the block: outputs equal those before `add_lora` bit for bit."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        # peft freezes the weights that it finds and thaws those that it finds later: under FSDP2 first the shards,
        # then gathered weights
        for weight in trained:
            weight.requires_grad_(True)
