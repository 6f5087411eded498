"""Samples of a model as `beta-dpo generate` and `PolicySamples` draw and write them: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from app.core.errors import UserError
from app.method.ranges import is_finite

SAMPLE_FIELDS = (
    *("prompt_id", "prompt", "response", "finished", "temperature", "sample"),
    *("tokens", "prompt_ids", "response_ids", "logp", "reference_logp"),
)


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[np.ndarray], stops: Sequence[int], sampling: dict[str, Any]
) -> list[np.ndarray]:
    """Return one response per prompt, up to and including the first of the ids `stops`."""
    # generation continues the right end, so padding is on the left
    ids = pad_sequence([torch.from_numpy(prompt) for prompt in prompts], True, stops[0], "left")
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], True, 0, "left")
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        **sampling,
    )
    responses = output[:, ids.shape[1] :].cpu().numpy()
    ends = [np.flatnonzero(np.isin(row, stops)) for row in responses]
    return [row[: end[0] + 1] if len(end) else row for row, end in zip(responses, ends, strict=True)]


def as_sample(tokenizer: Any, prompt: np.ndarray, response: np.ndarray, stops: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a sample that follow from its tokens; it is finished if it ends with one of `stops`."""
    finished = int(response[-1]) in stops
    text = tokenizer.decode(response[:-1] if finished else response, skip_special_tokens=True)
    ids = {"prompt_ids": prompt.tolist(), "response_ids": response.tolist()}
    return {"response": str(text), "finished": finished, "tokens": len(response), **ids}


def sample_line(prompt_id: str, prompt: Any, response: str, finished: bool, **more: Any) -> str:
    """Return the JSON line of a sample: a prompt, as text or messages, a response, and whether it has its end."""
    row = {"prompt_id": prompt_id, "prompt": prompt, "response": response, **more, "finished": finished}
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_samples(path: str) -> Iterator[dict[str, Any]]:
    """Yield the row of every sample; `prompt_id` defaults to the line number, `finished` to True."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = {"prompt_id": number, "finished": True, **_sample(line, f"{path}:{number}")}
                    yield row | {"prompt_id": str(row["prompt_id"])}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; `beta-dpo generate` writes samples.") from error


def _sample(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip())
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half of a character cannot be written
        wrong = _wrong_field(row) if isinstance(row, dict) else "it is no object"
    except ValueError as error:
        wrong = f"bad JSON, {error}".replace("line 1 ", "")
    if wrong:
        raise UserError(f"{where} is not a sample as `beta-dpo generate` writes it ({wrong}): correct the line.")
    return dict(row)


def _wrong_field(row: dict[str, Any]) -> str:
    """Return what is wrong with the first field that cannot be used, or an empty text."""
    scored = ("logp", "reference_logp") if "reference_logp" in row else ()
    optional = [name for name in ("tokens", "temperature") if row.get(name) is not None]
    fields = [
        ("prompt", _is_prompt(row.get("prompt")), "text or messages"),
        ("response", isinstance(row.get("response"), str), "text"),
        ("prompt_id", type(row.get("prompt_id", "")) in (str, int), "text or a whole number"),
        ("finished", isinstance(row.get("finished", True), bool), "true or false"),
    ]
    for name in (*scored, *optional):
        fields.append((name, is_finite(row.get(name)), "a finite number"))
    return next((f"{name} must be {wanted}" for name, right, wanted in fields if not right), "")


def _is_prompt(value: Any) -> bool:
    """Return whether `value` is text, or turns as objects or (in older files) as lists of role and content."""
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not all(isinstance(turn, (dict, list)) for turn in value):
        return False
    turns = [list(map(turn.get, ("role", "content"))) if isinstance(turn, dict) else turn for turn in value]
    return all(len(turn) == 2 and all(isinstance(part, str) for part in turn) for turn in turns)
