"""The small commands, each a file with one function, whose signature is the command line."""

from collections.abc import Callable

from app.commands.audit import audit
from app.commands.convert import convert
from app.commands.export import export
from app.commands.generate import generate
from app.commands.judge import judge
from app.commands.pairs import pairs
from app.commands.quickstart import quickstart
from app.commands.report import report

COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "generate": generate,
    "judge": judge,
    "pairs": pairs,
    "report": report,
    "audit": audit,
    "export": export,
    "convert": convert,
}
__all__ = ["COMMANDS"]
