"""The small commands, each a file with one function, whose signature is the command line."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

COMMANDS = ("quickstart", "generate", "judge", "pairs", "report", "audit", "export", "convert")


def function_of(command: str) -> Callable[..., Any]:
    """Return the function of one of the `COMMANDS` without loading what the others need."""
    function: Callable[..., Any] = getattr(import_module(f"app.commands.{command}"), command)
    return function
