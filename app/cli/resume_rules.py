"""The configuration keys that may or may not differ between the run of a checkpoint and the run that resumes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from app.core.errors import UserError

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
    "seed_everything": "the order of the pairs stays that of the checkpoint",
    "data.seed": "the order of the pairs stays that of the checkpoint",
    "filter.seed": "the draws stay those of the checkpoint",
}
IGNORED = ("ckpt_path", "scores*", "config")
# keys of models and data, whose content is compared by hash (see `app.cli.run_record`), wherever it is stored
CONTENTS = {"model": "model.name", "reference": "model.reference_name", "data": "data*"}


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a configuration by name: `model.optimizer.lr`, `filter.keep_ratio`, …

    The class of an object, without its module, is the value of the object's name.
    """
    trainer = dict(config.get("trainer") or {})
    callbacks = trainer.pop("callbacks", None) or []
    rest = {**config, "trainer": trainer}
    named: dict[str, Any] = {}
    for entry in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = last = str(entry.get("class_path", "")).rsplit(".", 1)[-1]
        while name in named:
            name += "'"
        named[name] = {**entry, "class_path": last}
    return dict(_leaves("", {**rest, "callbacks": named}))


def _leaves(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and "class_path" in node:
        yield name, str(node["class_path"]).rsplit(".", 1)[-1]
        node = {
            key: value for key, value in node.items() if key not in ("class_path", "init_args", "dict_kwargs")
        } | {**(node.get("init_args") or {}), **(node.get("dict_kwargs") or {})}
    elif not isinstance(node, Mapping) or not node:
        yield name, node
        return
    for key, value in node.items():
        yield from _leaves(f"{name}.{key}" if name else str(key), value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ between two configurations, with old and new value; "not set" if absent."""
    old, new = flattened(before), flattened(now)
    keys = [key for key in old | new if not any(fnmatchcase(key, pattern) for pattern in IGNORED)]
    found = {key: (old.get(key, "not set"), new.get(key, "not set")) for key in keys}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the `differences` of a run's configuration to the checkpoint's.

    Raises UserError if the checkpoint cannot be resumed with one of them, or is of version 0.1, which had no slots.
    """
    if "checkpoint" not in before:
        raise UserError(
            "--ckpt_path: the checkpoint is of version 0.1, which had a list of callbacks instead of named slots: "
            "finish that run with version 0.1, or start a new run from its exported model (`beta-dpo export`)."
        )
    found, settings = differences(before, now), flattened(now)
    scaled = any(settings.get(key) == value for key, value in IN_UNITS_OF_BETA0.items())
    for key, (old, new) in found.items():
        if any(fnmatchcase(key, pattern) for pattern in REFUSED) or (scaled and key == "model.beta0"):
            raise UserError(
                f"--ckpt_path: {key} is {new}, but the run of the checkpoint had {old}, and its state cannot be "
                f"carried over: {START}."
            )
    return found


def described(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the differences as one block, a line each."""
    lines = [
        f"  {key}: {old} → {new}" + (f" ({KEPT[key]})" if key in KEPT else "") for key, (old, new) in found.items()
    ]
    return "\n".join(["--ckpt_path: other settings than in the run of the checkpoint; those of now apply:", *lines])
