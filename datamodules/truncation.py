"""Plain prompts as tokens, and truncation: whole old turns first, then text within one turn, never a header."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from datamodules.records import Dropped, Message
from datamodules.sources.prompts import is_transcript_prompt, transcript, transcript_turns

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


class PlainPrompt(NamedTuple):
    """The tokens of a prompt (none for an empty one); the first `leading` are special and stay at its start."""

    ids: list[int]
    leading: int


def plain_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[PlainPrompt]:
    """Return the tokens of each text: the tokenizer's special tokens first, BOS at most once, no EOS at the end."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    bos, prompts = tokenizer.bos_token_id, []
    for ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        body = [token for token, is_added in zip(ids, added, strict=False) if not is_added]
        # with an empty text, leading and trailing special tokens look alike; such a prompt is dropped anyway
        leading = added.index(0) if body else 0
        while body and body[-1] == tokenizer.eos_token_id:
            body.pop()
        found = [*ids[:leading], *body] if body else []
        while bos is not None and found[:2] == [bos, bos]:
            del found[0]
        prompts.append(PlainPrompt(found, max(leading, int(found[:1] == [bos]))))
    return prompts


def shorten_plain(
    text: str, prompt: PlainPrompt, limit: int, keep: PromptTruncation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[str]]:
    """Return at most `limit` tokens of a prompt, and notes on what was cut.

    An HH dialogue loses whole old turns first. Other text is cut at the end that `keep` does not name; "keep_end"
    also keeps the leading special tokens.
    """
    if is_transcript_prompt(text):

        def encode(turns: Sequence[Message]) -> list[int]:
            return plain_prompts(tokenizer, [transcript(turns)])[0].ids

        turns, cut = shorten(transcript_turns(text), encode, limit, keep, tokenizer)
        return encode(turns), cut
    ids = prompt.ids
    if keep == "keep_start":
        return ids[:limit], ["prompt truncated"]
    head = ids[: min(prompt.leading, limit)]
    tail = ids[len(ids) - (limit - len(head)) :]
    while head and tail and tail[0] == head[-1]:  # the text may itself spell the BOS, which would then occur twice
        del tail[0]
    return head + tail, ["prompt truncated"]
