"""Tokenisation of pairs, with special tokens exactly once and truncation counted; reading a tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from unicodedata import category

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from app.core.errors import UserError, first_line
from app.core.files import refuse_absent
from datamodules.chat_template import ESSENTIAL, TEMPLATE_DATE, ChatTemplate, Rendering, Talk
from datamodules.records import Dropped, Message, PreferencePair, Side, TokenisedPair, blank
from datamodules.sources.messages import is_transcript_prompt, transcript, transcript_turns

OLD_TURNS = "prompt truncated: old turns dropped"
LAST_TURN = "prompt truncated: within the last turn"
CONTROL_TOKENS = "{} whose text spells special tokens, which the tokenizer reads as such"
REPEATED = "answers that begin with their prompt, and are trained with it"
PLAIN_BESIDE_TEMPLATE = "prompts as plain text (data.chat_template: true puts them into the chat template)"
UNKNOWN = "text that the tokenizer does not know"
FILE_TEXT = ("utf-8", "surrogateescape")  # a vocabulary of SentencePiece is not text
_SHORT = 10  # characters that an answer may share with its prompt by chance
_SIDES: tuple[Side, Side] = ("chosen", "rejected")
PromptTruncation = Literal["keep_end", "keep_start"]
T = TypeVar("T")


@dataclass(frozen=True)
class Tokenisation:
    """The settings of tokenisation; lengths are in tokens and include special tokens.

    If the prompt and the longer response exceed `max_length`, the prompt is cut to `max_prompt_length`: whole old
    turns first, then text within one turn at the end that `prompt_truncation` does not keep, never a header. If
    that is not enough, each response is cut to the remaining length. The others are as in `PreferenceData`.
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


class _Rendered(NamedTuple):
    """A pair as text, with or without a chat template; both sides have the same prompt."""

    pair: PreferencePair
    template: ChatTemplate | None
    sides: list[Rendering]
    notes: tuple[str, ...]


def tokenise_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> list[tuple[TokenisedPair | None, list[str]]]:
    """Return for each pair its tokens and notes ("prompt truncated", …), or None and the reason why it is dropped.

    With a chat template, prompt and response are parts of the template's own rendering, and a response ends with
    the end-of-turn token. A plain prompt starts with the tokenizer's own special tokens (BOS at most once), and a
    plain response ends with one EOS. A response that was cut, here or when it was sampled, has no end token,
    because the model must not learn to stop there. Raises UserError when the tokenizer lacks an EOS or a chat
    template that is needed.
    """
    found = _Tokeniser(tokenizer, settings)
    return [_kept(found.pair, pair) for pair in pairs]


