"""The judge that asks a language model on any server with OpenAI's chat-completions API."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from app.core.errors import UserError
from app.core.files import shipped
from app.judges import Answer
from app.judges.answers import dialogue_text
from app.judges.verdicts import VerdictFile, verdict_key
from app.method.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked

PLACES = {"prompt", "first", "second"}
SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the answer that is shown first
NO_KEY = "none"
NAMED = 3  # number of refused pairs and reasons that are printed
REFUSALS = (400, 413, 422)  # a retry would not help: the question is too long or hits a content filter
_VERDICT = re.compile(r"verdict\W*\b(A|B|tie)\b", re.IGNORECASE)
_ALONE = re.compile(r"\W*(A|B|tie)\W*", re.IGNORECASE)


@checked
@dataclass(frozen=True)
class Endpoint:
    """Settings for asking a language model.

    Args:
        url: base address of the server, up to /v1; null is OpenAI's.
        instructions: text file with the places $prompt, $first and $second; see configs/judge.
        temperature: of the judge; null uses the server's default.
        max_tokens: longest reply, in tokens.
        parallel: number of concurrent questions.
        retries: further attempts when the server is unreachable, busy or failing; the pause doubles from half a
            second up to eight seconds, or is what the server asks for.
        timeout: seconds to wait for a reply.
        api_key_env: environment variable with the key; null is OPENAI_API_KEY for OpenAI's url, and no key for
            other urls.
    """

    url: str | None = None
    instructions: str = "configs/judge/dialogue.txt"
    temperature: NonNegativeFloat | None = 0.0
    max_tokens: PositiveInt = 512
    parallel: PositiveInt = 8
    retries: NonNegativeInt = 6
    timeout: PositiveFloat = 120.0
    api_key_env: str | None = None


class Question(NamedTuple):
    """A question to the judge: one order of a pair."""

    key: str
    text: str


class EndpointJudge:
    """A judge that shows a language model every pair in both orders and scores it with the mean of both verdicts.

    A pair that lacks a verdict in either order has no score (NaN) and is counted. Equal answers are a tie without a
    question.
    """

    def __init__(self, model: str, settings: Endpoint, verdicts: VerdictFile):
        self.model = model
        self.settings = settings
        self.verdicts = verdicts
        self.template = read_instructions(settings.instructions)
        self.api_key = api_key(settings)
        self._seen: list[list[str | None]] = []
        self._refused: dict[str, str] = {}  # refusals of this run: key of the question → the server's reason
        self._refused_pairs: dict[str, None] = {}  # prompt ids of the refused pairs, in order

    def scores(self, ours: Sequence[Answer], theirs: Sequence[Answer]) -> np.ndarray:
        """Return scores [n], asking only questions that the verdict file lacks.

        Raises UserError when the server fails, or when no pair has a readable verdict in both orders.
        """
        asked = [self._both_orders(row, rival) for row, rival in zip(ours, theirs, strict=True)]
        self._ask([question for pair in asked for question in pair])
        scores = np.full(len(asked), 0.5)
        for index, pair in enumerate(asked):
            if pair:
                found: list[str | None] = [
                    None if question.key in self._refused else self.verdicts[question.key]["verdict"]
                    for question in pair
                ]
                self._seen.append(found)
                forth, back = (np.nan if said is None else SCORES[said] for said in found)
                scores[index] = (forth + 1.0 - back) / 2
                if any(question.key in self._refused for question in pair):
                    self._refused_pairs[ours[index]["prompt_id"]] = None
        if self._seen and not self._read():
            raise UserError(
                f"No pair has a readable verdict of {self.model} in both orders: {self._unread()} of "
                f"{2 * len(self._seen)} replies hold none, so there is nothing to compare."
                + "".join(f" The endpoint refused: {reason}." for reason in sorted(set(self._refused.values()))[:1])
            )
        return scores

    def _read(self) -> list[list[str]]:
        """Return the verdicts of the pairs that have both."""
        return [[said for said in pair if said is not None] for pair in self._seen if None not in pair]

    def _unread(self) -> int:
        return sum(said is None for pair in self._seen for said in pair)

    def describe(self, answers: Sequence[Answer]) -> dict[str, float]:
        return {}

    def notes(self) -> list[str]:
        """Return how many verdicts depend on the order, and how many are missing or refused."""
        n = len(self._seen)
        if not n:
            return ["All answers are equal to their rivals: nothing was asked."]
        read = self._read()
        changed = sum(SCORES[forth] + SCORES[back] != 1.0 for forth, back in read)
        first = np.mean([SCORES[said] for pair in read for said in pair])
        named = ", ".join(list(self._refused_pairs)[:NAMED]) + (", …" if len(self._refused_pairs) > NAMED else "")
        reasons = "; ".join(sorted(set(self._refused.values()))[:NAMED])
        return [
            f"{self.model} saw {n} pairs of different answers in both orders. Of the {len(read)} with both "
            f"verdicts the order changed it on {changed}; the answer shown first won {first:.3f} of all.",
            f"{self._unread()} of {2 * n} replies hold no verdict: {n - len(read)} pairs are in no win rate."
            if self._unread()
            else "Every reply holds a verdict.",
            *(
                [f"The endpoint refused {len(self._refused_pairs)} pairs (prompts {named}): {reasons}."]
                if self._refused_pairs
                else []
            ),
        ]

    # --- asking ---------------------------------------------------------------------------------------------

    def _both_orders(self, row: Answer, rival: Answer) -> list[Question]:
        ours, theirs = row["response"].strip(), rival["response"].strip()
        if ours == theirs:
            return []
        prompt = dialogue_text(row["prompt"])
        return [self._question(prompt, ours, theirs), self._question(prompt, theirs, ours)]

    def _question(self, prompt: str, first: str, second: str) -> Question:
        text = self.template.substitute(prompt=prompt, first=first, second=second)
        return Question(
            verdict_key(self.settings.url, self.model, self.settings.temperature, self.settings.max_tokens, text),
            text,
        )

    def _ask(self, questions: Sequence[Question]) -> None:
        new = {question.key: question for question in questions if question.key not in self.verdicts}
        if not new:
            return
        openai = import_openai()
        client = openai.OpenAI(
            base_url=self.settings.url,
            api_key=self.api_key,
            max_retries=self.settings.retries,
            timeout=self.settings.timeout,
        )

        def ask(question: Question) -> None:
            try:
                reply = self._reply(client, question.text)
            except openai.APIStatusError as error:
                if error.status_code not in REFUSALS:
                    raise
                self._refused[question.key] = self._reason(error)  # not stored, so the next run asks again
                return
            self.verdicts.add(question.key, model=self.model, verdict=parse_verdict(reply), reply=reply)

        with ThreadPoolExecutor(self.settings.parallel) as pool, Progress(transient=True) as progress:
            bar = progress.add_task("asking", total=len(new))
            futures = [pool.submit(ask, question) for question in new.values()]
            try:
                for future in futures:
                    future.result()
                    progress.advance(bar)
            except openai.OpenAIError as error:
                pool.shutdown(cancel_futures=True)  # must end before `_failure` counts the verdicts
                raise self._failure(error) from error
            finally:
                pool.shutdown(cancel_futures=True)  # waits for running questions and keeps their verdicts

    def _reply(self, client: Any, text: str) -> str:
        options = {} if self.settings.temperature is None else {"temperature": self.settings.temperature}
        answer = client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": text}],
            max_completion_tokens=self.settings.max_tokens,
            **options,
        )
        return answer.choices[0].message.content or ""

    def _reason(self, error: Exception) -> str:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (reason if self.api_key == NO_KEY else reason.replace(self.api_key, "…")).rstrip(".")

    def _failure(self, error: Exception) -> UserError:
        reason = self._reason(error)
        where, kept = self.settings.url or "The endpoint", len(self.verdicts)
        return UserError(
            f"{where} gave no reply ({reason.rstrip('.')}): {self.verdicts.path} keeps {kept} verdicts, and "
            "the same command continues from there."
        )


def parse_verdict(reply: str) -> str | None:
    """Return "first", "second" or "tie" by the last `Verdict: …` of a reply or by a bare verdict; else None."""
    found = _VERDICT.findall(reply) or [match[1] for match in [_ALONE.fullmatch(reply)] if match]
    return {"a": "first", "b": "second", "tie": "tie"}[found[-1].lower()] if found else None


def read_instructions(path: str) -> Template:
    """Return the template of the question. Raises UserError unless it is readable with exactly the three places."""
    try:
        template = Template(Path(shipped(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"endpoint.instructions: {path} cannot be read: {error.strerror}.") from error
    if not template.is_valid() or set(template.get_identifiers()) != PLACES:
        raise UserError(
            f"{path} must hold the places $prompt, $first and $second and no other; a dollar sign is $$."
        )
    return template


def api_key(settings: Endpoint) -> str:
    """Return the key in `api_key_env`; without it, OPENAI_API_KEY for OpenAI's url and no key for another server.

    The key is never written. Raises UserError if the environment variable is not set.
    """
    name = settings.api_key_env or ("OPENAI_API_KEY" if settings.url is None else None)
    if name is None:
        return NO_KEY
    key = os.environ.get(name)
    if not key:
        raise UserError(f"Set the environment variable {name}, or --endpoint.url to a server that needs no key.")
    return key


def import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError("Asking an endpoint needs one more package: pip install 'beta-dpo[judge]'.") from error
    return openai
