from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import UserError
from datamodules.controlled_task import Kind, grade
from datamodules.controlled_task.grammar import ADVERBS, ANIMALS, CLOSINGS, OPENERS, VALUES, WORDS

PROMPT = (
    "\n\nHuman: my lion has colour red , food fish , home cave and mood calm ."
    " can you tell me its food and mood ?\n\nAssistant:"
)

SENTENCE = " sure the lion clearly has food fish and mood calm today ."

# The grammar once more, as one regular expression that shares no code with the parser.
_CLAIM = "(?:" + "|".join(f"{name} (?:{'|'.join(values)})" for name, values in VALUES.items()) + ")"
GRAMMAR = re.compile(
    rf" ?(?:{'|'.join(OPENERS)}) the (?:{'|'.join(ANIMALS)})(?: (?:{'|'.join(ADVERBS)}))? has"
    rf" (?P<first>{_CLAIM}) and (?P<second>{_CLAIM})(?: (?:{'|'.join(CLOSINGS)}))? \."
)


def matches_grammar(text: str) -> bool:
    match = GRAMMAR.fullmatch(text)
    return match is not None and match["first"].split()[0] != match["second"].split()[0]


@pytest.mark.parametrize(
    ("response", "kind", "reward"),
    [
        (" ugh the lion has food fish and mood calm .", Kind.RUDE, 0.0),
        (" meh the lion has colour blue and home barn .", Kind.RUDE, 0.0),
        (" well the lion has colour red and home cave .", Kind.OFF_TOPIC, 1.0),
        (" sure the lion has home barn and colour blue .", Kind.OFF_TOPIC, 1.5),
        (" so the lion has food fish and home cave .", Kind.OFF_TOPIC, 1.0),  # only one of the two asked
        (" so the tiger has food fish and mood calm .", Kind.OFF_TOPIC, 1.0),  # another animal
        (" okay the lion has food nuts and mood shy .", Kind.BOTH_WRONG, 2.0),
        (" gladly the lion has food nuts and mood shy .", Kind.BOTH_WRONG, 2.5),
        (" hm the lion clearly has food fish and mood shy .", Kind.ONE_RIGHT, 3.0),
        (" certainly the lion has food nuts and mood calm today .", Kind.ONE_RIGHT, 3.5),
        (" look the lion indeed has food fish and mood calm now .", Kind.BOTH_RIGHT, 4.0),
        (" happily the lion has food fish and mood calm .", Kind.BOTH_RIGHT, 4.5),
        (" happily the lion has mood calm and food fish .", Kind.BOTH_RIGHT, 4.5),  # the other order
        ("happily the lion has food fish and mood calm .", Kind.BOTH_RIGHT, 4.5),  # space lost in decoding
    ],
)
def test_well_formed_responses_have_their_exact_reward(response: str, kind: Kind, reward: float) -> None:
    judged = grade(PROMPT, response)
    assert (judged.kind, judged.reward) == (kind, reward)
    assert grade(PROMPT, response).reward == reward
    assert not grade(PROMPT, response).malformed


@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        " .",
        " the lion has food fish and mood calm .",  # no opener
        " sure sure the lion has food fish and mood calm .",
        " sure the lion has food fish and mood calm",  # cut short
        " sure the lion has food fish and food nuts .",  # attribute repeated
        " sure the lion has food calm and mood fish .",  # values of the wrong attribute
        " sure the lion has food fish and mood calm and home cave .",  # runs on
        " sure the lion has food fish and mood calm . the lion has home cave .",
        " sure the lion today has food fish and mood calm clearly .",  # empty words in the wrong place
        " sure the lion clearly clearly has food fish and mood calm .",
        "  sure the lion has food fish and mood calm .",  # two spaces
        " sure the lion has food fish and mood calm . ",
        " sure the lion\nhas food fish and mood calm .",
        " Sure the lion has food fish and mood calm .",
        " sure the lion has food fish and mood calm .\n\nHuman: my",
        "\N{SNOWMAN}",
    ],
)
def test_malformed_responses_have_reward_zero(response: str) -> None:
    assert grade(PROMPT, response).kind is Kind.MALFORMED
    assert grade(PROMPT, response).reward == 0
    assert grade(PROMPT, response).malformed


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "hello",
        PROMPT.removesuffix("\n\nAssistant:"),
        PROMPT.replace("lion", "unicorn"),
        PROMPT.replace("food fish", "food calm"),
        PROMPT.replace("its food and mood", "its food and food"),
        PROMPT.replace("its food and mood", "its food and price"),
        PROMPT.replace("tell me", "tell  me"),
        PROMPT + " ",
    ],
)
def test_a_foreign_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="not a prompt of the controlled task"):
        grade(prompt, " sure the lion has food fish and mood calm .")


WORD_LISTS = st.lists(st.sampled_from((*WORDS, "<unk>", "\n\nHuman:", "")), max_size=14)


@settings(deadline=None, max_examples=200)
@given(WORD_LISTS.map(lambda words: " " + " ".join(words)) | st.text(max_size=40))
def test_random_text_never_crashes_the_parser(text: str) -> None:
    assert (not grade(PROMPT, text).malformed) == matches_grammar(text)


def test_responses_with_random_edits_are_well_formed_exactly_when_the_grammar_says_so() -> None:
    # Near misses: most sentences of random words are far from the grammar.
    rng = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(4000):
        words = SENTENCE.split()
        for _ in range(rng.choice((1, 1, 2, 3))):
            place = rng.randrange(len(words))
            edit = rng.choice(("replace", "replace", "delete", "insert", "swap"))
            if edit == "replace":
                words[place] = rng.choice(WORDS)
            elif edit == "delete" and len(words) > 1:
                del words[place]
            elif edit == "insert":
                words.insert(place, rng.choice(WORDS))
            else:
                other = rng.randrange(len(words))
                words[place], words[other] = words[other], words[place]
        text = " " + " ".join(words)
        well_formed = not grade(PROMPT, text).malformed
        assert well_formed == matches_grammar(text), text
        seen[well_formed] += 1
    assert min(seen.values()) > 100
