"""The text of `beta-dpo fit --help`: the slots, the options of model and data, and where to find the rest."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer

from app.cli.options import options_of
from callbacks.slots import SLOTS
from datamodules import ControlledTask, PreferenceData
from lightning_modules import PreferenceOptimization, SupervisedFineTuning

PARTS = {"model": (PreferenceOptimization, SupervisedFineTuning), "data": (PreferenceData, ControlledTask)}


def brief_help(command: str, own: dict[str, tuple[Any, Any, str]]) -> Iterator[str]:
    """Yield the help of `fit`, or of a command that takes its options and its `own` (as in `PartsCLI`)."""
    yield f"usage: beta-dpo {command} --config FILE [--config FILE …] [--OPTION VALUE …]"
    yield ""
    yield from wrapped(
        "A FILE is a path, or the name of a shipped configuration: quickstart, own_pairs, method/dpo. A later "
        "FILE overrides an earlier one, and an OPTION overrides both; --print_config shows the resulting values.",
        "",
    )
    yield ""
    yield from (f"  --{name:<18}{text}" for name, (_, _, text) in own.items())
    yield from [""] * bool(own)
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
    yield from wrapped(f"--trainer.OPTION VALUE, Lightning's Trainer: {', '.join(options_of(Trainer))}", "")


def options_with_defaults(kind: type) -> str:
    """Return the names of the options of a class, with the defaults that are booleans, numbers or text."""

    def default(value: Any) -> str:
        if isinstance(value, bool):
            return f"={str(value).lower()}"
        return f"={value}" if isinstance(value, (str, int, float)) else ""

    return ", ".join(f"{name}{default(value)}" for name, value in options_of(kind).items())


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=indent + "  ")


def trainer_options() -> list[str]:
    """Return the options of `fit`, `validate`, `test` and `predict` for suggestions, without model and data."""
    names = [f"trainer.{name}" for name in options_of(Trainer)]
    for slot in SLOTS:
        names += [slot.name, *(f"{slot.name}.{one}" for kind in slot.kinds for one in options_of(kind))]
    return ["config", "seed_everything", "model", "data", "trainer", "ckpt_path", *names]
