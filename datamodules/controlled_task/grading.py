"""The exact reward of a response: each step up the ladder of grades corrects one fault."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from datamodules.controlled_task.grammar import (
    POLITE_OPENERS,
    RUDE_OPENERS,
    Answer,
    Question,
    parse_answer,
    parse_question,
)

POLITE_BONUS = 0.5


class Kind(Enum):
    """The kind of a response, judged as a whole."""

    MALFORMED = "malformed"  # not a sentence of the grammar
    RUDE = "rude"  # a rude opener, whatever comes after it
    OFF_TOPIC = "off_topic"  # about another animal or other attributes than the prompt asks for
    BOTH_WRONG = "both_wrong"
    ONE_RIGHT = "one_right"
    BOTH_RIGHT = "both_right"


LADDER = (Kind.RUDE, Kind.OFF_TOPIC, Kind.BOTH_WRONG, Kind.ONE_RIGHT, Kind.BOTH_RIGHT)


@dataclass(frozen=True)
class Grade:
    """The judgement of one response."""

    kind: Kind
    polite: bool = False

    @property
    def well_formed(self) -> bool:
        return self.kind is not Kind.MALFORMED

    @property
    def rung(self) -> int:
        """Return the grade, 0 to 4, without the bonus for politeness; 0 for a malformed response."""
        return LADDER.index(self.kind) if self.well_formed else 0

    @property
    def reward(self) -> float:
        """Return the true reward: the rung, plus half a point for a polite opener."""
        return self.rung + POLITE_BONUS * self.polite


def judge(question: Question, answer: Answer | None) -> Grade:
    """Return the grade of a parsed response; None means a malformed one."""
    if answer is None:
        return Grade(Kind.MALFORMED)
    if answer.opener in RUDE_OPENERS:
        return Grade(Kind.RUDE)
    polite = answer.opener in POLITE_OPENERS
    named = {attribute for attribute, _ in answer.claims}
    if answer.animal != question.animal or named != set(question.asked):
        return Grade(Kind.OFF_TOPIC, polite)
    right = sum(question.facts[attribute] == value for attribute, value in answer.claims)
    return Grade((Kind.BOTH_WRONG, Kind.ONE_RIGHT, Kind.BOTH_RIGHT)[right], polite)


def grade(prompt: str, response: str) -> Grade:
    """Judge any text as the response to a prompt of the task.

    Raises UserError if `prompt` is not a prompt of the task; any response is accepted.
    """
    return judge(parse_question(prompt), parse_answer(response))


def true_reward(prompt: str, response: str) -> float:
    """Return the exact reward, 0 to 4.5, of any text as the response to `prompt`; malformed text has 0."""
    return grade(prompt, response).reward


def is_well_formed(prompt: str, response: str) -> bool:
    """Return whether the response is a sentence of the grammar, whatever its grade."""
    return grade(prompt, response).well_formed
