"""Random prompts, responses of a given kind, and broken responses.

The two filler words that set the length are drawn independently of the rest, so the length of a well-formed
response says nothing about its kind. An off-topic response also has wrong values, and a rude one has the kind of
content of the response that it is paired with. Thus nothing in a pair but politeness favours the lower grade, and
neighbouring grades differ in one fault only, which makes them learnable.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from datamodules.controlled_task.grading import LADDER, Kind
from datamodules.controlled_task.grammar import Answer, Question, Split, parse_answer
from datamodules.controlled_task.vocabulary import (
    ADVERBS,
    ANIMALS,
    ATTRIBUTES,
    CLOSINGS,
    PLAIN_OPENERS,
    POLITE_OPENERS,
    RUDE_OPENERS,
    VALUES,
    WORDS,
)

POLITE_SHARE = 0.5
FILLER_SHARE = 0.5  # of each of the two filler words: lengths 10, 11, 12 occur as 1 : 2 : 1


def draw_question(rng: random.Random, split: Split) -> Question:
    """Draw a prompt uniformly from all prompts of the split."""
    while True:
        values = tuple(rng.choice(VALUES[attribute]) for attribute in ATTRIBUTES)
        first, second = rng.sample(ATTRIBUTES, 2)
        question = Question(rng.choice(ANIMALS), values, (first, second))
        if question.split == split:
            return question


def draw_answer(question: Question, kind: Kind, rng: random.Random, *, content: Kind | None = None) -> Answer:
    """Draw a random well-formed response of the given kind (any but malformed).

    `content` is the kind of a rude response after its opener; by default any other kind, equally often.
    """
    polite = rng.random() < POLITE_SHARE
    openers = POLITE_OPENERS if polite else PLAIN_OPENERS
    if kind is Kind.RUDE:
        openers, kind = RUDE_OPENERS, content or rng.choice(LADDER[1:])
    attributes = question.unasked if kind is Kind.OFF_TOPIC else question.asked
    right: tuple[str, ...] = ()
    if kind is Kind.BOTH_RIGHT:
        right = attributes
    elif kind is Kind.ONE_RIGHT:
        right = (rng.choice(attributes),)

    def claim(attribute: str) -> tuple[str, str]:
        truth = question.facts[attribute]
        if attribute in right:
            return attribute, truth
        return attribute, rng.choice([value for value in VALUES[attribute] if value != truth])

    return Answer(
        opener=rng.choice(openers),
        animal=question.animal,
        claims=(claim(attributes[0]), claim(attributes[1])),
        adverb=rng.choice(ADVERBS) if rng.random() < FILLER_SHARE else None,
        closing=rng.choice(CLOSINGS) if rng.random() < FILLER_SHARE else None,
    )


def _drop_word(words: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(words))
    return words[:place] + words[place + 1 :]


def _double_word(words: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(words))
    return words[: place + 1] + words[place:]


def _replace_word(words: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(words))
    return [*words[:place], rng.choice(WORDS), *words[place + 1 :]]


def _cut_short(words: list[str], rng: random.Random) -> list[str]:
    return words[: rng.randrange(1, len(words))]


def _repeat_attribute(words: list[str], rng: random.Random) -> list[str]:
    place = words.index("and")
    attribute = words[place - 2]
    return [*words[: place + 1], attribute, rng.choice(VALUES[attribute]), *words[place + 3 :]]


def _run_on(words: list[str], rng: random.Random) -> list[str]:
    """Add a third claim before the full stop, or a second sentence after it."""
    attribute = rng.choice(ATTRIBUTES)
    claim = [attribute, rng.choice(VALUES[attribute])]
    if rng.random() < 0.5:
        return [*words[:-1], "and", *claim, words[-1]]
    return [*words, "the", words[2], "has", *claim, words[-1]]


_DEFECTS: tuple[Callable[[list[str], random.Random], list[str]], ...] = (
    _drop_word,
    _double_word,
    _replace_word,
    _cut_short,
    _repeat_attribute,
    _run_on,
)


def break_answer(answer: Answer, rng: random.Random) -> str:
    """Return the response with a random defect that makes it malformed, each defect equally often."""
    defect = rng.choice(_DEFECTS)
    words = answer.text[1:].split(" ")
    while True:
        # Without a filler word or with another value, the text may still be well-formed: draw the place again.
        text = " " + " ".join(defect(words, rng))
        if parse_answer(text) is None:
            return text
