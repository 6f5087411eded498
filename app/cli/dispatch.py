"""Running one command of `beta-dpo`, with one sentence for the user if it fails, and the help of `fit`."""

from __future__ import annotations

import json
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import takewhile
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, auto_cli
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from app.cli import planning, showing
from app.cli.mistakes import causes, plain_sentence, sentence
from app.cli.options import options_of
from app.cli.trainer import OwnOptions, be_quiet, run_trainer_command
from app.commands import COMMANDS, function_of
from app.core.errors import RESUME, UserError, leave
from callbacks import SLOTS
from callbacks.run_checkpoint import Interrupted
from datamodules import ControlledTask, PreferenceData
from lightning_modules import PreferenceOptimization, SupervisedFineTuning

PARTS = {"model": (PreferenceOptimization, SupervisedFineTuning), "data": (PreferenceData, ControlledTask)}
# gloo's messages on the remaining ranks when one is lost
RANK_LOST = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Failed to recv")


class WordsParser(ArgumentParser):
    """A parser whose help shows a list without an option as words, as `run` takes it."""

    def format_help(self, *given: Any, **more: Any) -> str:
        for action in self._actions:
            if not action.option_strings and action.metavar == "[ITEM,...]":
                action.metavar = f"{action.dest.upper()} [...]"
        return super().format_help(*given, **more)


def run(command: str, arguments: list[str]) -> None:
    """Run `command`, the first of `arguments`. Exits with status 2 and one sentence if the user made a mistake."""
    be_quiet()
    threading.excepthook = _tell_of_thread
    try:
        tell_repeats(arguments)
        if command in COMMANDS:
            run_small_command(command, function_of(command), arguments[1:])
            return
        own = {"plan": (planning.OPTIONS, planning.run_plan), "show": (showing.OPTIONS, showing.run_show)}
        options, answer = own.get(command, ({}, run_trainer_command))
        if {"-h", "--help"} & set(arguments):
            print("\n".join(brief_help(command, options)))
            sys.exit()
        answer(arguments)
    except ArgumentError as error:
        said = next((str(cause) for cause in causes(error) if isinstance(cause, UserError)), None)
        known = list(signature(function_of(command)).parameters) if command in COMMANDS else trainer_options()
        leave(said or sentence(str(error), command, known))
    except Interrupted as stop:
        leave(f"{stop}: the same command with --ckpt_path last resumes from there.", stop.exit_status)
    except Exception as error:
        if any(sign in str(error) for sign in RANK_LOST):
            leave(f"another rank has ended, or does not answer: its own messages tell more. {RESUME}", 1)
        told = plain_sentence(error)
        if told is None:
            raise
        leave(told)


def _tell_of_thread(ended: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, such as TensorBoard's writer, in one sentence if there is one."""
    told = plain_sentence(ended.exc_value) if ended.exc_value else None
    if told is None:
        threading.__excepthook__(ended)
    else:
        print(f"WARNING: {told}", file=sys.stderr)


def tell_repeats(words: list[str]) -> None:
    """Say which options `words` give more than once, because only their last value counts."""
    names = Counter(word.split("=")[0].replace(".init_args", "") for word in words if word.startswith("--"))
    for name, times in names.items():
        if times > 1 and name != "--config" and not name.endswith("+"):
            rank_zero_info(f"{name} is given {times} times: the last value counts")


def run_small_command(command: str, function: Callable[..., None], words: list[str]) -> None:
    """Call the function of a small command with `words`; a first parameter that is a list takes several of them."""
    first = next(iter(signature(function).parameters.values()))
    named = list(takewhile(lambda word: not word.startswith("-"), words))
    # jsonargparse takes one value per parameter, so the leading words of `report RUN RUN …` become a JSON list
    if first.annotation == "list[str]" and named:
        words = [json.dumps(named), *words[len(named) :]]
    auto_cli(function, args=words, exit_on_error=False, prog=f"beta-dpo {command}", parser_class=WordsParser)


def brief_help(command: str, own: OwnOptions) -> Iterator[str]:
    """Yield the help of `fit`, or of a command that takes its options and its `own`."""

    def wrapped(text: str, indent: str) -> list[str]:
        return textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=indent + "  ")

    yield f"usage: beta-dpo {command} --config FILE [--config FILE …] [--OPTION VALUE …]\n"
    yield from wrapped(
        "A FILE is a path, or the name of a shipped configuration: quickstart, own_pairs, method/dpo. A later "
        "FILE overrides an earlier one, and an OPTION overrides both; --print_config shows the resulting values.",
        "",
    )
    yield from ("", *(f"  --{name:<18}{text}" for name, (_, _, text) in own.items()), *([""] if own else []))
    yield "slots: one callback each; --SLOT null empties one, --SLOT.OPTION VALUE fills it and sets an option"
    for slot in SLOTS:
        yield f"  --{slot.name:<12}{slot.text}{' (on by default)' if slot.on else ''}"
        for kind in slot.kinds:
            yield from wrapped(f"{kind.__name__}: {options_with_defaults(kind)}", " " * 16)
    for part, kinds in PARTS.items():
        yield f"\n--{part} CLASS, --{part}.OPTION VALUE; --{part}.help CLASS says what each option means"
        for kind in kinds:
            yield from wrapped(f"{kind.__name__}: {options_with_defaults(kind)}", "  ")
    yield "\n--seed_everything, --ckpt_path (a checkpoint, or last)"
    yield from wrapped(f"--trainer.OPTION VALUE, Lightning's Trainer: {', '.join(options_of(Trainer))}", "")


def options_with_defaults(kind: type) -> str:
    """Return the names of the options of a class, with the defaults that are booleans, numbers or text."""
    shown = []
    for name, value in options_of(kind).items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        shown.append(f"{name}={text}" if isinstance(value, (str, int, float)) else name)
    return ", ".join(shown)


def trainer_options() -> list[str]:
    """Return the options of `fit`, `validate`, `test` and `predict` for suggestions, without model and data."""
    names = [f"trainer.{name}" for name in options_of(Trainer)]
    for slot in SLOTS:
        names += [slot.name, *(f"{slot.name}.{one}" for kind in slot.kinds for one in options_of(kind))]
    return ["config", "seed_everything", "model", "data", "trainer", "ckpt_path", *names]
