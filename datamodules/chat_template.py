"""Rendering a conversation with the tokenizer's chat template, and splitting it into prompt and response."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from os.path import commonprefix
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from app.core.errors import UserError, first_line
from datamodules.records import Dropped, Message, PreferencePair
from datamodules.sources.messages import prompt_messages

# the date of a template's `strftime_now`, fixed so that prompts and cache keys stay the same; from Llama 3.1
TEMPLATE_DATE = datetime(2024, 7, 26)
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
ESSENTIAL = ("tools", "tool_calls", THOUGHTS[0])  # a conversation without these is a different one
REWRITTEN = "turns whose text the chat template changes"
INDENTED = "answers that begin with white space, which is left out"
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_OURS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template")
_PROBES = ("Answer", "Reply")  # two answers that differ from the first letter


class Talk(NamedTuple):
    """A conversation, and its row's own inputs to the chat template."""

    turns: Sequence[Message]
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = {}

    @classmethod
    def of(cls, pair: PreferencePair) -> Talk:
        """Return the prompt of a pair as a conversation. Raises Dropped if HH turns do not alternate."""
        try:
            return cls(prompt_messages(pair.prompt), pair.tools, pair.template_kwargs)
        except ValueError:
            raise Dropped("HH turns do not alternate, as a chat needs") from None

    def answered(self, answer: Message) -> Talk:
        """Return the conversation with one more turn."""
        return self._replace(turns=[*self.turns, answer])


class Frame(NamedTuple):
    """The text that a template writes after every answer."""

    ending: str  # all of it
    closing: str  # the part that is trained, up to the end-of-turn token; without one EOS follows it
    stop: int | None  # the id of that token


class Rendering(NamedTuple):
    """The text of a prompt and of its response (`body`, then `closing`); `eos` says whether EOS follows."""

    prompt: str
    body: str
    closing: str
    eos: bool
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> str:
        return self.body + self.closing


