"""HH transcripts (turns "\\n\\nHuman: …" and "\\n\\nAssistant: …" in one text), and keys of prompts and answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from datamodules.records import Message, PreferencePair, Prompt
from datamodules.sources.rows import BadRow, text

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_PUNCTUATION = re.compile(r"""[\s.,;:!?'"()…“”‘’„«»]+""")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_HEADERS = {"user": HUMAN, "assistant": ASSISTANT, "system": ""}


def split_transcript(transcript: str, name: str) -> tuple[str, str]:
    """Split a whole transcript after its last "\\n\\nAssistant:" into (prompt, response).

    `name` is the transcript's field, for the error message. Raises BadRow.
    """
    if not transcript.startswith(HUMAN):
        raise BadRow("not an HH transcript", f"{name} does not start with {HUMAN!r}")
    cut = transcript.rfind(ASSISTANT)
    if cut < transcript.rfind(HUMAN):
        raise BadRow("last turn is not the assistant's", name)
    cut += len(ASSISTANT)
    return transcript[:cut], transcript[cut:]


def question_prompt(question: object, name: str) -> str:
    """Return a single question as an HH prompt: one Human turn, then "\\n\\nAssistant:".

    `name` is the question's field. Raises BadRow, also if the question contains turns itself.
    """
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
    pairs = zip(turns[::2], turns[1::2], strict=True)
    first = (Message("system", before),) if before else ()
    return (*first, *(Message(_ROLES[role], content) for role, content in pairs))


def transcript(turns: Sequence[Message]) -> str:
    """Return the HH prompt of these turns: the inverse of `transcript_turns`."""
    return "".join(_HEADERS[turn.role] + turn.content for turn in turns) + ASSISTANT


def hh_messages(prompt: str) -> tuple[Message, ...]:
    """Return the turns of an HH prompt as messages, Human as "user" and Assistant as "assistant".

    The "\\n\\nAssistant:" at the end of `prompt` is the header of the response, not a message. Raises ValueError
    if it is missing, if other text precedes the turns, or if they do not alternate, with a Human turn first and
    last.
    """
    if not is_transcript_prompt(prompt):
        raise ValueError(f"an HH prompt ends with {ASSISTANT!r}")
    messages = tuple(Message(turn.role, turn.content.strip()) for turn in transcript_turns(prompt))
    if messages and messages[0].role == "system":
        raise ValueError(f"an HH prompt starts with {HUMAN!r}, not with {prompt[:20]!r}")
    for index, message in enumerate(messages):
        if message.role != ("user", "assistant")[index % 2]:
            raise ValueError(f"turn {index + 1} of the HH prompt is another {message.role} turn")
    if not messages or messages[-1].role != "user":
        raise ValueError("the HH prompt does not end with a Human turn")
    return messages


def prompt_messages(prompt: Prompt) -> tuple[Message, ...]:
    """Return any prompt as messages: its own, the turns of an HH prompt, or a single user turn.

    Raises ValueError if the turns of an HH prompt do not alternate.
    """
    if not isinstance(prompt, str):
        return prompt
    return hh_messages(prompt) if is_transcript_prompt(prompt) else (Message("user", prompt),)


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
    # no transcript has other roles or further fields
    if any(len(message) > 2 or message.role not in ("user", "assistant") for message in prompt):
        return [list(message.values()) if len(message) == 2 else message for message in prompt]
    turns = (f"{_HEADERS[message.role]} {message.content.strip()}" for message in prompt)
    return "".join(turns) + ASSISTANT
