"""Tokenisation of pairs: separate prompt and response, special tokens exactly once, truncation counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from app.core.errors import UserError
from datamodules.chat_template import ESSENTIAL, ChatTemplate, Rendering, Talk, conversation
from datamodules.records import Dropped, Message, PreferencePair, Side, TokenisedPair
from datamodules.truncation import PlainPrompt, PromptTruncation, plain_prompts, shorten, shorten_plain

PLAIN_BESIDE_TEMPLATE = (
    "prompts as plain text (data.chat_template: true puts them into the tokenizer's chat template)"
)
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

    Return for each prompt its tokens and notes, or None and the reason why training would drop it. Raises UserError
    as `tokenise_pairs` does.
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

    def templated(self, pair: PreferencePair) -> bool:
        """Return whether the pair uses the chat template. Raises UserError if it needs one and there is none."""
        if not pair.prompt or (isinstance(pair.prompt, str) and self.settings.chat_template is not True):
            return False
        if self.template is None:
            cure = "set data.chat_template: auto" if self.tokenizer.chat_template else "give data.tokenizer one"
            raise UserError(f"Pair {pair.pair_id} is chat messages, and no chat template is used: {cure}.")
        return True

    @property
    def _plain_notes(self) -> tuple[str, ...]:
        beside = self.template is not None and self.settings.chat_template == "auto"
        return (PLAIN_BESIDE_TEMPLATE,) * beside

    def tokens(self, pairs: Sequence[PreferencePair]) -> list[_Tokens | Dropped]:
        """Return the tokens of each pair before truncation, or the reason why it is dropped."""
        chats = [pair for pair in pairs if self.templated(pair)]
        plain = [pair for pair in pairs if not self.templated(pair)]
        of_chats = iter(self._chat_tokens(chats, [self._rendered(pair) for pair in chats]))
        of_plain = iter(self._plain_tokens(plain))
        return [next(of_chats if self.templated(pair) else of_plain) for pair in pairs]

    def _rendered(self, pair: PreferencePair, talk: Talk | None = None) -> list[Rendering] | Dropped:
        """Return the rendering of each side of a pair, with `talk` as the prompt if given."""
        assert self.template is not None
        try:
            talk = conversation(pair) if talk is None else talk
            sides = _SIDES[: 1 if pair.rejected is None else 2]
            answers = [pair.answer(side) for side in sides]
            notes = self.template.unused(talk, *answers)
            both = self.template.split(talk, answers)
            if len({rendering.prompt for rendering in both}) > 1:
                raise Dropped("the chat template renders two prompts for the two answers")
            return [rendering._replace(notes=(*rendering.notes, *notes)) for rendering in both]
        except Dropped as dropped:
            return dropped

    def _chat_tokens(
        self, pairs: Sequence[PreferencePair], renderings: Sequence[list[Rendering] | Dropped]
    ) -> list[_Tokens | Dropped]:
        assert self.template is not None or not renderings
        texts: list[str] = []
        for pair, sides in zip(pairs, renderings, strict=True):
            if isinstance(sides, list):
                anchor = self.template.anchor(sides[0].prompt)  # type: ignore[union-attr]
                texts += [sides[0].prompt, anchor]
                texts += [anchor + trained for trained in _trained(pair, sides)]
        encoded = iter(self._encode(texts, split_special_tokens=False))
        found: list[_Tokens | Dropped] = []
        for pair, sides in zip(pairs, renderings, strict=True):
            if not isinstance(sides, list):
                found.append(sides)
                continue
            prompt, anchor_ids, responses = next(encoded), next(encoded), []
            for number, (side, trained) in enumerate(zip(sides, _trained(pair, sides), strict=True)):
                joined = next(encoded)
                ids = joined[len(anchor_ids) :]
                if joined[: len(anchor_ids)] != anchor_ids:  # a token would span prompt and response
                    (ids,) = self._encode([trained], split_special_tokens=False)
                ends = number == 0 or pair.rejected_ends
                responses.append([*ids, *[self.tokenizer.eos_token_id] * (ends and side.eos)])
            try:
                stop = self.template.frame(conversation(pair)).stop  # type: ignore[union-attr]
                self._check_responses(responses, [True, pair.rejected_ends], stop, "BOS, EOS or end of turn")
                found.append(_Tokens(prompt, responses, sides[0].notes))
            except Dropped as dropped:
                found.append(dropped)
        return found

    def _check_responses(self, responses: list[list[int]], ends: list[bool], stop: int | None, named: str) -> None:
        special = {stop, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}
        for side, ids, ended in zip(_SIDES, responses, ends, strict=False):
            body = ids[:-1] if ended else ids
            if not body:
                raise Dropped(f"empty {side} after tokenisation")
            if special.intersection(body):
                raise Dropped(f"{named} within {side}")

    def _plain_tokens(self, pairs: Sequence[PreferencePair]) -> list[_Tokens | Dropped]:
        eos = self.tokenizer.eos_token_id
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected or "")]
        responses = iter(self._encode(texts))
        prompts = plain_prompts(self.tokenizer, [str(pair.prompt) for pair in pairs])
        found: list[_Tokens | Dropped] = []
        for pair, prompt in zip(pairs, prompts, strict=True):
            sides = [next(responses), next(responses)][: 1 if pair.rejected is None else 2]
            ended = [True, pair.rejected_ends]
            try:
                if not pair.prompt:  # plain text is learnt whole, after BOS, or EOS where there is none
                    start = self.tokenizer.bos_token_id
                    prompt = PlainPrompt([eos if start is None else start], 1)
                self._check_plain(pair, prompt)
                for side in sides:
                    while side and side[-1] == eos:
                        side.pop()
                sides = [[*side, *[eos] * end] for side, end in zip(sides, ended, strict=False)]
                self._check_responses(sides, ended, None, "BOS or EOS")
                found.append(_Tokens(prompt.ids, sides, self._plain_notes if pair.prompt else ()))
            except Dropped as dropped:
                found.append(dropped)
        return found

    def _check_plain(self, pair: PreferencePair, prompt: PlainPrompt) -> None:
        if not prompt.ids:
            raise Dropped("empty prompt after tokenisation")
        given = {"tools": pair.tools, **pair.chosen_fields, **pair.rejected_fields}
        if lost := [name for name in ESSENTIAL if given.get(name)]:
            raise Dropped(f"plain text has no place for {lost[0]}: it needs data.chat_template: true")

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )
        return list(encoded["input_ids"])

    def truncated(self, pair: PreferencePair, tokens: _Tokens) -> tuple[TokenisedPair, list[str]]:
        """Cut the pair to the maximum lengths, first the prompt, then the responses. Raises Dropped."""
        if len(tokens.responses) == 2 and tokens.responses[0] == tokens.responses[1]:
            raise Dropped("identical after tokenisation")
        limit, prompt_limit = self.settings.max_length, self.settings.max_prompt_length
        cut: list[str] = []
        if len(tokens.prompt) + max(map(len, tokens.responses)) > limit and len(tokens.prompt) > prompt_limit:
            tokens, cut = self._with_short_prompt(pair, tokens)
        room = limit - len(tokens.prompt)
        for side, response in zip(_SIDES, tokens.responses, strict=False):
            if len(response) > room:
                cut.append(f"{side} truncated")
        arrays = [np.array(response[:room], dtype=np.int64) for response in tokens.responses]
        if len(arrays) == 2 and np.array_equal(arrays[0], arrays[1]):
            raise Dropped("identical after truncation")
        rejected = arrays[1] if len(arrays) == 2 else None
        return TokenisedPair(np.array(tokens.prompt, dtype=np.int64), arrays[0], rejected), [*tokens.notes, *cut]

    def _with_short_prompt(self, pair: PreferencePair, tokens: _Tokens) -> tuple[_Tokens, list[str]]:
        if not self.templated(pair):
            ids, cut = self.prompt(pair)
            return tokens._replace(prompt=ids), cut
        talk, cut = self._short_chat(pair)
        (again,) = self._chat_tokens([pair], [self._rendered(pair, talk)])
        if isinstance(again, Dropped):
            raise again
        return again, cut

    def prompt(self, pair: PreferencePair) -> tuple[list[int], list[str]]:
        """Return the tokens of a prompt alone, at most `max_prompt_length`, and notes on what was cut."""
        limit = self.settings.max_prompt_length
        if not self.templated(pair):
            (prompt,) = plain_prompts(self.tokenizer, [str(pair.prompt)])
            self._check_plain(pair, prompt)
            if len(prompt.ids) <= limit:
                return prompt.ids, []
            return shorten_plain(str(pair.prompt), prompt, limit, self.settings.prompt_truncation, self.tokenizer)
        ids = self._chat_prompt(conversation(pair))
        if len(ids) <= limit:
            return ids, []
        talk, cut = self._short_chat(pair)
        return self._chat_prompt(talk), cut

    def notes(self, pair: PreferencePair) -> tuple[str, ...]:
        """Return the notes on a prompt, apart from those on truncation. Raises Dropped."""
        if not self.templated(pair):
            return self._plain_notes
        assert self.template is not None
        return self.template.unused(conversation(pair))

    def _chat_prompt(self, talk: Talk) -> list[int]:
        assert self.template is not None
        return self._encode([self.template.prompt(talk)], split_special_tokens=False)[0]

    def _short_chat(self, pair: PreferencePair) -> tuple[Talk, list[str]]:
        talk = conversation(pair)

        def encode(turns: Sequence[Message]) -> list[int]:
            return self._chat_prompt(talk._replace(turns=turns))

        limit, keep = self.settings.max_prompt_length, self.settings.prompt_truncation
        turns, cut = shorten(talk.turns, encode, limit, keep, self.tokenizer)
        return talk._replace(turns=turns), cut


def _trained(pair: PreferencePair, sides: Sequence[Rendering]) -> list[str]:
    """Return the text of each side that is trained; a rejected response that was cut has no end."""
    ends = [side.closing if number == 0 or pair.rejected_ends else "" for number, side in enumerate(sides)]
    return [side.body + end for side, end in zip(sides, ends, strict=True)]
