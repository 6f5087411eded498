"""From text to token ids: prompt and response apart, special tokens exactly once, truncation counted."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError

from app.errors import UserError
from datamodules.records import PreferencePair, TokenisedPair
from datamodules.sources.hh import prompt_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenisation:
    """How pairs become tokens; lengths in tokens, special tokens included.

    A pair whose prompt and longer response exceed `max_length` has its prompt cut to `max_prompt_length`
    (which end stays is `prompt_truncation`), then, if that is not enough, each response to what is left, as in
    the authors' data code. `chat_template`: prompts are put into the tokenizer's template for dialogues.
    """

    max_length: int = 512
    max_prompt_length: int = 256
    prompt_truncation: Literal["keep_end", "keep_start"] = "keep_end"
    chat_template: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"data.max_prompt_length ({self.max_prompt_length}) must be at least 1 and less than "
                f"data.max_length ({self.max_length}), so that a response has room."
            )


class _Dropped(Exception):
    """A pair that cannot be tokenised; the text is the reason to count by."""


def tokenise_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> tuple[TokenisedPair | None, list[str]]:
    """Tokenise one pair; see `tokenise_pairs`."""
    return tokenise_pairs([pair], tokenizer, settings)[0]


def tokenise_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> list[tuple[TokenisedPair | None, list[str]]]:
    """Tokenise pairs together: the tokenizer spreads the texts of one call over the cores.

    For each pair: its tokens and what was cut ("prompt truncated", …), or None and the one reason why it
    was dropped. A prompt has the tokenizer's own leading special tokens, BOS never doubled, and no EOS
    appended. A response ends with EOS once, unless it was cut, here or when it was sampled: then it has none,
    for the model must not learn to stop there. Raises UserError when the tokenizer lacks an EOS or a chat
    template that is asked for, or when the prompt is chat messages and `settings.chat_template` is off.
    """
    prompts = _tokenise_prompts(pairs, tokenizer, settings)
    responses = [text for pair in pairs for text in (pair.chosen, pair.rejected or "")]
    if settings.chat_template:  # the template ends where the response begins, so no space in between
        responses = [text.lstrip() for text in responses]
    response_ids = _encode(tokenizer, responses)

    results: list[tuple[TokenisedPair | None, list[str]]] = []
    for index, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
        try:
            if isinstance(prompt, _Dropped):
                raise prompt
            sides = [_finish_response(response_ids[2 * index], "chosen", tokenizer)]
            if pair.rejected is not None:
                rejected = _finish_response(response_ids[2 * index + 1], "rejected", tokenizer)
                sides.append(rejected if pair.rejected_ends else rejected[:-1])
            results.append(_truncate(prompt, sides, settings))
        except _Dropped as dropped:
            results.append((None, [str(dropped)]))
    return results


def tokenise_prompts(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> list[np.ndarray | None]:
    """The prompts alone, to sample responses from: as in training, at most `max_prompt_length` tokens each.

    None for a prompt that training would drop. Raises UserError as `tokenise_pairs` does.
    """
    return [
        None if isinstance(prompt, _Dropped) else np.array(_cut_prompt(prompt, settings), dtype=np.int64)
        for prompt in _tokenise_prompts(pairs, tokenizer, settings)
    ]


class _Prompt(NamedTuple):
    ids: list[int]
    leading: int  # special tokens at its front, which a cut at the front leaves


def _tokenise_prompts(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> list[_Prompt | _Dropped]:
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-text token: set its eos_token.")
    if settings.chat_template and not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template: set data.chat_template: false.")
    texts = [_prompt_text(pair, tokenizer, settings.chat_template) for pair in pairs]
    plain = [text if isinstance(text, str) else "" for text in texts]
    if settings.chat_template:
        encoded: list[tuple[list[int], list[int]]] = [([], ids) for ids in _encode(tokenizer, plain)]
    else:
        encoded = _encode_prompts(tokenizer, plain)
    prompts: list[_Prompt | _Dropped] = []
    for text, (prefix, body) in zip(texts, encoded, strict=True):
        try:
            if isinstance(text, _Dropped):
                raise text
            ids = _finish_prompt(prefix, body, tokenizer, settings.chat_template)
            prompts.append(_Prompt(ids, max(len(prefix), int(ids[0] == tokenizer.bos_token_id))))
        except _Dropped as dropped:
            prompts.append(dropped)
    return prompts


def _prompt_text(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, templated: bool) -> str | _Dropped:
    if not templated:
        if isinstance(pair.prompt, str):
            return pair.prompt
        raise UserError(f"The prompt of pair {pair.pair_id} is chat messages: set data.chat_template: true.")
    try:
        turns = [dict(message) for message in prompt_messages(pair.prompt)]
    except ValueError:
        return _Dropped("HH turns do not alternate, as a chat needs")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return _Dropped("chat template refuses the messages")


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """For each text the special tokens that the tokenizer puts before it, and the tokens of the text itself."""
    encoded = tokenizer(texts, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    prompts = []
    for ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        body = [token for token, is_added in zip(ids, added, strict=False) if not is_added]
        # added on both sides of an empty text cannot be told apart, but such a prompt is dropped
        before = added.index(0) if body else 0
        prompts.append((ids[:before], body))
    return prompts


def _finish_prompt(
    prefix: list[int], plain: list[int], tokenizer: PreTrainedTokenizerBase, templated: bool
) -> list[int]:
    body = list(plain)
    if not templated:  # a template's own end-of-turn may be the EOS and belongs there
        while body and body[-1] == tokenizer.eos_token_id:
            body.pop()
    if not body:
        raise _Dropped("empty prompt after tokenisation")
    ids = prefix + body
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def _finish_response(plain: list[int], side: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    body = list(plain)
    while body and body[-1] == tokenizer.eos_token_id:
        body.pop()
    if not body:
        raise _Dropped(f"empty {side} after tokenisation")
    if tokenizer.eos_token_id in body or tokenizer.bos_token_id in body:
        raise _Dropped(f"BOS or EOS within {side}")
    return [*body, tokenizer.eos_token_id]


def _cut_prompt(prompt: _Prompt, settings: Tokenisation) -> list[int]:
    """At most `max_prompt_length` tokens of the prompt, its leading special tokens among them."""
    limit = settings.max_prompt_length
    if len(prompt.ids) <= limit:
        return prompt.ids
    if settings.prompt_truncation == "keep_start":
        return prompt.ids[:limit]
    head = prompt.ids[: min(prompt.leading, limit)]
    tail = prompt.ids[len(prompt.ids) - (limit - len(head)) :]
    while head and tail and tail[0] == head[-1]:  # a user's text may spell the BOS that now would stand twice
        del tail[0]
    return head + tail


def _truncate(
    prompt: _Prompt, responses: list[list[int]], settings: Tokenisation
) -> tuple[TokenisedPair, list[str]]:
    """Cut to the maximum lengths: the prompt first, then the responses. Raises _Dropped."""
    if len(responses) == 2 and responses[0] == responses[1]:
        raise _Dropped("identical after tokenisation")
    cut = []
    ids = prompt.ids
    if len(ids) + max(map(len, responses)) > settings.max_length and len(ids) > settings.max_prompt_length:
        ids = _cut_prompt(prompt, settings)
        cut.append("prompt truncated")
    room = settings.max_length - len(ids)
    for side, response in zip(("chosen", "rejected"), responses, strict=False):
        if len(response) > room:
            cut.append(f"{side} truncated")
    arrays = [np.array(response[:room], dtype=np.int64) for response in responses]
    if len(arrays) == 2 and np.array_equal(arrays[0], arrays[1]):
        raise _Dropped("identical after truncation")
    rejected = arrays[1] if len(arrays) == 2 else None
    return TokenisedPair(np.array(ids, dtype=np.int64), arrays[0], rejected), cut


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides the tokens: vocabulary, rules, special tokens, chat template."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # the last call's truncation and padding are kept there, and never ours
        rules.pop("truncation", None)
        rules.pop("padding", None)
        digest.update(json.dumps(rules, sort_keys=True).encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                digest.update(file.name.encode() + file.read_bytes())
    rest = [
        type(tokenizer).__qualname__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.chat_template,
    ]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()
