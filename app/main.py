"""The `beta-dpo` command, which answers at once if it needs no library, and else announces that it loads them."""

from __future__ import annotations

import ast
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from app.commands import COMMANDS
from app.core.errors import RESUME, leave, suggestion

TRAINER_COMMANDS = {
    "fit": "Train SFT or preference optimisation, as the configuration says.",
    "validate": "Evaluate on the validation pairs, at fixed β0 and without filter.",
    "test": "Evaluate on the test pairs in the same way.",
    "predict": "Score every pair of data.path and write scores.parquet.",
    "show": "Print the first pairs as `fit` trains on them, and count what is cut and left out, with reasons.",
    "plan": "Print the memory of a `fit` per device, and the largest micro-batch that fits.",
}

AFRESH = "The same command starts from the beginning and keeps what was made beside it."
AGAIN = "Give the same command again; what it says it keeps is not done twice."
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # torchrun's, Slurm's and Lightning's
# variables whose numbers libraries read, some while they are imported
NUMBERS = (
    *(*RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("PL_GLOBAL_SEED", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"),
)


class Ended(SystemExit):
    """The exception by which a signal, its argument, ends the command, which removes what it has half written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exits with status 2 and one sentence if the user made a mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    advice = {"fit": RESUME, "quickstart": AFRESH}.get(words[0], AGAIN)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # which alone handles signals
        # while a run trains, `RunCheckpoint` handles them
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, _end)
    try:
        answer(words)
        sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning exits with status 1 on Ctrl-C
        if type(end) is SystemExit and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        number = end.args[0] if isinstance(end, Ended) else signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        leave(f"stopped by {name}. {advice}", 128 + number)
    except OSError as error:  # of the standard output: `run` answers for all other files
        # Python flushes again at its end, into the pipe that nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            leave(f"stopped, because nobody reads its output any more ({error})", 128 + signal.SIGPIPE)
        leave(f"stopped, because its output cannot be written ({error})")
    finally:
        for one, handler in before.items():  # else a signal at the interpreter's end prints a traceback
            signal.signal(one, handler)


def answer(words: list[str]) -> None:
    """Run the command that the first of `words` names, after a check of the environment."""
    command = words[0]
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        print(f"beta-dpo {version('beta-dpo')}")
    elif command not in (known := [*TRAINER_COMMANDS, *COMMANDS]):
        leave(f"There is no command {command!r}.{suggestion(command.lower(), known)} See `beta-dpo --help`.")
    else:
        for name in NUMBERS:
            value = os.environ.get(name, "")
            if not value.strip():
                os.environ.pop(name, None)  # an empty variable is an unset one, which not every library knows
            elif not value.replace(",", "").isdecimal():
                told = f"{name} is {value!r}, where a whole number belongs: correct or unset it"
                leave(f"The environment variable {told}.")
        if "torch" not in sys.modules and all(os.environ.get(rank, "0") == "0" for rank in RANKS):
            print(f"beta-dpo {command}: loading PyTorch, Lightning and transformers", file=sys.stderr, flush=True)
        from app.cli.dispatch import run

        run(command, words)


def _end(number: int, _: object) -> NoReturn:
    raise Ended(number)


def overview() -> str:
    """Return the text of `beta-dpo --help`."""
    table = TRAINER_COMMANDS | {name: summary(name) for name in COMMANDS}
    lines = "\n".join(f"  {name:<10} {text}" for name, text in table.items())
    return (
        "usage: beta-dpo COMMAND [--config FILE …] [options]\n\nPreference training with dynamic β.\n\n"
        f"{lines}\n\n`beta-dpo COMMAND --help` lists the options of a command."
    )


def summary(command: str) -> str:
    """Return the first line of a small command's docstring, without importing the command."""
    source = (Path(__file__).parent / "commands" / f"{command}.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    text = next(ast.get_docstring(node) for node in functions if node.name == command)
    return (text or "").splitlines()[0]


if __name__ == "__main__":
    main()
