"""The grammar of the controlled task: records of prompts and well-formed responses, their texts and parsers.

A parser reads the words by position, builds a record, and compares the record's text with its input, so that
parsing is the exact inverse of writing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from app.errors import UserError
from datamodules.controlled_task.vocabulary import (
    ADVERBS,
    ANIMALS,
    ASSISTANT,
    ATTRIBUTES,
    CLOSINGS,
    HUMAN,
    OPENERS,
    VALUES,
)

Split = Literal["train", "held_out"]

HELD_OUT_ONE_IN = 8  # training never sees one animal description in this many


@dataclass(frozen=True)
class Question:
    """A prompt: an animal with a value for each attribute, and the two attributes that it asks for."""

    animal: str
    values: tuple[str, ...]  # in the order of ATTRIBUTES
    asked: tuple[str, str]

    @property
    def facts(self) -> dict[str, str]:
        """Return the true value of each attribute."""
        return dict(zip(ATTRIBUTES, self.values, strict=True))

    @property
    def unasked(self) -> tuple[str, str]:
        """Return the two attributes that the prompt does not ask for, in the order of the facts."""
        first, second = (attribute for attribute in ATTRIBUTES if attribute not in self.asked)
        return first, second

    @property
    def split(self) -> Split:
        """Return the split of this animal's facts, whatever is asked, so that no description is in both splits."""
        facts = " ".join((self.animal, *self.values))
        digest = hashlib.blake2b(facts.encode(), digest_size=8).digest()
        return "held_out" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"

    @property
    def text(self) -> str:
        """Return the prompt as an HH transcript: 26 tokens."""
        described = [f"{attribute} {value}" for attribute, value in self.facts.items()]
        facts = f"my {self.animal} has {' , '.join(described[:-1])} and {described[-1]} ."
        return f"{HUMAN} {facts} can you tell me its {self.asked[0]} and {self.asked[1]} ?{ASSISTANT}"


@dataclass(frozen=True)
class Answer:
    """A well-formed response: an opener and two claims about an animal, with up to two filler words."""

    opener: str
    animal: str
    claims: tuple[tuple[str, str], tuple[str, str]]  # (attribute, value) of two different attributes
    adverb: str | None = None
    closing: str | None = None

    @property
    def text(self) -> str:
        """Return the response with the leading space of an HH transcript: 10 to 12 tokens."""
        (first, first_value), (second, second_value) = self.claims
        adverb = f" {self.adverb}" if self.adverb else ""
        closing = f" {self.closing}" if self.closing else ""
        subject = f" {self.opener} the {self.animal}{adverb} has"
        return f"{subject} {first} {first_value} and {second} {second_value}{closing} ."


def parse_question(prompt: str) -> Question:
    """Parse a prompt of the task into its record.

    Raises UserError if the text is not exactly a prompt of the task.
    """
    words = prompt.removeprefix(HUMAN).removesuffix(ASSISTANT).split(" ")
    if len(words) == 25:
        # "", my, animal, has, four (attribute, value, separator), can you tell me its, asked, and, asked, ?
        question = Question(words[2], tuple(words[5:16:3]), (words[21], words[23]))
        known = question.animal in ANIMALS and all(
            value in VALUES[attribute] for attribute, value in question.facts.items()
        )
        asks = all(asked in ATTRIBUTES for asked in question.asked) and len(set(question.asked)) == 2
        if known and asks and question.text == prompt:
            return question
    raise UserError(
        f"{prompt[:80]!r} is not a prompt of the controlled task, so its responses have no true reward: "
        "give a prompt made by datamodules.controlled_task."
    )


def parse_answer(response: str) -> Answer | None:
    """Parse any text as a response: return its record, or None if it is malformed.

    The leading space may be missing, because some decoders strip it; any other deviation is malformed.
    """
    text = " " + response.removeprefix(" ")
    words = text[1:].split(" ")
    adverb = words.pop(3) if len(words) > 3 and words[3] in ADVERBS else None
    closing = words.pop(-2) if len(words) > 1 and words[-2] in CLOSINGS else None
    if len(words) != 10:
        return None
    opener, _, animal, _, first, first_value, _, second, second_value, _ = words
    claims = ((first, first_value), (second, second_value))
    if opener not in OPENERS or animal not in ANIMALS or first == second:
        return None
    if any(value not in VALUES.get(attribute, ()) for attribute, value in claims):
        return None
    answer = Answer(opener, animal, claims, adverb, closing)
    return answer if answer.text == text else None
