"""One prompt in its several forms: plain text, an HH transcript, or the messages of a dialogue."""

from __future__ import annotations

import hashlib
import json

from datamodules.records import Prompt
from datamodules.sources.hh import ASSISTANT, HUMAN, is_transcript_prompt

_SPEAKERS = {"user": HUMAN, "assistant": ASSISTANT}


def prompt_key(prompt: Prompt) -> int:
    """A signed 64-bit hash, equal for the same question or dialogue in any of the three forms."""
    digest = hashlib.blake2b(json.dumps(_transcript(prompt)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _transcript(prompt: Prompt) -> object:
    if isinstance(prompt, str):
        return prompt if is_transcript_prompt(prompt) else f"{HUMAN} {prompt.strip()}{ASSISTANT}"
    if any(len(message) > 2 or message.role not in _SPEAKERS for message in prompt):  # not in a transcript
        return [list(message.values()) if len(message) == 2 else message for message in prompt]
    turns = (f"{_SPEAKERS[message.role]} {message.content.strip()}" for message in prompt)
    return "".join(turns) + ASSISTANT
