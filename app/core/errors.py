"""The exceptions for a user's mistake, and the first line of any other."""


class UserError(Exception):
    """A mistake that the user can correct; its text is one sentence with the file, line or field and the cure.

    The `beta-dpo` command prints the text without a traceback and exits with status 2.
    """


class StepRefused(UserError):
    """The exception for a step that was refused before it changed weights, optimizer or callbacks.

    Every rank raises it, so that all ranks can still write a checkpoint together.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
