"""The judge that asks a language model on any server with OpenAI's chat-completions API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np

from app.core.errors import UserError
from app.core.files import shipped
from app.judges import Answer
from app.judges.answers import dialogue_text
from app.judges.server import Client, Endpoint
from app.judges.verdicts import VerdictFile, verdict_key

PLACES = {"prompt", "first", "second"}
SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the answer that is shown first
NAMED = 3  # number of refused pairs and reasons that are printed
_VERDICT = re.compile(r"verdict\W*\b(A|B|tie)\b", re.IGNORECASE)
_ALONE = re.compile(r"\W*(A|B|tie)\W*", re.IGNORECASE)


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
        self.client = Client(settings)
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

    def describe(self, answers: Sequence[Answer]) -> dict[str, np.ndarray]:
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

        def ask(client: Any, question: Question) -> None:
            reply = self._reply(client, question.text)
            self.verdicts.add(question.key, model=self.model, verdict=parse_verdict(reply), reply=reply)

        def refused(question: Question, reason: str) -> None:
            self._refused[question.key] = reason  # not stored, so the next run asks again

        self.client.ask_all(
            list(new.values()),
            ask,
            refused,
            lambda: (
                f"{self.verdicts.path} keeps {len(self.verdicts)} verdicts, and the same command continues from "
                "there."
            ),
        )

    def _reply(self, client: Any, text: str) -> str:
        options = {} if self.settings.temperature is None else {"temperature": self.settings.temperature}
        answer = client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": text}],
            max_completion_tokens=self.settings.max_tokens,
            **options,
        )
        return answer.choices[0].message.content or ""


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
