"""Dialogues in the usual forms (messages, HH transcripts), their keys, and a row's inputs to the chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.records import BadRow, Message, PreferencePair, Prompt, decoded, has_value, kind, text, wrong_type

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_PUNCTUATION = re.compile(r"""[\s.,;:!?'"()…“”‘’„«»]+""")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_HEADERS = {"user": HUMAN, "assistant": ASSISTANT, "system": ""}
TEMPLATE_FIELDS = ("system", "tools", "chat_template_kwargs")
# the lower-case names in the documents of TRL, LLaMA-Factory, axolotl, OpenAssistant, Gemma and OpenAI
_SPELLINGS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "function_call"),
    "tool": ("tool", "observation", "function", "ipython"),
}
ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_AN_OBJECT = re.compile(r"""\s*\[?\s*\{\s*['"]""")
_A_KEY = re.compile(r"""(['"])(role|content|from|value)\1\s*:""")
_QUOTED = re.compile(r"""['"](\w+)['"]""")


def spoken(value: object, name: str) -> str | tuple[Message, ...]:
    """Return the text or the messages (a list, one, or JSON in text) of the field `name`. Raises BadRow."""
    if isinstance(value, str):
        value = _messages_in(value, name) or value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return text(value, name)
    if not value:
        raise BadRow(f"empty {name}")
    if all(isinstance(part, Mapping) and "type" in part and "role" not in part for part in value):
        return _joined(value, name)
    return tuple(_message(message, name) for message in value)


def _message(value: object, name: str) -> Message:
    given = _without_null(value) if isinstance(value, Mapping) else {}
    if "role" not in given and "from" in given:
        given = _without_null({"role": given.pop("from"), "content": given.pop("value", None), **given})
    refuse_media(given, f" in {name}")
    if isinstance(given.get("content"), list):
        given["content"] = _joined(given["content"], name)
    kept = message_fields(given)
    if "role" not in kept or "content" not in kept:
        found = f"an object of {', '.join(given)[:60]}" if given else kind(value)
        raise BadRow("wrong type", f"{name} holds {found}, and a message has role and content")
    spelt, content = text(kept["role"], f"{name}: role"), text(kept["content"], f"{name}: content")
    role = ROLES.get(spelt.lower())
    if role is None:
        raise BadRow("unknown role", f"{spelt[:30]!r} in {name}; known are {', '.join(ROLES)}")
    if spelt.lower() == "function_call":  # of LLaMA-Factory, with the calls as JSON in text
        calls = _decoded(content, f"a function_call in {name}")
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return Message(role, "", tool_calls=message_fields({"tool_calls": calls})["tool_calls"])
    return Message(**kept | {"role": role, "content": content})


def refuse_media(fields: Mapping[str, object], where: str = "") -> None:
    """Raise BadRow for a row or message that holds more than text."""
    for name in _MEDIA:
        if has_value(fields, name) and fields[name] not in ("", []):
            raise BadRow("more than text", f"a field {name}{where}; only text is trained on")


def _joined(parts: list[Any], name: str) -> str:
    """Return the text of content in parts. Raises BadRow for a part that is not text, such as an image."""
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type") != "text":
            what = str(part.get("type"))[:30]
            raise BadRow("more than text", f"{name} holds a part of type {what!r}; only text is trained on")
        said = part.get("text") if isinstance(part, Mapping) else part
        texts.append(text(said, f"{name}: a part of its content"))
    return "".join(texts)


def _messages_in(value: str, name: str) -> object:
    """Return the messages that a text spells in JSON or in Python's syntax (as pandas writes a list), or None.

    Raises BadRow for text that has a message's key and a role but is not messages, because it would be trained as
    raw text. Other JSON is text, since a model may answer in JSON.
    """
    if _AN_OBJECT.match(value) is None or not _A_KEY.search(value):
        return None
    try:
        found = decoded(value, name)
    except BadRow:
        found = None
    items = found if isinstance(found, list) else [found]
    keys = {"role", "content"}, {"from", "value"}, {"role", "tool_calls"}
    if all(isinstance(item, Mapping) and any(pair <= item.keys() for pair in keys) for item in items):
        return found
    values = [said for item in items if isinstance(item, Mapping) for said in item.values()]
    texts = _QUOTED.findall(value) if found is None else values
    if any(isinstance(said, str) and said.lower() in ROLES for said in texts):
        raise BadRow("messages that cannot be read", f"{name} looks like messages in JSON, and is none")
    return None


def template_fields(row: Mapping[str, object]) -> dict[str, Any]:
    """Return `tools` and `template_kwargs` of a row; either may be JSON in text. Raises BadRow."""
    tools, options = (_decoded(row.get(name), name) for name in ("tools", "chat_template_kwargs"))
    if not isinstance(tools, list | None):
        raise wrong_type(tools, "tools", "a list of tools")
    if not isinstance(options, Mapping | None):
        raise wrong_type(options, "chat_template_kwargs", "an object with fields")
    return {"tools": tools or None, "template_kwargs": options or {}}


