"""The loader: one order for any number of ranks, every pair once an epoch, and a place to continue from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import controlled, table_of
from torch import Tensor

from app.core.errors import UserError
from app.method.batch import PackedRows
from datamodules.batches import OptimizerBatchLoader, PreferenceBatch, balanced_shares, pack
from datamodules.table import PairTable

PAIRS, BATCH = 23, 5
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def table() -> PairTable:
    return table_of(controlled(PAIRS))[0]


def loader(table: PairTable, rank: int = 0, world_size: int = 1, **settings: Any) -> OptimizerBatchLoader:
    settings = {"batch_size": BATCH, "micro_batch_tokens": 300, "shuffle": True, "seed": 4, **settings}
    return OptimizerBatchLoader(table, np.arange(len(table)), rank=rank, world_size=world_size, **settings)


def ids(batches: list[PreferenceBatch]) -> list[list[str]]:
    return [list(batch.pair_ids) for batch in batches]


def flat(batches: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(batches))


@given(tokens=st.lists(st.integers(1, 100), max_size=40), world_size=st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_shares_are_a_balanced_partition(tokens: list[int], world_size: int) -> None:
    shares = balanced_shares(tokens, world_size)
    assert len(shares) == world_size
    assert sorted(position for share in shares for position in share) == list(range(len(tokens)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(tokens[position] for position in share) for share in shares]
    # no rank holds more than the lightest one and one pair besides
    assert max(loads) - min(loads) <= max(tokens, default=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_order_does_not_depend_on_the_number_of_ranks(table: PairTable, world_size: int) -> None:
    alone = list(loader(table))
    ranks = [list(loader(table, rank, world_size)) for rank in range(world_size)]
    assert [len(batch.pair_ids) for batch in alone] == [5, 5, 5, 5, 3]  # the rest is kept
    assert len({id for batch in alone for id in batch.pair_ids}) == PAIRS
    for step, whole in enumerate(alone):
        together = [rank[step] for rank in ranks]
        assert sorted(p for part in together for p in part.positions.tolist()) == list(range(len(whole.pair_ids)))
        for part in together:
            assert part.pair_ids == whole.pair_ids
            assert part.labels == whole.labels
            assert part.tokens == whole.tokens
            for pair, position in zip(part.share, part.positions.tolist(), strict=True):
                for mine, its in zip(pair, whole.share[position], strict=True):
                    np.testing.assert_array_equal(mine, its)
        assert whole.tokens == sum(len(ids) for pair in whole.share for ids in pair if ids is not None)


def test_epochs_are_shuffled_apart_and_by_the_seed(table: PairTable) -> None:
    first = loader(table)
    one, two = ids(list(first)), ids(list(first))
    assert sorted(flat(one)) == sorted(flat(two))
    assert one != two
    again = loader(table)
    assert (ids(list(again)), ids(list(again))) == (one, two)
    assert ids(list(loader(table, seed=5))) != one


@given(stop=st.integers(0, 12))
@settings(max_examples=13, deadline=None)
def test_continues_exactly_where_it_stopped(table: PairTable, stop: int) -> None:
    def endless(source: OptimizerBatchLoader) -> Iterator[PreferenceBatch]:
        while True:
            yield from source

    whole = ids(list(islice(endless(loader(table)), 15)))
    stopped = loader(table)
    before = ids(list(islice(endless(stopped), stop)))
    # another seed, which the state overrides: a resumed run goes on with the order that it began
    resumed = loader(table, seed=99)
    resumed.load_state_dict(stopped.state_dict())
    assert before + ids(list(islice(endless(resumed), 15 - stop))) == whole


def test_the_next_batch_is_made_and_packed_while_one_is_in_use(
    table: PairTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_by: list[str] = []

    def noting(*arguments: Any) -> list[PackedRows]:
        packed_by.append(threading.current_thread().name)
        return pack(*arguments)

    monkeypatch.setattr("datamodules.batches.pack", noting)
    source = loader(table)
    states = []
    for batch in source:
        state = source.state_dict()
        rows = batch.micro_batches(SIDES, "packed", 30.0)
        expected = pack(batch.share, range(len(batch.share)), SIDES, "packed", 300, 30.0)
        for mine, its in zip(rows, expected, strict=True):
            for name, column in vars(its).items():
                assert not isinstance(column, Tensor) or torch.equal(getattr(mine, name), column), name
        states.append((state["pairs_served"], source.state_dict() == state))
    # the place is that of the batch in use, whatever is made beside it
    assert states == [(5, True), (10, True), (15, True), (20, True), (23, True)]
    # how to pack is known when the first batch is given back; the third may be packed before the second
    assert sorted(name.startswith("next-batch") for name in packed_by) == [False, False, True, True, True]
    # another layout than the one made ahead
    batch = next(iter(source))
    assert batch.micro_batches(SIDES, "separate", 30.0)[0].layout == "separate"


def test_evaluation_starts_at_the_first_pair_every_time(table: PairTable) -> None:
    evaluation = loader(table, shuffle=False)
    whole = ids(list(evaluation))
    assert flat(whole) == table.pair_ids(np.arange(PAIRS))
    assert ids(list(islice(evaluation, 2))) == whole[:2]
    assert ids(list(evaluation)) == whole


def test_a_budget_too_small_for_the_longest_pair_is_refused() -> None:
    data = controlled(5, micro_batch_tokens=20)
    with pytest.raises(UserError, match=r"data\.micro_batch_tokens is 20, but the longest pair needs up to \d+"):
        data.setup("fit")


def test_demonstrations_cannot_be_compared() -> None:
    demonstrations, _ = table_of(controlled(5, stage="demonstrations"))
    batch = next(iter(loader(demonstrations)))
    with pytest.raises(UserError, match="needs rejected responses"):
        batch.micro_batches(("chosen", "rejected"), "packed", 30.0)
    assert batch.micro_batches(("chosen",), "packed", 30.0)


@pytest.mark.parametrize("field", ["batch_size", "micro_batch_tokens"])
def test_sizes_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be a whole number from 1"):
        controlled(5, **{field: 0})


@pytest.mark.parametrize("most", [3, 7, None])
def test_no_more_pairs_than_asked_for_come_from_all_splits(table: PairTable, most: int | None) -> None:
    data = controlled(PAIRS)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None)  # type: ignore[assignment]
    data._tables = {"train": (table, np.arange(5)), "validation": (table, np.arange(PAIRS))}
    loaders = data.batches_of(lambda keys: np.ones(len(keys), bool), most)
    assert sum(len(one.indices) for one in loaders) == (most or PAIRS)
