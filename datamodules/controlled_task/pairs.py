"""Prompts, demonstrations and preference pairs of the controlled task, with their exact labels.

Generators are seeded by text, so that items are the same on every machine, and a shorter list is the beginning of a
longer one. The filler words, which set the length, are independent of the rest. An off-topic response also has
wrong values, and a rude one has the kind of content of the response that it is paired with: nothing in a pair but
politeness favours the lower grade, and neighbouring grades differ in one fault only, which makes them learnable.
"""

from __future__ import annotations

import itertools
import random
from typing import Literal

from datamodules.controlled_task.grammar import (
    ADVERBS,
    ANIMALS,
    ATTRIBUTES,
    CLOSINGS,
    LADDER,
    PLAIN_OPENERS,
    POLITE_OPENERS,
    RUDE_OPENERS,
    VALUES,
    WORDS,
    Answer,
    Kind,
    Question,
    Split,
    judge,
    parse_answer,
)
from datamodules.records import PreferencePair

FILLER_SHARE = 0.5  # of each of the two filler words: lengths 10, 11, 12 occur as 1 : 2 : 1
Gap = Literal["adjacent", "extreme", "mixed", "any"]

# all unordered pairs of grades, worse first
_LOW_GAP = tuple(itertools.pairwise(LADDER))
_HIGH_GAP = tuple((worse, better) for i, worse in enumerate(LADDER) for better in LADDER[i + 2 :])

MIXED_QUALITY = dict(zip(LADDER, (0.15, 0.20, 0.20, 0.20, 0.25), strict=True))  # of demonstrations


def prompts(count: int, seed: int, *, split: Split = "held_out") -> list[str]:
    """Return `count` prompts to sample responses for."""
    rng = random.Random(f"prompts-{split}-{seed}")
    return [draw_question(rng, split).text for _ in range(count)]


def demonstrations(count: int, seed: int, *, split: Split = "train") -> list[PreferencePair]:
    """Return well-formed responses of `MIXED_QUALITY`, without rejected ones; labels `kind`, `chosen_reward`."""
    rng = random.Random(f"demonstrations-{split}-{seed}")
    items = []
    for index in range(count):
        kind = rng.choices(list(MIXED_QUALITY), weights=list(MIXED_QUALITY.values()))[0]
        question = draw_question(rng, split)
        answer = draw_answer(question, kind, rng)
        labels: dict[str, object] = {"kind": kind.value, "chosen_reward": judge(question, answer).reward}
        pair_id = f"controlled-{split}-demonstration-{seed}-{index:06d}"
        items.append(PreferencePair(pair_id, question.text, answer.text, None, labels))
    return items


def preference_pairs(
    count: int,
    seed: int,
    *,
    split: Split = "train",
    flip_rate: float = 0.15,
    broken_share: float = 0.2,
    gap: Gap = "extreme",
    high_gap_share: float = 0.5,
) -> list[PreferencePair]:
    """Return pairs whose true rewards differ by at least one point, with a known share of flipped labels.

    A share `broken_share` of the pairs has a well-formed response and a broken copy of it. The others have two
    grades. `gap` chooses them: `adjacent` takes neighbouring grades, `extreme` grades at least two apart, `mixed` a
    share `high_gap_share` of the latter and neighbours otherwise, `any` every two grades equally often. The label
    `gap_kind` is "high" for grades two or more apart; a broken response counts as the lowest grade.
    """
    rng = random.Random(f"pairs-{gap}-{split}-{seed}")
    flips = random.Random(f"flips-{gap}-{split}-{seed}")  # its own, so that the texts do not depend on the rate
    every_share = len(_HIGH_GAP) / (len(_LOW_GAP) + len(_HIGH_GAP))
    high_share = {"adjacent": 0.0, "extreme": 1.0, "mixed": high_gap_share, "any": every_share}[gap]
    pairs = []
    for index in range(count):
        question = draw_question(rng, split)
        broken = rng.random() < broken_share
        better, worse = _broken(question, rng) if broken else _graded(question, high_share, rng)
        flipped = flips.random() < flip_rate
        texts = (worse, better) if flipped else (better, worse)
        chosen, rejected = (judge(question, parse_answer(text)) for text in texts)
        labels: dict[str, object] = {
            "flipped": flipped,
            "kind": "broken" if broken else "graded",
            "chosen_reward": chosen.reward,
            "rejected_reward": rejected.reward,
            "gap_kind": "high" if abs(chosen.rung - rejected.rung) >= 2 else "low",
        }
        pair_id = f"controlled-{split}-{gap}-{seed}-{index:06d}"
        pairs.append(PreferencePair(pair_id, question.text, *texts, labels))
    return pairs