def with_system(prompt: Prompt, system: object) -> Prompt:
    """Return the prompt with the text of a column `system`, if any, as its first message. Raises BadRow."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    first = Message("system", text(system, "system"))
    try:
        turns = prompt_messages(prompt)
    except ValueError as error:
        raise BadRow("turns out of order", str(error)) from error
    if not turns or turns[0].role != "system":
        return (first, *turns)
    if turns[0] != first:
        raise BadRow("two system messages", "the field system and the prompt's own differ")
    return turns


def message_fields(message: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of a message that are not null, in the form that chat templates expect. Raises BadRow."""
    fields: dict[str, Any] = _without_null(message)
    for name in ("thinking", "reasoning"):  # older names, which transformers accepts
        if isinstance(fields.get(name), str):
            thought = fields.pop(name)
            fields.setdefault("reasoning_content", thought)
    if calls := _decoded(fields.get("tool_calls"), "tool_calls"):
        fields = {"content": "", **fields, "tool_calls": calls}
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise BadRow("wrong type", "tool_calls holds something that names no function")
            if "arguments" in function:
                function["arguments"] = _decoded(function["arguments"], "arguments of a tool call")
    return fields


def _decoded(value: object, name: str) -> Any:
    try:
        value = json.loads(value or "null") if isinstance(value, str) else _without_null(value)
    except ValueError as error:
        raise BadRow("bad JSON", f"{name}: {error}") from error
    text(json.dumps(value, ensure_ascii=False, default=str), name)  # checks that all nested text is valid Unicode
    return value


def _without_null(value: object) -> Any:
    """Return the value without null fields, because Arrow gives every object of a column the fields of all."""
    if isinstance(value, Mapping):
        return {str(name): _without_null(field) for name, field in value.items() if field is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def split_transcript(transcript: str, name: str) -> tuple[str, str]:
    """Split the transcript of the field `name` after its last "\\n\\nAssistant:", or raise BadRow."""
    if not transcript.startswith(HUMAN):
        raise BadRow("not an HH transcript", f"{name} does not start with {HUMAN!r}")
    before, header, response = transcript.rpartition(ASSISTANT)
    if not header or HUMAN in response:
        raise BadRow("last turn is not the assistant's", name)
    return before + header, response


def question_prompt(question: object, name: str) -> str:
    """Return the question of the field `name` as an HH prompt of one turn. Raises BadRow, also for turns in it."""
    content = text(question, name)
    if not content.strip():
        raise BadRow("empty prompt", name)
    if _TURN.search(content):
        raise BadRow("turns within a question", name)
    return f"{HUMAN} {content.strip()}{ASSISTANT}"


def is_transcript_prompt(prompt: str) -> bool:
    """Return whether `prompt` ends with the assistant's header, like the prompts of `split_transcript`."""
    return prompt.endswith(ASSISTANT)


def transcript_turns(prompt: str) -> tuple[Message, ...]:
    """Return the turns of an HH prompt unchanged, in any order of roles; text before them is "system"."""
    before, *turns = _TURN.split(prompt.removesuffix(ASSISTANT))
    messages = [Message("system", before)] if before else []
    messages += [Message(_ROLES[role], content) for role, content in zip(turns[::2], turns[1::2], strict=True)]
    return tuple(messages)


def transcript(turns: Sequence[Message]) -> str:
    """Return the HH prompt of these turns: the inverse of `transcript_turns`."""
    return "".join(_HEADERS[turn.role] + turn.content for turn in turns) + ASSISTANT


def prompt_messages(prompt: Prompt) -> tuple[Message, ...]:
    """Return a prompt as messages: its own, HH turns (ValueError unless they alternate), or a single user turn."""
    if not isinstance(prompt, str):
        return prompt
    if not is_transcript_prompt(prompt):
        return (Message("user", prompt),)
    turns = tuple(Message(turn.role, turn.content.strip()) for turn in transcript_turns(prompt))
    roles = [turn.role for turn in turns]
    if roles != ["user", *["assistant", "user"] * (len(roles) // 2)]:
        raise ValueError(f"the turns of an HH prompt alternate, Human first and last, not {', '.join(roles)}")
    return turns


def prompt_key(prompt: Prompt) -> int:
    """Return a signed 64-bit hash, equal for the same question or dialogue in any of the three forms."""
    return _hash(json.dumps(_transcript(prompt)))


def near_key(prompt: Prompt) -> int:
    """Return a hash like `prompt_key`, equal also for prompts that differ in case, spaces or punctuation alone."""
    found = _transcript(prompt)
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return _hash(_PUNCTUATION.sub("", text.casefold()))


def answer_keys(pair: PreferencePair) -> tuple[int, int]:
    """Return signed 64-bit hashes of the texts and fields of the chosen and the rejected response; 0 for none."""

    def key(text: str | None, more: Mapping[str, object]) -> int:
        return 0 if text is None else _hash(json.dumps([text.strip(), dict(more)], default=str))

    return key(pair.chosen, pair.chosen_fields), key(pair.rejected, pair.rejected_fields)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _transcript(prompt: Prompt) -> object:
    if isinstance(prompt, str):
        return prompt if is_transcript_prompt(prompt) else f"{HUMAN} {prompt.strip()}{ASSISTANT}"
    # no transcript has other roles or further fields
    if any(len(message) > 2 or message.role not in ("user", "assistant") for message in prompt):
        return [list(message.values()) if len(message) == 2 else message for message in prompt]
    return transcript([Message(message.role, f" {message.content.strip()}") for message in prompt])
