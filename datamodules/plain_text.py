"""Tokenisation and truncation of plain-text prompts, with the tokenizer's own special tokens before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from datamodules.records import Message
from datamodules.sources.hh import is_transcript_prompt, transcript, transcript_turns
from datamodules.truncation import PromptTruncation, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
