"""Running one command of `beta-dpo`, with one sentence for the user if it fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from inspect import signature
from itertools import takewhile
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser, auto_cli
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.cli.help import brief_help, trainer_options
from app.cli.mistakes import causes, plain_sentence
from app.cli.parse_errors import sentence
from app.cli.planning import PlanCLI, run_plan
from app.cli.showing import ShowCLI, run_show
from app.cli.trainer import PartsCLI, be_quiet, run_trainer_command
from app.commands import COMMANDS, function_of
from app.core.errors import UserError
from callbacks.run_checkpoint import Interrupted

RESUME = "The same command with --ckpt_path last resumes from the last checkpoint."
AFRESH = "The same command starts from the beginning and keeps what was made beside it."
AGAIN = "Give the same command again; what it says it keeps is not done twice."

# gloo's messages on the remaining ranks when one is lost
RANK_LOST = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer")


class WordsParser(ArgumentParser):
    """A parser whose help shows a list without an option as words, as `_leading_words_as_list` takes it."""

    def format_help(self, *given: Any, **more: Any) -> str:
        for action in self._actions:
            if not action.option_strings and action.metavar == "[ITEM,...]":
                action.metavar = f"{action.dest.upper()} [...]"
        return super().format_help(*given, **more)


def run(command: str, arguments: list[str]) -> None:
    """Run `command`, the first of `arguments`. Exits with status 2 and one sentence if the user made a mistake."""
    be_quiet()
    advice = {"fit": RESUME, "quickstart": AFRESH}.get(command, AGAIN)
    if threading.current_thread() is threading.main_thread():  # which alone handles signals
        signal.signal(signal.SIGTERM, _end)  # while a run trains, `RunCheckpoint` handles it
    try:
        if command in COMMANDS:
            function = function_of(command)
            args = _leading_words_as_list(function, arguments[1:])
            name = f"beta-dpo {command}"
            auto_cli(function, args=args, exit_on_error=False, prog=name, parser_class=WordsParser)
        else:
            own = {"plan": (PlanCLI, run_plan), "show": (ShowCLI, run_show)}
            options, answer = own.get(command, (PartsCLI, run_trainer_command))
            if {"-h", "--help"} & set(arguments):
                print("\n".join(brief_help(command, options.own)))
                sys.exit()
            answer(arguments)
    except UserError as error:
        _leave(str(error))
    except ArgumentError as error:
        said = next((str(cause) for cause in causes(error) if isinstance(cause, UserError)), None)
        known = list(signature(function_of(command)).parameters) if command in COMMANDS else trainer_options()
        _leave(said or sentence(str(error), command, known))
    except Interrupted as stop:
        _leave(f"{stop}: the same command with --ckpt_path last resumes from there.", stop.exit_status)
    except SIGTERMException:
        _leave(f"stopped by SIGTERM. {advice}", 143)
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning exits with status 1 on Ctrl-C
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        _leave(f"stopped by Ctrl-C. {advice}", 130)
    except Exception as error:
        if any(sign in str(error) for sign in RANK_LOST):
            _leave(f"another rank has ended, or does not answer: its own messages tell more. {RESUME}", 1)
        told = plain_sentence(error)
        if told is None:
            raise
        _leave(told)


def _end(*_: object) -> NoReturn:
    """End the command by an exception, so that it removes what it has half written."""
    raise SIGTERMException


def _leading_words_as_list(function: Callable[..., None], words: list[str]) -> list[str]:
    """Return `words` with the leading ones joined into one JSON list if the first parameter is a list.

    jsonargparse takes one value per parameter, and `report RUN RUN --out …` has several.
    """
    first = next(iter(signature(function).parameters.values()))
    named = list(takewhile(lambda word: not word.startswith("-"), words))
    if first.annotation != "list[str]" or not named:
        return words
    return [json.dumps(named), *words[len(named) :]]


def _leave(sentence: str, status: int = 2) -> NoReturn:
    if status == 2 and os.environ.get("BETA_DPO_TRACEBACK"):
        traceback.print_exc()
    print(f"beta-dpo: {sentence}", file=sys.stderr)
    sys.exit(status)
