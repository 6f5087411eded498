"""Tokenisation of pairs: separate prompt and response, special tokens exactly once, truncation counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from app.core.errors import UserError
from datamodules.chat_template import ESSENTIAL, ChatTemplate, Rendering, Talk, conversation, spelled_tokens
from datamodules.records import Dropped, Message, PreferencePair, Side, TokenisedPair
from datamodules.sources.prompts import is_transcript_prompt, transcript, transcript_turns
from datamodules.truncation import PromptTruncation, shorten

PLAIN_BESIDE_TEMPLATE = "prompts as plain text (data.chat_template: true puts them into the chat template)"
_SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class Tokenisation:
    """The settings of tokenisation; lengths are in tokens and include special tokens.

    If the prompt and the longer response exceed `max_length`, the prompt is cut to `max_prompt_length` (see
    `shorten`; `prompt_truncation` says which end of a text stays). If that is not enough, each response is cut to
    the remaining length. `chat_template`: "auto" uses the tokenizer's template for chat messages and leaves text as
    it is; true uses it for text too. `chat_template_kwargs` are options of the template; a row's own options take
    precedence.
    """

    max_length: int = 512
    max_prompt_length: int = 256
    prompt_truncation: PromptTruncation = "keep_end"
    chat_template: bool | Literal["auto"] = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"data.max_prompt_length ({self.max_prompt_length}) must be at least 1 and less than "
                f"data.max_length ({self.max_length}), so that a response has room."
            )


class _Tokens(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]
    notes: tuple[str, ...] = ()


def tokenise_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> list[tuple[TokenisedPair | None, list[str]]]:
    """Tokenise pairs together, since the tokenizer spreads the texts of one call over the cores.

    Return for each pair its tokens and notes ("prompt truncated", …), or None and the reason why it was dropped.
    With a chat template, prompt and response are parts of the template's own rendering, and a response ends with
    the end-of-turn token. A plain prompt starts with the tokenizer's own special tokens (BOS at most once), and a
    plain response ends with one EOS. A response that was cut, here or when it was sampled, has no end token,
    because the model must not learn to stop there. Raises UserError when the tokenizer lacks an EOS or a chat
    template that is needed.
    """
    found = _Tokeniser(tokenizer, settings)
    results: list[tuple[TokenisedPair | None, list[str]]] = []
    for pair, tokens in zip(pairs, found.tokens(pairs), strict=True):
        try:
            if isinstance(tokens, Dropped):
                raise tokens
            results.append(found.truncated(pair, tokens))
        except Dropped as dropped:
            results.append((None, [str(dropped)]))
    return results


def tokenise_prompts(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> list[tuple[np.ndarray | None, list[str]]]:
    """Tokenise prompts alone, for sampling: as in training, but always at most `max_prompt_length` tokens each.

    Return for each prompt its tokens and notes, or None and why training would drop it. Raises UserError.
    """
    found = _Tokeniser(tokenizer, settings)
    results: list[tuple[np.ndarray | None, list[str]]] = []
    for pair in pairs:
        try:
            ids, cut = found.prompt(pair)
            results.append((np.array(ids, dtype=np.int64), [*found.notes(pair), *cut]))
        except Dropped as dropped:
            results.append((None, [str(dropped)]))
    return results


class _Tokeniser:
    """A tokenizer with its settings. Raises UserError if they do not fit together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-text token: set its eos_token.")
        if settings.chat_template is True and not tokenizer.chat_template:
            raise UserError("The tokenizer has no chat template: set data.chat_template: false.")
        named = tokenizer.chat_template and settings.chat_template is not False
        self.template = ChatTemplate(tokenizer, settings.chat_template_kwargs) if named else None
        if settings.chat_template_kwargs and self.template is None:
            raise UserError("data.chat_template_kwargs is given, but no chat template is used: leave it out.")
        self.spelled = spelled_tokens(tokenizer)
        mask = tokenizer("a", return_special_tokens_mask=True)
        self.leading = mask["input_ids"][: mask["special_tokens_mask"].index(0)]  # what precedes a plain prompt

    def templated(self, pair: PreferencePair) -> bool:
        """Return whether the pair uses the chat template. Raises UserError if it needs one and there is none."""
        if not pair.prompt or (isinstance(pair.prompt, str) and self.settings.chat_template is not True):
            return False
        if self.template is None:
            cure = "set data.chat_template: auto" if self.tokenizer.chat_template else "give data.tokenizer one"
            raise UserError(f"Pair {pair.pair_id} is chat messages, and no chat template is used: {cure}.")
        return True

    def notes(
        self, pair: PreferencePair, talk: Talk | None = None, answers: Sequence[Message] = ()
    ) -> tuple[str, ...]:
        """Return notes on how tokens differ from their pair. Raises Dropped if they lack what is essential."""
        control = self.spelled(pair.prompt, answers)
        if self.templated(pair) and self.template is not None:
            return (*control, *self.template.unused(talk or conversation(pair), *answers))
        given = {"tools": pair.tools, **pair.chosen_fields, **pair.rejected_fields}
        if lost := [name for name in ESSENTIAL if given.get(name)]:
            raise Dropped(f"plain text has no place for {lost[0]}: it needs data.chat_template: true")
        beside = pair.prompt and self.template is not None and self.settings.chat_template == "auto"
        return (*control, PLAIN_BESIDE_TEMPLATE) if beside else control

    def tokens(self, pairs: Sequence[PreferencePair], talk: Talk | None = None) -> list[_Tokens | Dropped]:
        """Return the tokens of each pair before truncation, or the reason why it is dropped.

        `talk` replaces the prompts of chats.
        """
        renderings = [self._rendered(pair, talk) for pair in pairs]
        texts: dict[bool, list[str]] = {True: [], False: []}  # of chats, and of plain text
        for pair, sides in zip(pairs, renderings, strict=True):
            if isinstance(sides, list):
                prompt, chat = sides[0].prompt, self.templated(pair) and self.template
                anchor = chat.anchor(prompt) if chat else prompt[-1:]  # SentencePiece writes a space before a text
                texts[bool(chat)] += [prompt, *(anchor + side.trained for side in sides), anchor]
        encoded = {chat: iter(self._encode(some, chat)) for chat, some in texts.items()}
        return [
            self._tokens(pair, sides, encoded[self.templated(pair)]) if isinstance(sides, list) else sides
            for pair, sides in zip(pairs, renderings, strict=True)
        ]

    def _rendered(self, pair: PreferencePair, talk: Talk | None) -> list[Rendering] | Dropped:
        """Return the text of the prompt and of each side of a pair; a response that was cut has no end."""
        answers = [pair.answer(side) for side in _SIDES[: 1 if pair.rejected is None else 2]]
        try:
            if self.templated(pair) and self.template is not None:
                talk = talk or conversation(pair)
                notes = self.notes(pair, talk, answers)
                sides = self.template.split(talk, answers)
                if len({side.prompt for side in sides}) > 1:
                    raise Dropped("the chat template renders two prompts for the two answers")
            else:
                notes = self.notes(pair, answers=answers)
                sides = [Rendering(str(pair.prompt), answer.content, "", True) for answer in answers]
        except Dropped as dropped:
            return dropped
        if not pair.rejected_ends:
            sides[1:] = [side._replace(closing="", eos=False) for side in sides[1:]]
        return [side._replace(notes=(*side.notes, *notes)) for side in sides]

    def _tokens(self, pair: PreferencePair, sides: list[Rendering], ids: Iterator[list[int]]) -> _Tokens | Dropped:
        """Return a pair's tokens, given those of its prompt, of the anchor with each side, and of the anchor."""
        prompt, *joined, anchor = islice(ids, 2 + len(sides))
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        chat, special, named = self.templated(pair), {bos, eos}, "BOS or EOS"
        responses = []
        try:
            if chat and self.template is not None:
                special.add(self.template.frame(conversation(pair)).stop)
                named = "BOS, EOS or end of turn"
            else:  # plain text without a prompt is learnt whole, after BOS, or EOS where there is none
                prompt = self._plain_prompt(prompt) if pair.prompt else [eos if bos is None else bos]
            for name, side, found in zip(_SIDES, sides, joined, strict=False):
                response = found[len(anchor) :]
                if found[: len(anchor)] != anchor:  # a token would span prompt and response
                    (response,) = self._encode([side.trained], chat)
                if not chat:
                    response = self._without_eos(response)
                response += [eos] * side.eos
                inner = response[:-1] if side.closing or side.eos else response
                if not inner:
                    raise Dropped(f"empty {name} after tokenisation")
                if special.intersection(inner):
                    raise Dropped(f"{named} within {name}")
                responses.append(response)
        except Dropped as dropped:
            return dropped
        return _Tokens(prompt, responses, sides[0].notes)

    def _plain_prompt(self, ids: list[int]) -> list[int]:
        """Return a plain prompt after the special tokens, BOS at most once, no EOS at its end. Raises Dropped."""
        bos, body = self.tokenizer.bos_token_id, self._without_eos(ids)
        if not body:
            raise Dropped("empty prompt after tokenisation")
        found = [*self.leading, *body]
        while bos is not None and found[:2] == [bos, bos]:
            del found[0]
        return found

    def _without_eos(self, ids: list[int]) -> list[int]:
        while ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids

    def _encode(self, texts: list[str], chat: bool) -> list[list[int]]:
        if not texts:
            return []
        options = {"split_special_tokens": False} if chat else {}
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )
        return list(encoded["input_ids"])

    def truncated(self, pair: PreferencePair, tokens: _Tokens) -> tuple[TokenisedPair, list[str]]:
        """Cut the pair to the maximum lengths, first the prompt, then the responses. Raises Dropped."""
        if tokens.responses[0] in tokens.responses[1:]:
            raise Dropped("identical after tokenisation")
        limit = self.settings.max_length
        cut: list[str] = []
        longest = len(tokens.prompt) + max(map(len, tokens.responses))
        if longest > limit and len(tokens.prompt) > self.settings.max_prompt_length:
            tokens, cut = self._with_short_prompt(pair, tokens)
        room = limit - len(tokens.prompt)
        lengths = zip(_SIDES, map(len, tokens.responses), strict=False)
        cut += [f"{side} truncated" for side, length in lengths if length > room]
        responses = [response[:room] for response in tokens.responses]
        if responses[0] in responses[1:]:
            raise Dropped("identical after truncation")
        prompt, chosen, *rejected = (np.array(ids, dtype=np.int64) for ids in (tokens.prompt, *responses))
        return TokenisedPair(prompt, chosen, rejected[0] if rejected else None), [*tokens.notes, *cut]

    def _with_short_prompt(self, pair: PreferencePair, tokens: _Tokens) -> tuple[_Tokens, list[str]]:
        if not self.templated(pair):
            ids, cut = self._short_plain(str(pair.prompt), tokens.prompt)
            return tokens._replace(prompt=ids), cut
        talk, cut = self._short_chat(conversation(pair))
        (again,) = self.tokens([pair], talk)
        if isinstance(again, Dropped):
            raise again
        return again, cut

    def prompt(self, pair: PreferencePair) -> tuple[list[int], list[str]]:
        """Return the tokens of a prompt alone, at most `max_prompt_length`, and notes on what was cut."""
        limit = self.settings.max_prompt_length
        if not self.templated(pair):
            ids = self._plain_prompt(*self._encode([str(pair.prompt)], False))
            return (ids, []) if len(ids) <= limit else self._short_plain(str(pair.prompt), ids)
        talk = conversation(pair)
        ids = self._chat_prompt(talk)
        if len(ids) <= limit:
            return ids, []
        talk, cut = self._short_chat(talk)
        return self._chat_prompt(talk), cut

    def _chat_prompt(self, talk: Talk) -> list[int]:
        assert self.template is not None
        return self._encode([self.template.prompt(talk)], True)[0]

    def _short_chat(self, talk: Talk) -> tuple[Talk, list[str]]:
        def encode(turns: Sequence[Message]) -> list[int]:
            return self._chat_prompt(talk._replace(turns=turns))

        limit, keep = self.settings.max_prompt_length, self.settings.prompt_truncation
        turns, cut = shorten(talk.turns, encode, limit, keep, self.tokenizer)
        return talk._replace(turns=turns), cut

    def _short_plain(self, text: str, ids: list[int]) -> tuple[list[int], list[str]]:
        """Return at most `max_prompt_length` of the tokens `ids` of a plain prompt, and notes on what was cut.

        An HH dialogue loses whole old turns first. Other text is cut at the end that `prompt_truncation` does not
        name; "keep_end" also keeps the leading special tokens.
        """
        limit, keep = self.settings.max_prompt_length, self.settings.prompt_truncation
        if is_transcript_prompt(text):

            def encode(turns: Sequence[Message]) -> list[int]:
                return self._plain_prompt(*self._encode([transcript(turns)], False))

            turns, cut = shorten(transcript_turns(text), encode, limit, keep, self.tokenizer)
            return encode(turns), cut
        if keep == "keep_start":
            return ids[:limit], ["prompt truncated"]
        head = ids[: min(limit, max(len(self.leading), int(ids[0] == self.tokenizer.bos_token_id)))]
        tail = ids[len(ids) - (limit - len(head)) :]
        while head and tail and tail[0] == head[-1]:  # the text itself may spell the BOS
            del tail[0]
        return head + tail, ["prompt truncated"]
