"""The closed vocabulary of the controlled preference task: every word of its texts, by role.

No word has two roles, so that a text has at most one reading and its reward is exact.
"""

from __future__ import annotations

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

ANIMALS = (
    *("lion", "tiger", "bear", "wolf", "fox", "horse"),
    *("goat", "rabbit", "otter", "eagle", "owl", "turtle"),
)

# Every prompt states its facts in the order of these attributes.
VALUES: dict[str, tuple[str, ...]] = {
    "colour": (
        *("red", "blue", "green", "brown", "black", "white"),
        *("grey", "yellow", "pink", "purple", "golden", "silver"),
    ),
    "food": (
        *("fish", "grass", "seeds", "nuts", "fruit", "worms"),
        *("insects", "leaves", "eggs", "honey", "rice", "meat"),
    ),
    "home": (
        *("cave", "forest", "barn", "river", "meadow", "desert"),
        *("mountain", "swamp", "island", "village", "garden", "cellar"),
    ),
    "mood": (
        *("calm", "shy", "brave", "lazy", "playful", "curious"),
        *("grumpy", "proud", "nervous", "cheerful", "gentle", "clever"),
    ),
}
ATTRIBUTES = tuple(VALUES)

# Every opener is one word, so that the length of a response does not reveal its manner.
POLITE_OPENERS = ("certainly", "gladly", "sure", "absolutely", "happily", "naturally")
PLAIN_OPENERS = ("well", "so", "okay", "hm", "look", "yes")
RUDE_OPENERS = ("ugh", "duh", "whatever", "pfft", "bah", "meh")
OPENERS = (*POLITE_OPENERS, *PLAIN_OPENERS, *RUDE_OPENERS)

# Optional filler words without meaning; only they vary the length of a well-formed response.
ADVERBS = ("clearly", "indeed", "surely", "really", "still", "truly", "plainly", "simply")
CLOSINGS = ("today", "now", "here", "always", "again", "lately", "overall", "anyway")

FRAME_WORDS = ("my", "has", ",", "and", ".", "can", "you", "tell", "me", "its", "?", "the")

# All words that follow a single space; the two role tags are separate tokens.
WORDS = (
    *FRAME_WORDS,
    *ANIMALS,
    *ATTRIBUTES,
    *(value for values in VALUES.values() for value in values),
    *OPENERS,
    *ADVERBS,
    *CLOSINGS,
)
