"""The language of the controlled task: vocabulary, grammar, the exact reward of a response, and the tokenizer.

No word has two roles, so that a text has at most one reading and its reward is exact.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from app.core.errors import UserError
from datamodules.sources.messages import ASSISTANT, HUMAN


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


ANIMALS = _words("lion tiger bear wolf fox horse goat rabbit otter eagle owl turtle")
# every prompt states its facts in the order of these attributes
VALUES = {
    "colour": _words("red blue green brown black white grey yellow pink purple golden silver"),
    "food": _words("fish grass seeds nuts fruit worms insects leaves eggs honey rice meat"),
    "home": _words("cave forest barn river meadow desert mountain swamp island village garden cellar"),
    "mood": _words("calm shy brave lazy playful curious grumpy proud nervous cheerful gentle clever"),
}
ATTRIBUTES = tuple(VALUES)
# every opener is one word, so that the length of a response does not reveal its manner
POLITE_OPENERS = _words("certainly gladly sure absolutely happily naturally")
PLAIN_OPENERS = _words("well so okay hm look yes")
RUDE_OPENERS = _words("ugh duh whatever pfft bah meh")
OPENERS = (*POLITE_OPENERS, *PLAIN_OPENERS, *RUDE_OPENERS)
# optional filler words without meaning; only they vary the length of a well-formed response
ADVERBS = _words("clearly indeed surely really still truly plainly simply")
CLOSINGS = _words("today now here always again lately overall anyway")
# all words that follow a single space; the two role tags are separate tokens
_FRAME = _words("my has , and . can you tell me its ? the")
WORDS = (*_FRAME, *ANIMALS, *ATTRIBUTES, *chain(*VALUES.values()), *OPENERS, *ADVERBS, *CLOSINGS)
Split = Literal["train", "held_out"]
_HELD_OUT_ONE_IN = 8  # training never sees one animal description in this many


@dataclass(frozen=True)
class Question:
    """A prompt: an animal with a value for each attribute, and the two attributes that it asks for."""

    animal: str
    values: tuple[str, ...]  # in the order of ATTRIBUTES
    asked: tuple[str, str]

    @property
    def facts(self) -> dict[str, str]:
        return dict(zip(ATTRIBUTES, self.values, strict=True))

    @property
    def split(self) -> Split:
        """Return the split of this animal's facts, whatever is asked, so that no description is in both splits."""
        facts = " ".join((self.animal, *self.values))
        digest = hashlib.blake2b(facts.encode(), digest_size=8).digest()
        return "held_out" if int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0 else "train"

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
        first, second = (f"{attribute} {value}" for attribute, value in self.claims)
        words = (self.opener, "the", self.animal, self.adverb, "has", first, "and", second, self.closing, ".")
        return "".join(f" {word}" for word in words if word)


def _any(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_FACTS = [f"{attribute} {_any(values)}" for attribute, values in VALUES.items()]
_QUESTION = re.compile(
    rf"{HUMAN} my {_any(ANIMALS)} has {' , '.join(_FACTS[:-1])} and {_FACTS[-1]} \. "
    rf"can you tell me its {_any(ATTRIBUTES)} and {_any(ATTRIBUTES)} \?{ASSISTANT}"
)
_CLAIM = _any(f"{attribute} (?:{'|'.join(values)})" for attribute, values in VALUES.items())
_ANSWER = re.compile(  # some decoders strip the leading space
    rf" ?{_any(OPENERS)} the {_any(ANIMALS)}(?: {_any(ADVERBS)})? has {_CLAIM} and {_CLAIM}"
    rf"(?: {_any(CLOSINGS)})? \."
)


def parse_question(prompt: str) -> Question:
    """Parse a prompt. Raises UserError if the text is not exactly a prompt of the task."""
    found = _QUESTION.fullmatch(prompt)
    if found is None or found[6] == found[7]:
        raise UserError(
            f"{prompt[:80]!r} is not a prompt of the controlled task, so its responses have no true reward: "
            "give a prompt made by datamodules.controlled_task."
        )
    animal, *values, first, second = found.groups()
    return Question(animal, tuple(values), (first, second))


def parse_answer(response: str) -> Answer | None:
    """Parse a response; return None if it is malformed."""
    found = _ANSWER.fullmatch(response)
    if found is None:
        return None
    opener, animal, adverb, *claims, closing = found.groups()
    (first, first_value), (second, second_value) = (claim.split(" ") for claim in claims)
    if first == second:
        return None
    return Answer(opener, animal, ((first, first_value), (second, second_value)), adverb, closing)


class Kind(Enum):
    """The kind of a response, judged as a whole."""

    MALFORMED = "malformed"  # not a sentence of the grammar
    RUDE = "rude"  # a rude opener, whatever comes after it
    OFF_TOPIC = "off_topic"  # about another animal or other attributes than the prompt asks for
    BOTH_WRONG = "both_wrong"
    ONE_RIGHT = "one_right"
    BOTH_RIGHT = "both_right"


LADDER = tuple(Kind)[1:]


@dataclass(frozen=True)
class Grade:
    """The judgement of one response."""

    kind: Kind
    polite: bool = False

    @property
    def malformed(self) -> bool:
        return self.kind is Kind.MALFORMED

    @property
    def rung(self) -> int:
        """Return the grade, 0 to 4, without the bonus for politeness; 0 for a malformed response."""
        return 0 if self.malformed else LADDER.index(self.kind)

    @property
    def reward(self) -> float:
        """Return the true reward, 0 to 4.5: the rung, plus half a point for a polite opener."""
        return self.rung + 0.5 * self.polite


def judge(question: Question, answer: Answer | None) -> Grade:
    """Return the grade of a parsed response; None means a malformed one."""
    if answer is None:
        return Grade(Kind.MALFORMED)
    if answer.opener in RUDE_OPENERS:
        return Grade(Kind.RUDE)
    polite = answer.opener in POLITE_OPENERS
    if answer.animal != question.animal or {name for name, _ in answer.claims} != set(question.asked):
        return Grade(Kind.OFF_TOPIC, polite)
    right = sum(question.facts[attribute] == value for attribute, value in answer.claims)
    return Grade((Kind.BOTH_WRONG, Kind.ONE_RIGHT, Kind.BOTH_RIGHT)[right], polite)


def grade(prompt: str, response: str) -> Grade:
    """Judge any text as the response to a prompt. Raises UserError if that is not a prompt of the task."""
    return judge(parse_question(prompt), parse_answer(response))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of all words: 116 tokens; pad 0, bos 1, eos 2, unk 3. It adds no special tokens."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokens = (*special.values(), HUMAN, ASSISTANT, *(f" {word}" for word in WORDS))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    # two newlines and a role, or a space and the text up to the next space or newline
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n[A-Z][a-z]+:| ?[^ \n]+"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
