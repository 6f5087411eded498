"""Packing of pairs of any length into micro-batches of rows under a token budget.

A row holds several pairs, each as `[prompt | chosen | rejected]` with the prompt once. Short rows waste more space
on padding, and long rows cost more attention on a dense mask; the packer balances the two costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from app.method.batch import Layout, PackedRows, PairRun
from datamodules.records import TokenisedPair


class Run(NamedTuple):
    """A run of tokens that share a prompt, which the packer places as a unit."""

    pair: int  # index in the rank's share
    prompt: np.ndarray
    responses: list[np.ndarray]
    first_response: int  # index of its first response among all responses of the micro-batch's pairs

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(response) for response in self.responses)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices whose lengths sum to at most `capacity`, by best-fit decreasing."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = [row for row, space in enumerate(free) if space >= length]
        if fitting:
            row = min(fitting, key=free.__getitem__)
            rows[row].append(index)
            free[row] -= length
        else:
            rows.append([index])
            free.append(capacity - length)
    return rows


def plan_rows(lengths: Sequence[int], budget: int, balanced_row: float) -> list[list[list[int]]]:
    """Return micro-batches of rows of indices, each with at most `budget` tokens, padding included.

    R rows of T tokens cost R·T·(1 + T/balanced_row), where `balanced_row` is the row length at which attention
    costs a token as much as everything else. The function tries row lengths from the longest run upwards, in steps
    of an eighth, and takes the cheapest. Raises ValueError if a single run exceeds `budget`.
    """
    if not lengths:
        return []
    longest, most = max(lengths), min(sum(lengths), budget)
    if longest > budget:
        raise ValueError(f"a run of {longest} tokens does not fit a micro-batch of {budget} tokens")
    plans: list[tuple[float, int, list[list[int]]]] = []
    capacity = longest
    while True:
        rows = best_fit(lengths, capacity)
        width = max(sum(lengths[i] for i in row) for row in rows)
        plans.append((width * len(rows) * (1 + width / balanced_row), width, rows))
        if capacity >= most:
            break
        capacity = min(most, max(capacity + 1, capacity * 9 // 8))
    _, width, rows = min(plans, key=lambda plan: plan[0])
    per_batch = budget // width
    return [rows[start : start + per_batch] for start in range(0, len(rows), per_batch)]


def plan_separate(lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
    """Return micro-batches like `plan_rows`, with one run per row and runs of similar length together."""
    batches: list[list[list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > budget:
            raise ValueError(f"a run of {lengths[index]} tokens does not fit a micro-batch of {budget} tokens")
        # the first run of a micro-batch is its longest, so it sets the width
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0][0]] <= budget:
            batches[-1].append([index])
        else:
            batches.append([[index]])
    return batches


def pack(
    share: Sequence[TokenisedPair],
    pairs: Sequence[int],
    responses: Sequence[str],
    layout: Layout,
    budget: int,
    balanced_row: float,
) -> list[PackedRows]:
    """Return the given `pairs` of a rank's `share`, packed in micro-batches of at most `budget` tokens each."""
    runs: list[list[Run]] = []  # of each pair: one, or one for each response
    for pair in pairs:
        sides = [getattr(share[pair], side) for side in responses]
        parts = [sides] if layout == "packed" else [[side] for side in sides]
        runs.append([Run(pair, share[pair].prompt, part, number) for number, part in enumerate(parts)])
    lengths = [max(run.tokens for run in own) for own in runs]
    if layout == "packed":
        plan = plan_rows(lengths, budget, balanced_row)
        rows = [[[runs[i][0] for i in row] for row in batch] for batch in plan]
    else:  # both rows of a pair must be in one micro-batch, so pairs are planned by their longer row
        plan = plan_separate(lengths, max(1, budget // len(responses)))
        rows = [[[run] for row in batch for i in row for run in runs[i]] for batch in plan]
    return [lay_out(some, len(responses), layout) for some in rows]


def lay_out(rows: Sequence[Sequence[Run]], responses_per_pair: int, layout: Layout) -> PackedRows:
    """Return the runs as tensors in a `PackedRows`, without a Python loop over tokens."""
    width = max(sum(run.tokens for run in row) for row in rows)
    segments: list[np.ndarray] = []
    known: list[tuple[int, ...]] = []  # of each segment: the six columns that are named below
    pairs: list[int] = []
    pair_runs: list[PairRun] = []
    for row_number, row in enumerate(rows):
        place = row_number * width
        for group, run in enumerate(row):
            if not pairs or pairs[-1] != run.pair:
                pairs.append(run.pair)
            first_response = (len(pairs) - 1) * responses_per_pair + run.first_response
            prompt_end = place + len(run.prompt) - 1
            for part, tokens in enumerate([run.prompt, *run.responses]):
                segments.append(tokens)
                position, response = (len(run.prompt), first_response + part - 1) if part else (0, -1)
                known.append((place, group, part, position, response, prompt_end))
                place += len(tokens)
            pair_runs.append(PairRun(len(run.prompt), tuple(map(len, run.responses))))
        if padding := (row_number + 1) * width - place:
            pair_runs.append(PairRun(0, (padding,)))

    lengths = np.array([len(segment) for segment in segments])
    tokens = np.concatenate(segments)
    offset = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of a token in its segment
    starts, groups, parts, positions, response, prompt_ends = np.repeat(np.array(known), lengths, axis=0).T
    places = starts + offset

    def grid(values: np.ndarray, fill: int) -> torch.Tensor:
        flat = np.full(len(rows) * width, fill, dtype=np.int64)
        flat[places] = values
        return torch.from_numpy(flat).view(len(rows), width)

    is_target = response >= 0
    # the first token of every response is predicted by the last token of its prompt
    predictor = np.where(offset == 0, prompt_ends, places - 1)
    counts = np.bincount(response[is_target], minlength=len(pairs) * responses_per_pair)
    return PackedRows(
        input_ids=grid(tokens, 0),
        position_ids=grid(positions + offset, 0),
        group=grid(groups, -1),
        part=grid(parts, 0),
        predict_index=torch.from_numpy(predictor[is_target]),
        target_ids=torch.from_numpy(tokens[is_target]),
        response_index=torch.from_numpy(response[is_target]),
        response_tokens=torch.from_numpy(counts),
        pairs=torch.tensor(pairs, dtype=torch.int64),
        runs=pair_runs,
        layout=layout,
    )