def tokenise_prompts(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> list[tuple[np.ndarray | None, list[str]]]:
    """Return the same for prompts alone, for sampling: always at most `max_prompt_length` tokens each."""
    found = _Tokeniser(tokenizer, settings)
    return [_kept(found.prompt, pair) for pair in pairs]


def _kept(make: Callable[[PreferencePair], T], pair: PreferencePair) -> T | tuple[None, list[str]]:
    """Return what is made of a pair, or None and the reason why it is dropped."""
    try:
        return make(pair)
    except Dropped as dropped:
        return None, [str(dropped)]


class _Tokeniser:
    """A tokenizer with its settings; its methods raise Dropped for a pair that cannot be trained on."""

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
        others = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        spelt = "|".join(map(re.escape, {*tokenizer.all_special_tokens, *others}))
        # at the end of an answer special tokens are in their place
        self.special, self.before_end = re.compile(spelt), re.compile(rf"(?:{spelt})(?!(?:\s|{spelt})*\Z)")
        # asked first about a sign for private use, which no vocabulary holds
        self.reads_all, self.reads = self._reads("\ue000"), cache(self._reads)
        mask = tokenizer("a", return_special_tokens_mask=True)
        self.leading = mask["input_ids"][: mask["special_tokens_mask"].index(0)]  # what precedes a plain prompt

    def template_of(self, pair: PreferencePair) -> ChatTemplate | None:
        """Return the chat template if the pair uses it. Raises UserError if it needs one and there is none."""
        if not pair.prompt or (isinstance(pair.prompt, str) and self.settings.chat_template is not True):
            return None
        if self.template is None:
            cure = "set data.chat_template: auto" if self.tokenizer.chat_template else "give data.tokenizer one"
            raise UserError(f"Pair {pair.pair_id} is chat messages, and no chat template is used: {cure}.")
        return self.template

    def notes(self, pair: PreferencePair, talk: Talk | None, answers: Sequence[Message] = ()) -> tuple[str, ...]:
        """Return how the tokens differ from their pair, or raise Dropped; `talk` is None for plain text."""
        prompt, said = pair.prompt, [answer.content for answer in answers]
        asked = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
        sides = (("prompts", self.special, asked), ("answers", self.before_end, said))
        notes = [CONTROL_TOKENS.format(side) for side, pattern, texts in sides if any(map(pattern.search, texts))]
        if not self.reads_all and not all(map(self.reads, {*"".join((*asked, *said))})):
            notes.append(f"with {UNKNOWN} (left out)")
        start = prompt.strip() if isinstance(prompt, str) else ""
        if said and len(start) > _SHORT and all(text.lstrip().startswith(start) for text in said):
            notes.append(REPEATED)
        if talk is not None and self.template is not None:
            return (*notes, *self.template.unused(talk, *answers))
        given = {"tools": pair.tools, **pair.chosen_fields, **pair.rejected_fields}
        if lost := [name for name in ESSENTIAL if given.get(name)]:
            raise Dropped(f"plain text has no place for {lost[0]}: it needs data.chat_template: true")
        if prompt and self.template is not None and self.settings.chat_template == "auto":
            notes.append(PLAIN_BESIDE_TEMPLATE)
        return tuple(notes)

    def _reads(self, sign: str) -> bool:
        """Return whether the tokenizer has a token for a sign; some leave out those that they do not know."""
        ids = self.encode([sign], False)[0]
        shown = not blank(sign) and category(sign) != "Mn"  # a mark that a normaliser may take off its letter
        return not shown or bool(str(self.tokenizer.decode(ids)).strip())

    def rendered(self, pair: PreferencePair, talk: Talk | None = None) -> _Rendered:
        """Return the text of a pair; `talk` replaces the prompt of a chat. A response that was cut has no end."""
        answers = [pair.answer(side) for side in _SIDES[: 1 if pair.rejected is None else 2]]
        if template := self.template_of(pair):
            talk = talk or Talk.of(pair)
            notes = self.notes(pair, talk, answers)
            sides = template.split(talk, answers)
            if len({side.prompt for side in sides}) > 1:
                raise Dropped("the chat template renders two prompts for the two answers")
        else:
            notes = self.notes(pair, None, answers)
            sides = [Rendering(str(pair.prompt), answer.content, "", True) for answer in answers]
        if not pair.rejected_ends:
            sides[1:] = [side._replace(closing="", eos=False) for side in sides[1:]]
        found = dict.fromkeys(note for side in sides for note in side.notes)
        return _Rendered(pair, template, sides, (*found, *notes))

    def encode(self, texts: list[str], chat: bool) -> list[list[int]]:
        options = {"split_special_tokens": False} if chat else {}
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )
        return list(encoded["input_ids"])

    def tokens(self, one: _Rendered) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of the prompt and of each response before truncation."""
        text, chat = one.sides[0].prompt, one.template is not None
        # SentencePiece writes a space before a text, so a response is read after the end of its prompt
        anchor = one.template.anchor(text) if one.template else text[-1:]
        texts = [text, *(anchor + side.trained for side in one.sides), anchor]
        prompt, *joined, before = self.encode(texts, chat)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        special, named = {bos, eos}, "BOS or EOS"
        if one.template:
            special.add(one.template.frame(Talk.of(one.pair)).stop)
            named = "BOS, EOS or end of turn"
        else:  # plain text without a prompt is learnt whole, after BOS, or EOS where there is none
            prompt = self._plain_prompt(prompt) if one.pair.prompt else [eos if bos is None else bos]
        responses = []
        for name, side, found in zip(_SIDES, one.sides, joined, strict=False):
            response = found[len(before) :]
            if found[: len(before)] != before:  # a token would span prompt and response
                (response,) = self.encode([side.trained], chat)
            if not chat:
                response = self._without_eos(response)
            response += [eos] * side.eos
            inner = response[:-1] if side.closing or side.eos else response
            if not inner:
                raise Dropped(f"empty {name} after tokenisation")
            if special.intersection(inner):
                raise Dropped(f"{named} within {name}")
            responses.append(response)
        return prompt, responses

    def pair(self, pair: PreferencePair) -> tuple[TokenisedPair, list[str]]:
        """Return the tokens of a pair, its prompt and then its responses cut to the maximum lengths, and notes."""
        one, limit = self.rendered(pair), self.settings.max_length
        prompt, responses = self.tokens(one)
        if responses[0] in responses[1:]:
            raise Dropped("identical after tokenisation")
        cut: list[str] = []
        longest = len(prompt) + max(map(len, responses))
        if longest > limit and len(prompt) > self.settings.max_prompt_length:
            if one.template:
                talk, cut = self._short_chat(one.template, Talk.of(pair))
                one = self.rendered(pair, talk)
                prompt, responses = self.tokens(one)
            else:
                prompt, cut = self._short_plain(str(pair.prompt), prompt)
        room = limit - len(prompt)
        cut += [f"{side} truncated" for side, ids in zip(_SIDES, responses, strict=False) if len(ids) > room]
        responses = [response[:room] for response in responses]
        if responses[0] in responses[1:]:
            raise Dropped("identical after truncation")
        sides = [np.array(some, dtype=np.int64) for some in (prompt, *responses)]
        return TokenisedPair(sides[0], sides[1], sides[2] if sides[2:] else None), [*one.notes, *cut]

    def prompt(self, pair: PreferencePair) -> tuple[np.ndarray, list[str]]:
        """Return the tokens of a prompt alone, at most `max_prompt_length`, and notes."""
        limit, talk = self.settings.max_prompt_length, None
        cut: list[str] = []
        if template := self.template_of(pair):
            talk = Talk.of(pair)
            ids = self._chat_prompt(template, talk)
            if len(ids) > limit:
                shorter, cut = self._short_chat(template, talk)
                ids = self._chat_prompt(template, shorter)
        else:
            ids = self._plain_prompt(*self.encode([str(pair.prompt)], False))
            if len(ids) > limit:
                ids, cut = self._short_plain(str(pair.prompt), ids)
        return np.array(ids, dtype=np.int64), [*self.notes(pair, talk), *cut]

    def _plain_prompt(self, ids: list[int]) -> list[int]:
        """Return a plain prompt after the special tokens, BOS at most once, no EOS at its end."""
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

    def _chat_prompt(self, template: ChatTemplate, talk: Talk) -> list[int]:
        return self.encode([template.prompt(talk)], True)[0]

    def _short_chat(self, template: ChatTemplate, talk: Talk) -> tuple[Talk, list[str]]:
        def encode(turns: Sequence[Message]) -> list[int]:
            return self._chat_prompt(template, talk._replace(turns=turns))

        turns, cut = self._shorten(talk.turns, encode)
        return talk._replace(turns=turns), cut

    def _short_plain(self, text: str, ids: list[int]) -> tuple[list[int], list[str]]:
        """Return at most `max_prompt_length` of the tokens `ids` of a plain prompt, and notes on what was cut.

        Text that is no dialogue is cut at one end; "keep_end" also keeps the leading special tokens.
        """
        limit = self.settings.max_prompt_length
        if is_transcript_prompt(text):

            def encode(turns: Sequence[Message]) -> list[int]:
                return self._plain_prompt(*self.encode([transcript(turns)], False))

            turns, cut = self._shorten(transcript_turns(text), encode)
            return encode(turns), cut
        if self.settings.prompt_truncation == "keep_start":
            return ids[:limit], ["prompt truncated"]
        head = ids[: min(limit, max(len(self.leading), int(ids[0] == self.tokenizer.bos_token_id)))]
        tail = ids[len(ids) - (limit - len(head)) :]
        while head and tail and tail[0] == head[-1]:  # the text itself may spell the BOS
            del tail[0]
        return head + tail, ["prompt truncated"]

    def _shorten(
        self, turns: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]]
    ) -> tuple[list[Message], list[str]]:
        """Return the turns, cut until `encode` gives at most `max_prompt_length` tokens, and notes on the cuts.

        The oldest turns are dropped first, so that a user turn comes first; the system turn stays. If that is not
        enough, the longest remaining user or tool text is cut. Raises Dropped when not one token of it fits.
        """
        limit, keeps_end = self.settings.max_prompt_length, self.settings.prompt_truncation == "keep_end"
        system = list(turns[:1]) if turns[0].role == "system" else []
        rest = list(turns[len(system) :])
        for start in [index for index, turn in enumerate(rest) if turn.role == "user"] or [0]:
            kept, notes = system + rest[start:], [OLD_TURNS] * bool(start)
            excess = len(encode(kept)) - limit
            if excess <= 0:
                return kept, notes
        places = [place for place in range(len(system), len(kept)) if kept[place].role in ("user", "tool")]
        place = max(places or [len(kept) - 1], key=lambda index: len(kept[index].content))
        (ids,) = self.encode([kept[place].content], False)
        room = len(ids) - excess
        while room >= 1:
            some = ids[-room:] if keeps_end else ids[:room]
            piece = str(self.tokenizer.decode(some, clean_up_tokenization_spaces=False))
            # the cut may fall within a character of several tokens
            piece = piece.lstrip("\ufffd") if keeps_end else piece.rstrip("\ufffd")
            shorter = [*kept[:place], Message(**{**kept[place], "content": piece}), *kept[place + 1 :]]
            excess = len(encode(shorter)) - limit
            if excess <= 0 and piece.strip():
                return shorter, [*notes, LAST_TURN]
            room -= max(excess, 1)
        raise Dropped("headers and system turn exceed data.max_prompt_length")


def read_tokenizer(name: str, option: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or Hub id. Raises UserError that names the `option` if there is none."""
    refuse_absent(option, "tokenizer", name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise errors of many types
        reason = first_line(error).strip(" :")
        raise UserError(f"{option}: no tokenizer at {name!r} ({reason}): give the folder of one.") from error


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, settings: Tokenisation, *further: int | list[int] | None
) -> list[int]:
    """Return the ids that end a response: the end-of-turn of the chat template, EOS, and those of `further`."""
    ends: list[int | None] = []
    if tokenizer.chat_template and settings.chat_template is not False:
        template = ChatTemplate(tokenizer, settings.chat_template_kwargs)
        with suppress(Dropped):  # a template that accepts no conversation has no end-of-turn
            ends.append(template.frame(Talk([Message("user", "Hello")])).stop)
    ends.append(tokenizer.eos_token_id)
    for given in further:
        ends += given if isinstance(given, list) else [given]
    return [end for end in dict.fromkeys(ends) if end is not None]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides the tokens: vocabulary, rules, special tokens, chat template."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # truncation and padding are state of the last call, and this project uses neither
        rules.pop("truncation", None)
        rules.pop("padding", None)
        digest.update(json.dumps(rules, sort_keys=True).encode())
    else:
        for name, text in tokenizer_files(tokenizer).items():
            digest.update((name + text).encode(*FILE_TEXT))
    rest = [
        type(tokenizer).__qualname__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.chat_template,
        getattr(tokenizer, "split_special_tokens", False),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},  # chat templates may use them
        TEMPLATE_DATE.isoformat(),
    ]
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the files that `save_pretrained` writes, by name, as text that `FILE_TEXT` turns into their bytes."""
    with tempfile.TemporaryDirectory() as folder:
        # several named chat templates would be in a folder of their own
        tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        return {path.name: path.read_bytes().decode(*FILE_TEXT) for path in sorted(Path(folder).iterdir())}
