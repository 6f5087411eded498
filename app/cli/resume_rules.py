"""The configuration keys that may or may not differ between the run of a checkpoint and the run that resumes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from app.core.errors import UserError

UNSET = "not set"
START = "give the old value, or start a run of its own from the checkpoint's model (`beta-dpo export`)"
# patterns of keys, as `flattened` names them, whose change cannot be applied to a checkpoint; for a key in no table
# the new value applies, and the change is listed
REFUSED = (
    *("model", "model.architecture*", "model.loss*", "model.sft_weight", "model.lora*", "model.optimizer"),
    *("model.quantize*", "model.reference_name"),
    # M0 and σ are in the units of M
    *("reward", "reward.*", "data.reward_model", "data.reward_model.name", "statistics*"),
    "data.order*",  # a place in one order is none in another
    "control*",  # its state is that of one control, with the β of its run
)
# the settings under which a state is in the units of β0, so that model.beta0 is refused as well
IN_UNITS_OF_BETA0 = {"statistics.gap_scale": "beta0", "schedule": "EpsilonBeta", "margin": "GammaPOMargin"}
# keys whose old value still applies, because it is part of the state
KEPT = {
    **dict.fromkeys(("seed_everything", "data.seed"), "the order of the pairs stays that of the checkpoint"),
    "filter.seed": "the draws stay those of the checkpoint",
}
OF_AN_OBJECT = ("class_path", "init_args", "dict_kwargs")
IGNORED = ("ckpt_path", "scores*", "config")
# what is compared by the hash of its content (see `app.cli.run_record`) → pattern of its keys, and the fault
CONTENTS = {
    "model": ("model.name", "another model than the run started from"),
    "reference": ("model.reference_name", "another reference than the run had"),
    "data": ("data*", "other training pairs"),
}


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a configuration by name: `model.optimizer.lr`, `trainer.callbacks.EarlyStopping.mode`, …

    The class of an object, without its module, is the value of the object's name, and its name within a list.
    """
    return {name.removeprefix("."): value for name, value in _leaves("", config) if name}


def _leaves(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, list) and node and all(map(_class_of, node)):
        found = [_class_of(one) for one in node]
        node = {kind + "'" * found[:place].count(kind): node[place] for place, kind in enumerate(found)}
    elif kind := _class_of(node):
        yield name, kind
        inner = (node, node.get("init_args") or {}, node.get("dict_kwargs") or {})
        node = {key: value for part in inner for key, value in part.items() if key not in OF_AN_OBJECT}
    elif not isinstance(node, Mapping) or not node:
        yield name, node
        return
    for key, value in node.items():
        yield from _leaves(f"{name}.{key}", value)


def _class_of(node: Any) -> str:
    return str(node["class_path"]).rpartition(".")[2] if isinstance(node, Mapping) and "class_path" in node else ""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ between two configurations, with old and new value; UNSET if absent."""
    old, new = flattened(before), flattened(now)
    found = {key: (old.get(key, UNSET), new.get(key, UNSET)) for key in old | new if not matches(key, IGNORED)}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the `differences` to the checkpoint's configuration. Raises UserError if one forbids to resume it."""
    if "checkpoint" not in before:
        cure = "finish that run with version 0.1, or start a new run from its exported model (`beta-dpo export`)"
        raise UserError(f"--ckpt_path: the checkpoint is of version 0.1, which had no named slots: {cure}.")
    found, settings = differences(before, now), flattened(now)
    scaled = any(settings.get(key) == value for key, value in IN_UNITS_OF_BETA0.items())
    for key, (old, new) in found.items():
        if matches(key, REFUSED) or (scaled and key == "model.beta0"):
            raise UserError(f"--ckpt_path: {key} is {new}, but the run of the checkpoint had {old}: {START}.")
    return found


def described(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the differences as one block, a line each."""
    lines = ["--ckpt_path: other settings than in the run of the checkpoint; those of now apply:"]
    for key, (old, new) in found.items():
        kept = f" ({KEPT[key]})" if key in KEPT and old != UNSET else ""
        lines.append(f"  {key}: {old} → {new}{kept}")
    return "\n".join(lines)