def _broken(question: Question, rng: random.Random) -> tuple[str, str]:
    # a broken response has the reward of a rude one, so a rude one cannot be the better of the two
    answer = draw_answer(question, rng.choice(LADDER[1:]), rng)
    return answer.text, break_answer(answer, rng)


def _graded(question: Question, high_share: float, rng: random.Random) -> tuple[str, str]:
    worse_kind, better_kind = rng.choice(_HIGH_GAP if rng.random() < high_share else _LOW_GAP)
    while True:
        better = draw_answer(question, better_kind, rng)
        worse = draw_answer(question, worse_kind, rng, content=better_kind)
        # if only the worse of two neighbours is polite, they differ by half a point: draw again
        if judge(question, better).reward - judge(question, worse).reward >= 1:
            return better.text, worse.text


def draw_question(rng: random.Random, split: Split) -> Question:
    """Draw a prompt uniformly from all prompts of the split."""
    while True:
        values = tuple(rng.choice(VALUES[attribute]) for attribute in ATTRIBUTES)
        first, second = rng.sample(ATTRIBUTES, 2)
        question = Question(rng.choice(ANIMALS), values, (first, second))
        if question.split == split:
            return question


def draw_answer(question: Question, kind: Kind, rng: random.Random, *, content: Kind | None = None) -> Answer:
    """Draw a well-formed response of a kind; a rude one has `content` after its opener, by default of any kind."""
    openers = POLITE_OPENERS if rng.random() < 0.5 else PLAIN_OPENERS
    if kind is Kind.RUDE:
        openers, kind = RUDE_OPENERS, content or rng.choice(LADDER[1:])
    attributes = list(question.asked)
    if kind is Kind.OFF_TOPIC:
        attributes = [attribute for attribute in ATTRIBUTES if attribute not in question.asked]
    right = [rng.choice(attributes)] if kind is Kind.ONE_RIGHT else attributes
    if kind in (Kind.OFF_TOPIC, Kind.BOTH_WRONG):
        right = []

    def claim(attribute: str) -> tuple[str, str]:
        truth = question.facts[attribute]
        wrong = [value for value in VALUES[attribute] if value != truth]
        return attribute, truth if attribute in right else rng.choice(wrong)

    return Answer(
        opener=rng.choice(openers),
        animal=question.animal,
        claims=(claim(attributes[0]), claim(attributes[1])),
        adverb=rng.choice(ADVERBS) if rng.random() < FILLER_SHARE else None,
        closing=rng.choice(CLOSINGS) if rng.random() < FILLER_SHARE else None,
    )


_DEFECTS = ("drop", "double", "replace", "cut short", "repeat attribute", "run on")


def _damaged(words: list[str], defect: str, rng: random.Random) -> list[str]:
    place = rng.randrange(len(words)) if defect in ("drop", "double", "replace") else words.index("and")
    if defect == "drop":
        return words[:place] + words[place + 1 :]
    if defect == "double":
        return words[: place + 1] + words[place:]
    if defect == "replace":
        return [*words[:place], rng.choice(WORDS), *words[place + 1 :]]
    if defect == "cut short":
        return words[: rng.randrange(1, len(words))]
    if defect == "repeat attribute":
        attribute = words[place - 2]
        return [*words[: place + 1], attribute, rng.choice(VALUES[attribute]), *words[place + 3 :]]
    # run on: a third claim before the full stop, or a second sentence after it
    attribute = rng.choice(ATTRIBUTES)
    claim = [attribute, rng.choice(VALUES[attribute])]
    if rng.random() < 0.5:
        return [*words[:-1], "and", *claim, words[-1]]
    return [*words, "the", words[2], "has", *claim, words[-1]]


def break_answer(answer: Answer, rng: random.Random) -> str:
    """Return the response with a random defect that makes it malformed, each defect equally often."""
    defect = rng.choice(_DEFECTS)
    text = answer.text
    # without a filler word or with another value, the text may still be well-formed: draw the place again
    while parse_answer(text) is not None:
        text = " " + " ".join(_damaged(answer.text[1:].split(" "), defect, rng))
    return text
