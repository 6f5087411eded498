"""The format of the sample files that `beta-dpo generate` and `PolicySamples` write: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from app.core.errors import UserError

SAMPLE_FIELDS = (
    *("prompt_id", "prompt", "response", "finished", "temperature", "sample"),
    *("tokens", "prompt_ids", "response_ids", "logp", "reference_logp"),
)


def sample_line(prompt_id: str, prompt: Any, response: str, finished: bool, **more: Any) -> str:
    """Return the JSON line of one sample; the prompt is text, or messages as objects with `role` and `content`.

    A response that is not `finished` was cut: it has no end-of-turn. `prompt_ids` and `response_ids` are the tokens
    that the model read and wrote, the end-of-turn included; text read back may have others.
    """
    row = {"prompt_id": prompt_id, "prompt": prompt, "response": response, **more, "finished": finished}
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_samples(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte offset of the line, row) for every sample.

    A line needs `prompt` and `response`. `prompt_id` defaults to the line number, and `finished` to True. Raises
    UserError if the file cannot be read, or with the line number if a line is not a sample.
    """
    place = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield place, {"prompt_id": str(number), "finished": True, **_sample(line, f"{path}:{number}")}
                place += len(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; `beta-dpo generate` writes samples.") from error


def _sample(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if _is_prompt(row["prompt"]) and isinstance(row["response"], str):
            return dict(row)
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{where} is not a sample as `beta-dpo generate` writes it; sample again.")


def _is_prompt(value: Any) -> bool:
    """Return whether `value` is text, or turns as objects or (in older files) as lists of role and content."""
    if isinstance(value, str):
        return True
    turns = [list(map(turn.get, ("role", "content"))) if isinstance(turn, dict) else turn for turn in value]
    return all(len(turn) == 2 and all(isinstance(part, str) for part in turn) for turn in turns)
