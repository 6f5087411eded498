"""Hash keys of prompts and answers; a prompt may be plain text, an HH transcript or messages."""

from __future__ import annotations

import hashlib
import json

from datamodules.records import PreferencePair, Prompt
from datamodules.sources.hh import ASSISTANT, HUMAN, is_transcript_prompt

_SPEAKERS = {"user": HUMAN, "assistant": ASSISTANT}


def prompt_key(prompt: Prompt) -> int:
    """Return a signed 64-bit hash, equal for the same question or dialogue in any of the three forms."""
    return _hash(json.dumps(_transcript(prompt)))


def answer_keys(pair: PreferencePair) -> tuple[int, int]:
    """Return signed 64-bit hashes of the texts and fields of the chosen and the rejected response; 0 for none."""
    given = [(pair.chosen, pair.chosen_fields), (pair.rejected, pair.rejected_fields)]
    chosen, rejected = (
        0 if text is None else _hash(json.dumps([text.strip(), dict(more)], default=str)) for text, more in given
    )
    return chosen, rejected


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _transcript(prompt: Prompt) -> object:
    if isinstance(prompt, str):
        return prompt if is_transcript_prompt(prompt) else f"{HUMAN} {prompt.strip()}{ASSISTANT}"
    if any(len(message) > 2 or message.role not in _SPEAKERS for message in prompt):  # no transcript has these
        return [list(message.values()) if len(message) == 2 else message for message in prompt]
    turns = (f"{_SPEAKERS[message.role]} {message.content.strip()}" for message in prompt)
    return "".join(turns) + ASSISTANT
