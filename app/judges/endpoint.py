"""A server with OpenAI's API, its address and key, and the judge that asks a language model there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeVar

import numpy as np
from rich.progress import Progress

from app.core.errors import UserError, first_line
from app.core.files import shipped
from app.judges import Answer, Judge
from app.judges.answers import dialogue_text
from app.judges.verdicts import VerdictFile, verdict_key
from app.method.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked

NO_KEY = "none"
REFUSALS = (400, 413, 422)  # a retry would not help: the question is too long or hits a content filter
PLACES = {"prompt", "first", "second"}
SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the answer that is shown first
NAMED = 3  # number of refused pairs and reasons that are printed
# "a" before another word is an article, as in "Verdict: a tie"
_VERDICT = re.compile(r"verdict\W*\b(?:a +(?=tie))?(?!(?-i:a) +\w)(A|B|tie)\b", re.IGNORECASE)
_ALONE = re.compile(r"\W*(A|B|tie)\W*", re.IGNORECASE)
Q = TypeVar("Q")


@checked
@dataclass(frozen=True)
class Server:
    """Settings of the requests to a server with OpenAI's API (OpenAI, vLLM, `transformers serve`, …).

    Args:
        url: base address of the server, up to /v1; null is OpenAI's for a judge, and no server for `generate`.
        parallel: number of concurrent questions.
        retries: further attempts when the server is unreachable, busy or failing, after growing pauses.
        timeout: seconds to wait for a reply.
        api_key_env: environment variable with the key; null is OPENAI_API_KEY for OpenAI's url, else no key.
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
        """Call `ask(client, question)` in threads; return the refused questions with reasons. Raises UserError."""
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


class EndpointJudge(Judge):
    """A judge that shows a language model every pair in both orders and scores it with the mean of both verdicts.

    A pair that lacks a verdict in either order has no score (NaN) and is counted. Equal answers are a tie without a
    question, and no question is asked whose verdict the file has.
    """

    def __init__(self, model: str, settings: Endpoint, verdicts: VerdictFile):
        self.model = model
        self.settings = settings
        self.verdicts = verdicts
        self.template = read_instructions(settings.instructions)
        self.client = Client(settings)
        self._seen: list[list[float]] = []  # per pair the score of the answer shown first, in both orders
        self._refused: dict[str, str] = {}  # prompt ids of the pairs with a refused question, in order → the reason

    def scores(self, ours: Sequence[Answer], theirs: Sequence[Answer]) -> np.ndarray:
        """Return scores [n]. Raises UserError when the server fails, or when no pair has two readable verdicts."""
        asked = [self._both_orders(row, rival) for row, rival in zip(ours, theirs, strict=True)]
        refused = self._ask({key: text for pair in asked for key, text in pair if key not in self.verdicts})
        scores = np.full(len(asked), 0.5)
        for index, pair in enumerate(asked):
            if pair:
                found = [self.verdicts.get(key) for key, _ in pair]  # None if the server refused the question
                forth, back = (SCORES.get(said["verdict"], np.nan) if said else np.nan for said in found)
                self._seen.append([forth, back])
                scores[index] = (forth + 1.0 - back) / 2
                for reason in (refused[key] for key, _ in pair if key in refused):
                    self._refused[ours[index]["prompt_id"]] = reason
        seen = np.array(self._seen)
        if self._seen and np.isnan(seen).any(axis=1).all():
            why = f" The endpoint refused: {min(self._refused.values())}." if self._refused else ""
            unread = next((said["reply"] for said in self.verdicts.values() if said["verdict"] is None), None)
            counts = f"{np.isnan(seen).sum()} of {seen.size} replies hold none"
            counts += "" if unread is None else f", such as {unread!r:.60}"
            raise UserError(f"No pair has a readable verdict of {self.model} in both orders: {counts}.{why}")
        return scores

    def describe(self, answers: Sequence[Answer]) -> dict[str, np.ndarray]:
        return {}

    def notes(self) -> list[str]:
        """Return how many verdicts depend on the order, and how many are missing or refused."""
        if not self._seen:
            return ["All answers are equal to their rivals: nothing was asked."]
        seen = np.array(self._seen)
        read = seen[~np.isnan(seen).any(axis=1)]
        moved, missing = (read.sum(axis=1) != 1).sum(), np.isnan(seen).sum()
        notes = [
            f"{self.model} saw {len(seen)} pairs of different answers in both orders. Of the {len(read)} with both "
            f"verdicts the order changed it on {moved}; the answer shown first won {read.mean():.3f} of all.",
            f"{missing} of {seen.size} replies hold no verdict: {len(seen) - len(read)} pairs are in no win rate."
            if missing
            else "Every reply holds a verdict.",
        ]
        if self._refused:
            prompts = ", ".join(list(self._refused)[:NAMED]) + (", …" if len(self._refused) > NAMED else "")
            reasons = "; ".join(sorted(set(self._refused.values()))[:NAMED])
            notes.append(f"The endpoint refused {len(self._refused)} pairs (prompts {prompts}): {reasons}.")
        return notes

    def _both_orders(self, row: Answer, rival: Answer) -> list[tuple[str, str]]:
        """Return key and text of the question in each order; none for equal answers."""
        ours, theirs = row["response"].strip(), rival["response"].strip()
        if ours == theirs:
            return []
        prompt = dialogue_text(row["prompt"])
        orders = ((ours, theirs), (theirs, ours))
        texts = [self.template.substitute(prompt=prompt, first=one, second=other) for one, other in orders]
        settings = (self.settings.url, self.model, self.settings.temperature, self.settings.max_tokens)
        return [(verdict_key(*settings, text), text) for text in texts]

    def _ask(self, texts: dict[str, str]) -> dict[str, str]:
        """Ask the questions `texts` (by key) and keep their verdicts; return the reasons of refused questions."""
        if not texts:
            return {}
        options: dict[str, Any] = {"model": self.model, "max_completion_tokens": self.settings.max_tokens}
        if self.settings.temperature is not None:
            options["temperature"] = self.settings.temperature

        def ask(client: Any, key: str) -> None:
            answer = client.chat.completions.create(messages=[{"role": "user", "content": texts[key]}], **options)
            reply = first_choice(answer)[1]
            self.verdicts.add(key, model=self.model, verdict=parse_verdict(reply), reply=reply)

        def kept() -> str:
            return f"{self.verdicts.path} keeps {len(self.verdicts)} verdicts, and the same command continues."

        return self.client.ask_all(list(texts), ask, kept)


def parse_verdict(reply: str) -> str | None:
    """Return "first", "second" or "tie" by the last `Verdict: …` of a reply or by a bare verdict; else None."""
    found = _VERDICT.findall(reply) or [match[1] for match in [_ALONE.fullmatch(reply)] if match]
    return {"a": "first", "b": "second", "tie": "tie"}[found[-1].lower()] if found else None


def read_instructions(path: str) -> Template:
    """Return the template of the question. Raises UserError unless it is readable with exactly the three places."""
    try:
        template = Template(Path(shipped(path)).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"endpoint.instructions: {path} cannot be read: {why}.") from error
    if not template.is_valid() or set(template.get_identifiers()) != PLACES:
        raise UserError(f"{path} must hold the places $prompt, $first and $second alone; a dollar sign is $$.")
    return template
