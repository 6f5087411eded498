"""Truncation of a dialogue: whole old turns first, then text within one turn, never a header."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from datamodules.records import Dropped, Message

PromptTruncation = Literal["keep_end", "keep_start"]
OLD_TURNS = "prompt truncated: old turns dropped"
LAST_TURN = "prompt truncated: within the last turn"


def shorten(
    turns: Sequence[Message],
    encode: Callable[[Sequence[Message]], Sequence[int]],
    limit: int,
    keep: PromptTruncation,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Message], list[str]]:
    """Return the turns, cut so that `encode` gives at most `limit` tokens, and notes on what was cut.

    The oldest turns are dropped first, so that a user turn comes first; the system turn stays. If that is not
    enough, the longest remaining user or tool text is cut at its start or, with "keep_start", at its end.
    Raises Dropped when not one token of that text fits.
    """
    system = list(turns[:1]) if turns[0].role == "system" else []
    rest = list(turns[len(system) :])
    starts = [index for index, turn in enumerate(rest) if turn.role == "user"] or [0]
    for start in starts:
        kept, notes = system + rest[start:], [OLD_TURNS] * bool(start)
        excess = len(encode(kept)) - limit
        if excess <= 0:
            return kept, notes
    places = [place for place in range(len(system), len(kept)) if kept[place].role in ("user", "tool")]
    place = max(places or [len(kept) - 1], key=lambda index: len(kept[index].content))
    ids = tokenizer(kept[place].content, add_special_tokens=False, verbose=False)["input_ids"]
    room = len(ids) - excess
    while room >= 1:
        some = ids[-room:] if keep == "keep_end" else ids[:room]
        piece = str(tokenizer.decode(some, clean_up_tokenization_spaces=False))
        # the cut may fall within a character of several tokens
        piece = piece.lstrip("\ufffd") if keep == "keep_end" else piece.rstrip("\ufffd")
        shorter = [*kept[:place], Message(**{**kept[place], "content": piece}), *kept[place + 1 :]]
        excess = len(encode(shorter)) - limit
        if excess <= 0 and piece.strip():
            return shorter, [*notes, LAST_TURN]
        room -= max(excess, 1)
    raise Dropped("headers and system turn exceed data.max_prompt_length")
