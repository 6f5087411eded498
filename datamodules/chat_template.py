"""A conversation through the tokenizer's chat template: prompt and response as parts of one rendering."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.exceptions import TemplateSyntaxError

from app.errors import UserError
from datamodules.records import Message, Prompt
from datamodules.sources.hh import prompt_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what `strftime_now` of a template tells, so that neither prompts nor cache depend on the day: Llama 3.1's own date
TEMPLATE_DATE = datetime(2024, 7, 26)
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
ESSENTIAL = ("tools", "tool_calls", THOUGHTS[0])  # without them a conversation is another one
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_OURS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template")
_PROBES = ("Answer", "Reply")  # two answers that differ from their first letter on


class Refused(Exception):
    """A conversation that the template cannot render whole; the text is the reason to count by."""


class Frame(NamedTuple):
    """What a template writes around every answer.

    `opening`: between the generation prompt and the answer's text (an empty block of thoughts); `ending`: all that
    follows the text; `closing`: the part of `ending` that is trained, up to the token that ends the turn; `stop`:
    the id of that token. Without such a token `stop` is None, and EOS follows `closing`, which then is plain text.
    """

    opening: str
    ending: str
    closing: str
    stop: int | None


class Rendering(NamedTuple):
    """The text of a prompt and of a response: its `body`, then `closing`; `eos` says that EOS follows."""

    prompt: str
    body: str
    closing: str
    eos: bool
    notes: tuple[str, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer, with the options of the data set. Raises UserError for unknown ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.source = json.dumps(tokenizer.chat_template)  # text, or several named ones
        names = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._frames: dict[str, Frame] = {}
        self._sources: dict[str, str] = {}
        for name in options:
            if name in _OURS or not self.knows(name):
                raise UserError(
                    f"data.chat_template_kwargs: {name} is "
                    + ("set by beta-dpo itself" if name in _OURS else "not known to the tokenizer's chat template")
                    + ": leave it out, or correct its name."
                )

    def knows(self, name: str) -> bool:
        """Return whether the template's source names a variable or field."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(
        self,
        turns: Sequence[Message],
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """Return the text of `turns`. Raises Refused with the template's own words."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    chat_template=self._dated(tools),
                    tools=None if tools is None else list(tools),
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **{**self.options, **(options or {})},
                )
            )
        except TemplateSyntaxError as error:
            raise UserError(f"The tokenizer's chat template is broken ({error}): correct it.") from error
        except (
            Exception
        ) as error:  # raise_exception of a template, or any failure of its expressions on these turns
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Refused(f"the chat template refuses: {reason[:120]}") from error

    def _dated(self, tools: Sequence[Any] | None) -> str:
        """Return the template for these tools with a date in place of today's."""
        source = self.tokenizer.get_chat_template(tools=None if tools is None else list(tools))
        if source not in self._sources:
            self._sources[source] = _TODAY.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), source)
        return self._sources[source]

    def frame(self, turns: Sequence[Message], tools: Any = None, options: Mapping[str, Any] | None = None) -> Frame:
        """Return what the template writes around an answer to `turns`, the same for every conversation."""
        key = json.dumps([bool(tools), options or {}], sort_keys=True, default=str)
        if key not in self._frames:
            before, ending = self._around_answer(turns, tools, options)
            asked = self.prompt(turns, tools, options)
            opening = before.removeprefix(asked) if before.startswith(asked) else ""
            found = self._turn_end(ending)
            closing = ending.rstrip() if found is None else ending[: found.end()]
            stop = None if found is None else self.tokenizer.get_vocab()[found[0]]
            self._frames[key] = Frame(opening, ending, closing, stop)
        return self._frames[key]

    def prompt(self, turns: Sequence[Message], tools: Any = None, options: Mapping[str, Any] | None = None) -> str:
        """Return what the model is asked: `turns` and the assistant's header.

        A template that ignores `add_generation_prompt` writes the header only before an answer: there it is taken
        from. Raises Refused, also where a system or user turn is left out.
        """
        asked = self.render(turns, tools, options, generation_prompt=True)
        if asked == self.render(turns, tools, options):
            before, _ = self._around_answer(turns, tools, options)
            if not before.startswith(asked) or before.removeprefix(asked).strip():
                asked = before
        for turn in turns:
            if turn.role in ("system", "user") and not _holds(asked, turn.content):
                raise Refused(f"the chat template leaves out the {turn.role} turn")
        return asked

    def split(
        self, turns: Sequence[Message], answer: Message, tools: Any = None, options: Mapping[str, Any] | None = None
    ) -> Rendering:
        """Return prompt and response as parts of the rendering of `turns` and `answer`.

        The prompt is what the renderings with and without the answer begin with, the response the rest, up to the
        token that ends the turn. Raises Refused, also where a part of the answer is left out.
        """
        frame = self.frame(turns, tools, options)
        answer = Message(**{**answer, "content": self._without_end(answer.content.lstrip(), frame)})
        prompt = self.prompt(turns, tools, options)
        full = self.render([*turns, answer], tools, options)
        notes: tuple[str, ...] = ()
        if not full.startswith(prompt):
            bare = _shared(self.render(turns, tools, options), prompt)
            shared = self._whole_tokens(prompt, len(_shared(full, prompt)))
            if shared < self._whole_tokens(prompt, len(bare)):
                raise Refused("the chat template changes the prompt once it is answered")
            notes = (f"the generation prompt ends in {prompt[shared:]!r}, which the template takes back",)
            prompt = prompt[:shared]
        rest = full[len(prompt) :]
        self._check_whole(answer, rest)
        if frame.ending and rest.endswith(frame.ending):
            body, closing, eos = rest.removesuffix(frame.ending), frame.closing, frame.stop is None
        else:  # tool calls may end in a token of their own
            *_, last = [None, *self._tokens.finditer(rest)]
            ends = last is not None and not rest[last.end() :].strip()
            body, closing, eos = (rest[: last.start()], last[0], False) if last and ends else (rest, "", True)
        return Rendering(prompt, body, closing, eos, notes)

    def unused(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Return notes on what the template does not use; raises Refused where it is a part of the conversation."""
        names = [name for message in messages for name in message if name not in ("role", "content")]
        names = [*(["tools"] if tools else []), *names, *options]
        unused = [name for name in dict.fromkeys(names) if not self.knows(name)]
        if lost := [name for name in unused if name in ESSENTIAL and not (name == THOUGHTS[0] and self.thinks)]:
            raise Refused(f"the chat template has no place for {lost[0]}")
        return tuple(f"field not used by the chat template: {name}" for name in unused if name not in ESSENTIAL)

    @property
    def thinks(self) -> bool:
        """Whether the template knows an answer's thoughts, by any name that transformers gives them."""
        return any(self.knows(name) for name in THOUGHTS)

    def anchor(self, prompt: str) -> str:
        """Return the end of a prompt, from its last special token on: what decides how a response is split."""
        *_, last = [None, *self._tokens.finditer(prompt)]
        return prompt if last is None else prompt[last.start() :]

    def _around_answer(self, turns: Sequence[Message], tools: Any, options: Any) -> tuple[str, str]:
        """Return what stands before and after the text of any answer."""
        one, other = (self.render([*turns, Message("assistant", probe)], tools, options) for probe in _PROBES)
        before = _shared(one, other)
        after = one[len(before) :].removeprefix(_PROBES[0])
        if other != f"{before}{_PROBES[1]}{after}":
            raise Refused("the chat template does not write the assistant's answer as it is")
        return before, after

    def _turn_end(self, ending: str) -> re.Match[str] | None:
        """Return the token that ends the turn: the first one, or the special one that follows it at once."""
        first = self._tokens.search(ending)
        if first is None or first[0] in self.tokenizer.all_special_tokens:
            return first
        following = self._tokens.match(ending, first.end())
        special = following is not None and following[0] in self.tokenizer.all_special_tokens
        return following if special else first

    def _without_end(self, content: str, frame: Frame) -> str:
        """Return the content without ends of turn or text that the data spells out: the template writes its own."""
        ends = [frame.closing.strip(), str(self.tokenizer.eos_token)]
        while end := next((end for end in ends if end and content.rstrip().endswith(end)), None):
            content = content.rstrip().removesuffix(end)
        return content

    def _whole_tokens(self, text: str, length: int) -> int:
        """Return the largest length up to `length` that cuts no special token of `text`."""
        inside = [token for token in self._tokens.finditer(text) if token.start() < length < token.end()]
        return inside[0].start() if inside else length

    def _check_whole(self, answer: Message, rest: str) -> None:
        calls = answer.get("tool_calls") or []
        parts: dict[str, list[Any]] = {
            "text": [answer.content],
            "reasoning_content": [answer.get("reasoning_content")],
            "tool_calls": [call.get("function", call)["name"] for call in calls],
        }
        for name, values in parts.items():
            if not all(_holds(rest, str(value)) for value in values if value):
                raise Refused(f"the chat template leaves out the answer's {name}")


def conversation(prompt: Prompt) -> tuple[Message, ...]:
    """Return any prompt as messages. Raises Refused where the turns of an HH transcript do not alternate."""
    try:
        return prompt_messages(prompt)
    except ValueError:
        raise Refused("HH turns do not alternate, as a chat needs") from None


def _shared(one: str, other: str) -> str:
    """Return what two texts begin with."""
    return commonprefix([one, other])  # noqa: RUF071 -- texts, not paths


def _holds(rendered: str, text: str) -> bool:
    """Return whether a text was rendered, but for white space."""
    return text in rendered or "".join(text.split()) in "".join(rendered.split())
