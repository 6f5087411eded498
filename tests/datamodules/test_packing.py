"""Packing as laws: every token once, no budget broken, every target predicted from the right place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.method.batch import Layout, PackedRows
from datamodules.batches import best_fit, pack, plan_rows, plan_separate
from datamodules.records import TokenisedPair

SIDES = ("chosen", "rejected")
lengths = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
shares = st.lists(lengths, min_size=1, max_size=12)
balances = st.sampled_from([1.0, 30.0, math.inf])


def make_share(shapes: Sequence[tuple[int, int, int]]) -> list[TokenisedPair]:
    """Pairs in which no token id occurs twice, so that a misplaced one shows."""
    ids = iter(range(1, 10_000))
    return [TokenisedPair(*(np.array([next(ids) for _ in range(n)]) for n in shape)) for shape in shapes]


def walk(rows: PackedRows, sides: int) -> dict[tuple[int, int], tuple[list[int], list[int], list[int]]]:
    """Read the micro-batch by brute force: (pair, side) → prompt, response, and the ids that predict it."""
    found = {}
    flat = rows.input_ids.flatten().tolist()
    for response in range(len(rows.response_tokens)):
        mine = (rows.response_index == response).nonzero().flatten().tolist()
        targets = [int(rows.target_ids[i]) for i in mine]
        places = [int(rows.predict_index[i]) for i in mine]
        row, column = divmod(places[0], rows.input_ids.shape[1])  # the last token of the prompt
        prompt: list[int] = []
        while (
            column >= 0
            and rows.part[row, column] == 0
            and rows.group[row, column] == rows.group[row, places[0] % rows.input_ids.shape[1]]
        ):
            prompt.insert(0, int(rows.input_ids[row, column]))
            column -= 1
        found[int(rows.pairs[response // sides]), response % sides] = (prompt, targets, [flat[p] for p in places])
    return found


@given(
    shapes=shares,
    extra=st.integers(0, 60),
    balance=balances,
    layout=st.sampled_from(["packed", "separate"]),
    sides=st.sampled_from([SIDES, SIDES[:1]]),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_is_laid_out_whole_and_once(
    shapes: list[tuple[int, int, int]], extra: int, balance: float, layout: Layout, sides: tuple[str, ...]
) -> None:
    share = make_share(shapes)
    budget = 2 * max(sum(shape) for shape in shapes) + extra
    micro_batches = pack(share, range(len(share)), sides, layout, budget, balance)
    assert sorted(int(pair) for rows in micro_batches for pair in rows.pairs) == list(range(len(share)))
    for rows in micro_batches:
        assert rows.input_ids.numel() <= budget
        assert rows.layout == layout
        found = walk(rows, len(sides))
        assert len(found) == len(sides) * len(rows.pairs)
        expected_tokens: list[int] = []
        for (pair, side), (prompt, targets, predictors) in found.items():
            response = getattr(share[pair], sides[side]).tolist()
            assert prompt == share[pair].prompt.tolist()
            assert targets == response
            # each token is predicted by the one before it, the first by the end of the prompt
            assert predictors == [prompt[-1], *response[:-1]]
            expected_tokens += response + (prompt if layout == "separate" or side == 0 else [])
        placed = rows.input_ids[rows.group >= 0]
        assert sorted(placed.tolist()) == sorted(expected_tokens)
        assert not rows.input_ids[rows.group < 0].any()
        assert rows.response_tokens.tolist() == [
            len(getattr(share[int(pair)], side)) for pair in rows.pairs for side in sides
        ]


@given(shapes=shares)
@settings(max_examples=30, deadline=None)
def test_positions_restart_after_the_prompt(shapes: list[tuple[int, int, int]]) -> None:
    share = make_share(shapes)
    positions: dict[int, int] = {}
    for pair in share:
        assert pair.rejected is not None
        for response in (pair.chosen, pair.rejected):
            positions |= {int(id): place for place, id in enumerate([*pair.prompt, *response])}
    for rows in pack(share, range(len(share)), SIDES, "packed", 200, math.inf):
        real = rows.group >= 0
        assert [positions[id] for id in rows.input_ids[real].tolist()] == rows.position_ids[real].tolist()


@given(shapes=shares, data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_choice_of_pairs(shapes: list[tuple[int, int, int]], data: st.DataObject) -> None:
    share = make_share(shapes)
    chosen = data.draw(st.lists(st.integers(0, len(share) - 1), unique=True))
    for layout in ("packed", "separate"):
        rows = pack(share, chosen, SIDES, layout, 100, 30.0)
        assert sorted(int(pair) for one in rows for pair in one.pairs) == sorted(chosen)
        ids = {int(id) for one in rows for id in one.input_ids[one.group >= 0]}
        parts = [part for pair in chosen for part in share[pair] if part is not None]
        assert ids == {int(id) for part in parts for id in part}


def test_no_pair_makes_no_micro_batch() -> None:
    assert pack(make_share([(1, 1, 1)]), [], SIDES, "packed", 10, 10.0) == []
    assert pack(make_share([(1, 1, 1)]), [], SIDES, "separate", 10, 10.0) == []
    empty = PackedRows.empty()
    assert empty.input_ids.shape == (1, 1)
    assert len(empty.pairs) == len(empty.target_ids) == len(empty.response_tokens) == 0


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), slack=st.integers(0, 100), balance=balances)
@settings(max_examples=60, deadline=None)
def test_plans_partition_and_obey_the_budget(lengths: list[int], slack: int, balance: float) -> None:
    budget = max(lengths) + slack
    packed = plan_rows(lengths, budget, balance)
    separate = plan_separate(lengths, budget)
    for plan in (packed, separate):
        assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(lengths)))
    for rows in packed:
        assert len(rows) * max(sum(lengths[i] for i in row) for row in rows) <= budget
    for rows in separate:
        assert {len(row) for row in rows} == {1}
        assert len(rows) * max(lengths[i] for (i,) in rows) <= budget
    assert plan_rows(lengths, budget, balance) == packed


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), capacity=st.integers(20, 60))
@settings(max_examples=40, deadline=None)
def test_best_fit_wastes_at_most_half(lengths: list[int], capacity: int) -> None:
    rows = best_fit(lengths, capacity)
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert sum(loads) == sum(lengths)
    assert loads[-1] <= capacity
    # no two rows could have been one
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_costly_attention_asks_for_short_rows() -> None:
    lengths = [10] * 16
    long_rows = plan_rows(lengths, 160, math.inf)
    short_rows = plan_rows(lengths, 160, 1.0)
    assert max(len(row) for rows in short_rows for row in rows) == 1
    assert len(long_rows) == len(short_rows) == 1


@pytest.mark.parametrize("plan", [lambda: plan_rows([5, 11], 10, 30.0), lambda: plan_separate([5, 11], 10)])
def test_a_run_that_cannot_fit_is_an_error(plan: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="11 tokens does not fit a micro-batch of 10"):
        plan()


def test_rows_move_to_a_device_whole() -> None:
    (rows,) = pack(make_share([(2, 3, 4)]), [0], SIDES, "packed", 20, 30.0)
    moved = rows.to("meta")
    assert moved.layout == "packed"
    assert all(t.device.type == "meta" for t in vars(moved).values() if isinstance(t, torch.Tensor))
