"""Readers of a row's further inputs to the chat template: a system text, tools, tool calls and options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datamodules.records import Message, Prompt
from datamodules.sources.hh import prompt_messages
from datamodules.sources.report import BadRow
from datamodules.sources.values import kind, text

TEMPLATE_FIELDS = ("system", "tools", "chat_template_kwargs")


def template_fields(row: Mapping[str, object]) -> dict[str, Any]:
    """Return the `tools` (a list) and `template_kwargs` (an object) of a row; either may be JSON in text.

    Raises BadRow.
    """
    tools, options = (_decoded(row.get(name), name) for name in ("tools", "chat_template_kwargs"))
    if not isinstance(tools, list | None):
        raise BadRow("wrong type", f"tools is {kind(tools)}, not a list of tools")
    if not isinstance(options, Mapping | None):
        raise BadRow("wrong type", f"chat_template_kwargs is {kind(options)}, not an object with fields")
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
    if turns and turns[0].role == "system":
        if turns[0] != first:
            raise BadRow("two system messages", "the field system and the prompt's own differ")
        return turns
    return (first, *turns)


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
