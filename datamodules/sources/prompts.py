"""HH transcripts (turns "\\n\\nHuman: …" and "\\n\\nAssistant: …" in one text), and keys of prompts and answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from datamodules.records import Message, PreferencePair, Prompt
from datamodules.sources.rows import BadRow, text

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_PUNCTUATION = re.compile(r"""[\s.,;:!?'"()…“”‘’„«»]+""")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_HEADERS = {"user": HUMAN, "assistant": ASSISTANT, "system": ""}


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
    """Return any prompt as messages: its own, the turns of an HH prompt, or a single user turn.

    Raises ValueError unless the turns of an HH prompt alternate, with a Human turn first and last.
    """
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
