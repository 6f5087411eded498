"""The text of `beta-dpo fit --help`: the slots, the options of model and data, and where to find the rest."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer

from callbacks.slots import SLOTS
from datamodules import ControlledTask, PreferenceData
from lightning_modules import PreferenceOptimization, SupervisedFineTuning

PARTS = {"model": (PreferenceOptimization, SupervisedFineTuning), "data": (PreferenceData, ControlledTask)}


def brief_help(command: str) -> str:
    """Return the help of `fit`, `validate`, `test` or `predict`."""
    return "\n".join(lines(command))


def lines(command: str) -> Iterator[str]:
    yield f"usage: beta-dpo {command} --config FILE [--config FILE …] [--OPTION VALUE …]"
    yield ""
    yield from wrapped(
        "A FILE is a path, or the name of a shipped configuration: quickstart, own_pairs, method/dpo. A later one "
        "overrides an earlier one, an option overrides all. --print_config shows every value in force.",
        "",
    )
    yield ""
    yield "slots: one callback each; --SLOT null empties one, --SLOT.OPTION VALUE fills it and sets an option"
    for slot in SLOTS:
        yield f"  --{slot.name:<12}{slot.text}{' (on by default)' if slot.on else ''}"
        for kind in slot.kinds:
            yield from wrapped(f"{kind.__name__}: {options_with_defaults(kind)}", " " * 16)
    for part, kinds in PARTS.items():
        yield ""
        yield f"--{part} CLASS, --{part}.OPTION VALUE; --{part}.help CLASS says what each option means"
        for kind in kinds:
            yield from wrapped(f"{kind.__name__}: {options_with_defaults(kind)}", "  ")
    yield ""
    yield "--seed_everything, --ckpt_path (a checkpoint, or last)"
    yield from wrapped(f"--trainer.OPTION VALUE, Lightning's Trainer: {options_with_defaults(Trainer, False)}", "")


def options_with_defaults(kind: type, defaults: bool = True) -> str:
    """Return the names of the options of a class, with the defaults that are booleans, numbers or text."""
    parameters = inspect.signature(kind).parameters.values()
    return ", ".join(f"{one.name}{default_of(one.default) if defaults else ''}" for one in parameters)


def default_of(value: Any) -> str:
    if isinstance(value, bool):
        return f"={str(value).lower()}"
    return f"={value}" if isinstance(value, (str, int, float)) and value is not inspect.Parameter.empty else ""


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=indent + "  ")


def trainer_options() -> list[str]:
    """Return the options of `fit`, `validate`, `test` and `predict` for suggestions, without model and data."""
    names = [f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    for slot in SLOTS:
        parameters = {one: None for kind in slot.kinds for one in inspect.signature(kind.__init__).parameters}
        names += [slot.name, *(f"{slot.name}.{one}" for one in parameters if one != "self")]
    return ["config", "seed_everything", "model", "data", "trainer", "ckpt_path", *names]
