"""A server with OpenAI's API: its address and key, and many questions at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.progress import Progress

from app.core.errors import UserError, first_line
from app.method.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked

NO_KEY = "none"
REFUSALS = (400, 413, 422)  # a retry would not help: the question is too long or hits a content filter
Q = TypeVar("Q")


@checked
@dataclass(frozen=True)
class Server:
    """Settings of the requests to a server with OpenAI's API (OpenAI, vLLM, `transformers serve`, …).

    Args:
        url: base address of the server, up to /v1; null is OpenAI's for a judge, and no server for `generate`.
        parallel: number of concurrent questions.
        retries: further attempts when the server is unreachable, busy or failing; the pause doubles from half a
            second up to eight seconds, or is what the server asks for.
        timeout: seconds to wait for a reply.
        api_key_env: environment variable with the key; null is OPENAI_API_KEY for OpenAI's url, and no key for
            other urls.
    """

    url: str | None = None
    parallel: PositiveInt = 8
    retries: NonNegativeInt = 6
    timeout: PositiveFloat = 120.0
    api_key_env: str | None = None


@checked
@dataclass(frozen=True)
class Endpoint(Server):
    """Settings for asking a language model for verdicts.

    Args:
        instructions: text file with the places $prompt, $first and $second; see configs/judge.
        temperature: of the judge; null uses the server's default.
        max_tokens: longest reply, in tokens.
    """

    instructions: str = "configs/judge/dialogue.txt"
    temperature: NonNegativeFloat | None = 0.0
    max_tokens: PositiveInt = 512


@checked
@dataclass(frozen=True)
class SamplingServer(Server):
    """Settings for sampling through a server.

    Args:
        token_ids: ask for the token ids of prompt and response as well, which vLLM gives and others may refuse.
    """

    token_ids: bool = False


def first_choice(reply: Any) -> tuple[Any, str]:
    """Return the first choice of a reply and its text. Raises ValueError for a reply of another form."""
    try:
        choice = reply.choices[0]
        text = choice.message.content if hasattr(choice, "message") else choice.text
        if text is None or isinstance(text, str):
            return choice, text or ""
    except (AttributeError, TypeError, IndexError):
        pass
    raise ValueError(f"it sent {reply!r:.200}")


class Client:
    """A client that asks many questions at a time. Raises UserError if the variable of the key is not set."""

    def __init__(self, settings: Server) -> None:
        self.settings = settings
        name = settings.api_key_env or ("OPENAI_API_KEY" if settings.url is None else None)
        key = os.environ.get(name) if name else NO_KEY
        if not key:
            raise UserError(f"Set the environment variable {name}, or --endpoint.url to a server without keys.")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"The environment variable {name} holds a character that no key has: set it again.")
        self.api_key = key  # never written

    def ask_all(
        self, questions: Sequence[Q], ask: Callable[[Any, Q], None], kept: Callable[[], str]
    ) -> dict[Q, str]:
        """Call `ask(client, question)` in threads for all questions; return those refused, with the reason of each.

        Raises UserError when the server fails; `kept()` says what the next run need not ask.
        """
        refused: dict[Q, str] = {}
        try:
            import openai
        except ImportError as error:
            raise UserError("Asking an endpoint needs one more package: pip install 'beta-dpo[judge]'.") from error
        url, retries, timeout = self.settings.url, self.settings.retries, self.settings.timeout
        client = openai.OpenAI(base_url=url, api_key=self.api_key, max_retries=retries, timeout=timeout)

        def answer(question: Q) -> None:
            try:
                ask(client, question)
            except openai.APIStatusError as error:
                if error.status_code not in REFUSALS:
                    raise
                refused[question] = self._reason(error)

        with ThreadPoolExecutor(self.settings.parallel) as pool, Progress(transient=True) as progress:
            bar = progress.add_task("asking", total=len(questions))
            futures = [pool.submit(answer, question) for question in questions]
            try:
                for future in futures:
                    future.result()
                    progress.advance(bar)
            except (openai.OpenAIError, ValueError) as error:
                pool.shutdown(cancel_futures=True)  # must end before `kept` counts
                said, cure = "gave no reply", ""
                if isinstance(error, ValueError):  # of `first_choice`, or of the client, which reads the reply
                    said, cure = "is no server of OpenAI's API", "--endpoint.url mostly ends in /v1; "
                where = url or "The endpoint"
                raise UserError(f"{where} {said} ({self._reason(error)}): {cure}{kept()}") from error
            finally:
                pool.shutdown(cancel_futures=True)  # waits for running questions and keeps their answers
        return refused

    def _reason(self, error: Exception) -> str:
        reason = first_line(error)
        return (reason if self.api_key == NO_KEY else reason.replace(self.api_key, "…")).rstrip(".")