class ChatTemplate:
    """The chat template of a tokenizer, with the data's options for it. Raises UserError for unknown options."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.source = json.dumps(tokenizer.chat_template)  # text, or several named ones
        names = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._frames: dict[str, Frame] = {}
        for name in options:
            if name in _OURS or not self.knows(name):
                fault = "set by beta-dpo itself" if name in _OURS else "not known to the tokenizer's chat template"
                raise UserError(f"data.chat_template_kwargs: {name} is {fault}: leave it out, or correct its name.")

    def knows(self, name: str) -> bool:
        """Return whether the template's source contains this name of a variable or field."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(self, talk: Talk, generation_prompt: bool = False) -> str:
        """Return the text of a conversation. Raises Dropped with the template's own message."""
        tools = None if talk.tools is None else list(talk.tools)
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in talk.turns],
                chat_template=_dated(self.tokenizer.get_chat_template(tools=tools)),
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **{**self.options, **talk.options},
            )
        except TemplateSyntaxError as error:
            raise UserError(f"The tokenizer's chat template is broken ({error}): correct it.") from error
        except Exception as error:  # of a template's raise_exception, or of its expressions on these turns
            raise Dropped(f"the chat template refuses: {first_line(error)[:120]}") from error
        return str(rendered)

    def frame(self, talk: Talk) -> Frame:
        """Return what the template writes after an answer.

        The end-of-turn token is the first added token, or a special one directly after it.
        """
        key = json.dumps([bool(talk.tools), talk.options], sort_keys=True, default=str)
        if key not in self._frames:
            _, ending = self._around_answer(talk)
            special = self.tokenizer.all_special_tokens
            self._frames[key] = Frame(ending, ending.rstrip(), None)
            if end := self._tokens.search(ending):
                following = self._tokens.match(ending, end.end())
                if following and end[0] not in special and following[0] in special:
                    end = following
                self._frames[key] = Frame(ending, ending[: end.end()], self.tokenizer.get_vocab()[end[0]])
        return self._frames[key]

    def prompt(self, talk: Talk) -> str:
        """Return the prompt text: the turns and the assistant's header.

        If the template ignores `add_generation_prompt`, the header comes from a rendering with an answer. Raises
        Dropped when the template fails or leaves out a turn, or the last line of an earlier answer.
        """
        asked = self.render(talk, generation_prompt=True)
        if asked == self.render(talk):
            before, _ = self._around_answer(talk)
            if not before.startswith(asked) or before.removeprefix(asked).strip():
                asked = before
        for turn in talk.turns:
            # templates leave out what an earlier answer thought
            text = turn.content.strip().rpartition("\n")[2] if turn.role == "assistant" else turn.content
            if not _holds(asked, text):
                raise Dropped(f"the chat template leaves out the {turn.role} turn")
        return asked

    def split(self, talk: Talk, answers: Sequence[Message]) -> list[Rendering]:
        """Split the rendering of a conversation with each of its answers into prompt and response.

        The prompt is the common start of the renderings with and without the answer; the response is the rest, up
        to the end-of-turn token. Raises Dropped when the template fails or leaves out a part of the answer.
        """
        frame, prompt = self.frame(talk), self.prompt(talk)
        return [self._split(talk, answer, frame, prompt) for answer in answers]

    def _split(self, talk: Talk, answer: Message, frame: Frame, prompt: str) -> Rendering:
        content = answer.content.lstrip()
        notes: tuple[str, ...] = (INDENTED,) if len(answer.content) - len(content) > 1 else ()
        # without end-of-turn or EOS text at its end, because the template writes its own
        ends = [frame.closing.strip(), str(self.tokenizer.eos_token)]
        while end := next((end for end in ends if end and content.rstrip().endswith(end)), None):
            content = content.rstrip().removesuffix(end)
        answer = Message(**{**answer, "content": content})
        full = self.render(talk.answered(answer))
        if any(turn.content.strip() not in full for turn in (*talk.turns, answer)):
            notes += (REWRITTEN,)
        if not full.startswith(prompt):
            bare = _shared(self.render(talk), prompt)
            shared = self._whole_tokens(prompt, len(_shared(full, prompt)))
            if shared < self._whole_tokens(prompt, len(bare)):
                raise Dropped("the chat template changes the prompt once it is answered")
            notes += (f"the generation prompt ends in {prompt[shared:]!r}, which the template takes back",)
            prompt = prompt[:shared]
        rest = full[len(prompt) :]
        calls = [call.get("function", call)["name"] for call in answer.get("tool_calls") or []]
        thought = answer.get(THOUGHTS[0])
        parts = [("text", answer.content), (THOUGHTS[0], thought), *(("tool_calls", call) for call in calls)]
        for name, text in parts:
            # the generation prompt may have begun the answer, as with "<think>"
            said = rest if _holds(rest, str(text or "")) else full[len(_shared(full, self.render(talk))) :]
            if not _holds(said, str(text or "")):
                raise Dropped(f"the chat template leaves out the answer's {name}")
        if frame.ending and rest.endswith(frame.ending):
            return Rendering(prompt, rest.removesuffix(frame.ending), frame.closing, frame.stop is None, notes)
        last = self._last_token(rest)
        if last and not rest[last.end() :].strip():  # tool calls may end with a token of their own
            return Rendering(prompt, rest[: last.start()], last[0], False, notes)
        return Rendering(prompt, rest, "", True, notes)

    def unused(self, talk: Talk, *answers: Message) -> tuple[str, ...]:
        """Return notes on the fields that the template does not use. Raises Dropped if one is essential."""
        fields = [
            name for message in (*talk.turns, *answers) for name in message if name not in ("role", "content")
        ]
        names = dict.fromkeys([*["tools"] * bool(talk.tools), *fields, *talk.options])
        unused = [name for name in names if not self.knows(name)]
        lost = [name for name in unused if name in ESSENTIAL]
        if THOUGHTS[0] in lost and any(map(self.knows, THOUGHTS)):  # transformers gives it other names, too
            lost.remove(THOUGHTS[0])
        if lost:
            raise Dropped(f"the chat template has no place for {lost[0]}")
        return tuple(
            f"with a field unused by the chat template: {name}" for name in unused if name not in ESSENTIAL
        )

    def anchor(self, prompt: str) -> str:
        """Return a prompt from its last special or added token: only this part affects a response's tokens."""
        last = self._last_token(prompt)
        return prompt if last is None else prompt[last.start() :]

    def _last_token(self, text: str) -> re.Match[str] | None:
        *_, last = [None, *self._tokens.finditer(text)]
        return last

    def _around_answer(self, talk: Talk) -> tuple[str, str]:
        """Return the text before and after any answer."""
        one, other = (self.render(talk.answered(Message("assistant", probe))) for probe in _PROBES)
        before = _shared(one, other)
        after = one[len(before) :].removeprefix(_PROBES[0])
        if other != f"{before}{_PROBES[1]}{after}":
            raise Dropped("the chat template does not write the assistant's answer as it is")
        return before, after

    def _whole_tokens(self, text: str, length: int) -> int:
        """Return the largest length, at most `length`, that does not cut through a special token of `text`."""
        inside = [token for token in self._tokens.finditer(text) if token.start() < length < token.end()]
        return inside[0].start() if inside else length


@cache
def _dated(template: str) -> str:
    """Return a template with a fixed date in place of today's."""
    return _TODAY.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), template)


def _shared(one: str, other: str) -> str:
    """Return the common start of two texts."""
    return commonprefix([one, other])  # noqa: RUF071 -- texts, not paths


def _holds(rendered: str, text: str) -> bool:
    """Return whether the rendering contains a text, ignoring white space, or its spelling in JSON."""
    spelt = json.dumps(text, ensure_ascii=False)[1:-1]  # of what a tool returned
    return text in rendered or spelt in rendered or "".join(text.split()) in "".join(rendered.split())
