"""Optimizer batches: the loader with its position for a resume, a rank's share, and packing pairs into rows."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from app.core.errors import UserError
from app.method.batch import Layout, PackedRows, PairRun
from datamodules.records import TokenisedPair
from datamodules.table import PairTable

# (rows of a batch, epoch, number of the batch in the epoch) → the rows that replace them
Exchange = Callable[[np.ndarray, int, int], np.ndarray]
Packing = tuple[tuple[str, ...], Layout, float]  # the settings of `OptimizerBatch.micro_batches`


def balanced_shares(tokens: Sequence[int], world_size: int) -> list[list[int]]:
    """Return the positions of a global batch per rank: the longest first, each to the least loaded rank."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for position in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(position)
        heapq.heappush(loads, (load + tokens[position], rank))
    return [sorted(share) for share in shares]


@dataclass(eq=False)
class PreferenceBatch:
    """An `OptimizerBatch`, and no container of tensors: nothing moves to the device before it is packed."""

    share: Sequence[TokenisedPair]
    positions: torch.Tensor
    pair_ids: Sequence[str]
    labels: Mapping[str, Sequence[object]]
    tokens: int
    micro_batch_tokens: int
    longest: tuple[int, int]  # tokens of the longest pair, and of the longest prompt with one response
    packing: Packing | None = None  # the settings with which all pairs were last packed
    ahead: list[PackedRows] | None = None  # all pairs, packed so in advance, until they are used

    @property
    def pair_keys(self) -> torch.Tensor:
        """Return the keys [B] int64 of this rank's pairs."""
        return torch.tensor([pair.key for pair in self.share], dtype=torch.int64)

    def micro_batches(
        self, responses: Sequence[str], layout: Layout, balanced_row: float, pairs: Sequence[int] | None = None
    ) -> list[PackedRows]:
        """Return `pairs` of the share (all if None), packed. Raises UserError for missing rejected responses."""
        if "rejected" in responses and any(pair.rejected is None for pair in self.share):
            raise UserError("The data holds demonstrations only; preference optimisation needs rejected responses.")
        if pairs is None:
            packing = (tuple(responses), layout, balanced_row)
            ahead, self.ahead = self.ahead, None
            if ahead is not None and packing == self.packing:
                return ahead
            self.packing, pairs = packing, range(len(self.share))
        return pack(self.share, list(pairs), responses, layout, self.micro_batch_tokens, balanced_row)

    def stretched(self, pairs: Sequence[int]) -> PreferenceBatch:
        """Return a pair of the run's largest size and a short one, made of the tokens of `pairs` (all if empty)."""
        share = [self.share[pair] for pair in pairs] or self.share
        made = [stretched_pair(share, *sizes) for sizes in (self.longest, short(*self.longest)) if share]
        return PreferenceBatch(
            made, torch.arange(len(made)), ["", ""], {}, self.longest[0], self.micro_batch_tokens, self.longest
        )


def short(tokens: int, row: int) -> tuple[int, int]:
    """Return the sizes of a pair that is short compared to the longest: up to 16 tokens in every part."""
    part = min(16, max(1, tokens // 8))
    return (3 * part if tokens > row else 2 * part), 2 * part


def stretched_pair(share: Sequence[TokenisedPair], tokens: int, row: int) -> TokenisedPair:
    """Return a pair that repeats the tokens of `share`: `tokens` in all, `row` in prompt and chosen response."""
    source = np.concatenate([part for pair in share for part in pair if part is not None])
    rejected = tokens - row
    prompt = max(1, min(row // 2, row - rejected))  # so that the rejected response begins far from it
    sides = np.split(np.resize(source, tokens), [prompt, row])
    return TokenisedPair(sides[0], sides[1], sides[2] if rejected else None)


@dataclass(eq=False)
class OptimizerBatchLoader:
    """A loader that yields a `PreferenceBatch` per optimizer step and resumes exactly where it stopped.

    The order is a permutation keyed by (seed, epoch), the same on any number of ranks, or with `keep_order` that of
    `indices` in every epoch. The last batch of an epoch may be smaller; no pair is dropped. With `endless`, one
    iterator takes pass after pass, because Lightning ends an epoch that it limits by itself.

    While a batch is in use, a thread makes the next one and packs it with the settings of the last. A batch depends
    only on its place in the order, and only batches that were yielded count as served.
    """

    table: PairTable
    indices: np.ndarray  # [n] rows of the table that this loader serves
    _: KW_ONLY
    batch_size: int
    micro_batch_tokens: int
    shuffle: bool
    seed: int
    rank: int = 0
    world_size: int = 1
    keep_order: bool = False
    endless: bool = False
    exchange: Exchange | None = None
    longest: tuple[int, int] = (0, 0)  # tokens of the largest pair and of the largest row of the run
    epoch: int = field(default=0, init=False)
    pairs_served: int = field(default=0, init=False)  # in this epoch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # Lightning asks for a new iterator before it exhausts the last one, so a finished epoch ends here. An
        # evaluation always starts at its first pair, even after one that was cut short, as the sanity check is.
        if self.pairs_served >= len(self.indices) or not self.shuffle:
            self._next_pass()
        yield from self._pass()
        while self.endless:
            self._next_pass()
            yield from self._pass()

    def _next_pass(self) -> None:
        self.epoch += 1
        self.pairs_served = 0

    def _pass(self) -> Iterator[PreferenceBatch]:
        """Yield the batches that are left of this pass over the pairs."""
        order = self.indices
        if self.shuffle and not self.keep_order:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        packing: Packing | None = None  # settings with which the last batch was packed
        with ThreadPoolExecutor(1, "next-batch") as worker:
            ahead: Future[PreferenceBatch] | None = None
            while self.pairs_served < len(order):
                batch = self._batch(order, self.pairs_served, None) if ahead is None else ahead.result()
                self.pairs_served += len(batch.pair_ids)
                left = self.pairs_served < len(order)
                ahead = worker.submit(self._batch, order, self.pairs_served, packing) if left else None
                yield batch
                packing = batch.packing or packing

    def _batch(self, order: np.ndarray, start: int, packing: Packing | None) -> PreferenceBatch:
        """Return the batch that begins at `start` in the order, packed in advance if `packing` is given."""
        rows = order[start : start + self.batch_size]
        if self.exchange is not None:
            rows = self.exchange(rows, self.epoch, start // self.batch_size)
        tokens = self.table.lengths[rows]
        positions = balanced_shares(tokens.tolist(), self.world_size)[self.rank]
        batch = PreferenceBatch(
            share=[self.table[int(rows[position])] for position in positions],
            positions=torch.tensor(positions, dtype=torch.int64),
            pair_ids=self.table.pair_ids(rows),
            labels=self.table.labels(rows),
            tokens=int(tokens.sum()),
            micro_batch_tokens=self.micro_batch_tokens,
            longest=self.longest,
        )
        if packing is not None:
            batch.ahead = batch.micro_batches(*packing)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in pairs, so that a resume with another `batch_size` loses or repeats none."""
        return {
            "epoch": self.epoch,
            "pairs_served": self.pairs_served,
            "pairs": len(self.indices),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = int(state["epoch"])
        self.pairs_served = int(state["pairs_served"])
        self.seed = int(state["seed"])
        rank_zero_info(
            f"train: resumes after {self.pairs_served} of {len(self.indices)} pairs in pass {self.epoch + 1}, with "
            f"{self.batch_size} pairs a step"
        )


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
