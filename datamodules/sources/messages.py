"""Messages in the usual forms, and a row's further inputs to the chat template: system text, tools and options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from datamodules.records import Message, Prompt
from datamodules.sources.prompts import prompt_messages
from datamodules.sources.rows import BadRow, decoded, kind, text, wrong_type

TEMPLATE_FIELDS = ("system", "tools", "chat_template_kwargs")
# the lower-case names in the documents of TRL, LLaMA-Factory, axolotl, OpenAssistant, Gemma and OpenAI
_SPELLINGS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "function_call"),
    "tool": ("tool", "observation", "function", "ipython"),
}
ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
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
    """Return the prompt with the text of a column `system` as its first message; empty or null changes nothing.

    Raises BadRow if the prompt has another system message, or if its HH turns do not alternate.
    """
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
    """Return the fields of a message that are not null; with tool calls, missing content becomes empty.

    Arguments of a tool call in JSON text become an object, as templates expect. Raises BadRow.
    """
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
