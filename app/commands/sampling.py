"""Sampling of responses from a model in batches, and their log-probabilities."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from datamodules.packing import pack
from datamodules.records import TokenisedPair
from lightning_modules.scorer import ResponseScorer


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[np.ndarray], stops: Sequence[int], sampling: dict[str, Any]
) -> list[np.ndarray]:
    """Return one response per prompt, up to and including the first of the ids `stops`."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), stops[0])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # generation continues the right end, so padding is on the left
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        **sampling,
    )
    return [_up_to_stop(row, stops) for row in output[:, width:].cpu().numpy()]


def _up_to_stop(ids: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(ids, stops))
    return ids[: ends[0] + 1] if len(ends) else ids


@torch.no_grad()
def score(model: Any, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[float]:
    """Return log π(y|x) of every response, EOS included, at temperature 1."""
    scorer = ResponseScorer(model)
    pairs = [TokenisedPair(prompt, response, None) for prompt, response in zip(prompts, responses, strict=True)]
    budget = len(pairs) * max(len(pair.prompt) + len(pair.chosen) for pair in pairs)
    logps = torch.zeros(len(pairs), dtype=torch.float64)
    for rows in pack(pairs, range(len(pairs)), ("chosen",), "separate", budget, scorer.balanced_row):
        logps[rows.pairs] = scorer(rows.to(model.device)).cpu()
    return logps.tolist()


def generator_state(device: torch.device) -> str:
    """Return as text the state of the random generator that sampling on `device` uses."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return base64.b64encode(state.numpy().tobytes()).decode()


def restore_generator(state: str, device: torch.device) -> None:
    """Set the random generator of `device` to `state`, as `generator_state` returned it."""
    tensor = torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensor, device)
    else:
        torch.set_rng_state(tensor)
