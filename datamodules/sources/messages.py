"""Readers of messages in the usual forms: names of roles, `from` and `value`, content in parts, JSON in text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from datamodules.records import Message
from datamodules.sources.report import BadRow
from datamodules.sources.template_fields import message_fields
from datamodules.sources.values import decoded, text

# the lower-case names in the documents of TRL, LLaMA-Factory, axolotl, OpenAssistant, Gemma and OpenAI
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
_AN_OBJECT = re.compile(r"""\s*\[?\s*\{\s*['"]""")
_A_KEY = re.compile(r"""(['"])(role|content|from|value)\1\s*:""")
_QUOTED = re.compile(r"""['"](\w+)['"]""")


def spoken(value: object, name: str) -> str | tuple[Message, ...]:
    """Return the text or the messages of a field (a list, a single message, or either as JSON in text).

    `name` is the field, for the error message. Raises BadRow.
    """
    value = decoded(value) if isinstance(value, str) and _looks_like_messages(value, name) else value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return text(value, name)
    if value and all(isinstance(part, Mapping) and "type" in part and "role" not in part for part in value):
        return _joined(value, name)
    if not value:
        raise BadRow(f"empty {name}")
    return tuple(_message(message, name) for message in value)


def _message(value: object, name: str) -> Message:
    given = (
        {str(key): field for key, field in value.items() if field is not None} if isinstance(value, Mapping) else {}
    )
    if "role" not in given and "from" in given:
        given = {"role": given.pop("from"), "content": given.pop("value", None), **given}
        given = {key: field for key, field in given.items() if field is not None}
    if isinstance(given.get("content"), list):
        given["content"] = _joined(given["content"], name)
    kept = message_fields(given)
    if "role" not in kept or "content" not in kept:
        raise BadRow("wrong type", f"{name} holds something that has no role and content")
    spelt, content = text(kept["role"], f"{name}: role"), text(kept["content"], f"{name}: content")
    role = ROLES.get(spelt.lower())
    if role is None:
        raise BadRow("unknown role", f"{spelt[:30]!r} in {name}; known are {', '.join(ROLES)}")
    if spelt.lower() == "function_call":
        return Message(role, "", tool_calls=_calls(content, name))
    return Message(**kept | {"role": role, "content": content})


def _joined(parts: list[Any], name: str) -> str:
    """Return the text of content in parts. Raises BadRow for a part that is not text, such as an image."""
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type") != "text":
            what = str(part.get("type"))[:30]
            raise BadRow("more than text", f"{name} holds a part of type {what!r}; only text is trained on")
        texts.append(
            text(part.get("text") if isinstance(part, Mapping) else part, f"{name}: a part of its content")
        )
    return "".join(texts)


def _calls(content: str, name: str) -> list[dict[str, Any]]:
    """Return the tool calls of a LLaMA-Factory `function_call` message, which are JSON in text."""
    try:
        calls = json.loads(content)
    except ValueError as error:
        raise BadRow("bad JSON", f"a function_call in {name}: {error}") from error
    wrapped = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    found: list[dict[str, Any]] = message_fields({"tool_calls": wrapped})["tool_calls"]
    return found


def _looks_like_messages(value: str, name: str) -> bool:
    """Return whether text is messages in JSON or in Python's syntax (pandas writes a list in a cell that way).

    Raises BadRow for text that has a message's key and a role but is not messages, because it would be trained as
    raw text. Other JSON is text, since a model may answer in JSON.
    """
    if _AN_OBJECT.match(value) is None or not _A_KEY.search(value):
        return False
    try:
        found = decoded(value)
    except ValueError:
        found = None
    items = found if isinstance(found, list) else [found]
    keys = {"role", "content"}, {"from", "value"}, {"role", "tool_calls"}
    if all(isinstance(item, Mapping) and any(pair <= item.keys() for pair in keys) for item in items):
        return True
    texts = (
        _QUOTED.findall(value)
        if found is None
        else [v for i in items if isinstance(i, Mapping) for v in i.values()]
    )
    if any(isinstance(said, str) and said.lower() in ROLES for said in texts):
        raise BadRow("messages that cannot be read", f"{name} looks like messages in JSON, and is none")
    return False
