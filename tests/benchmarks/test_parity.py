"""The parity command measures what it says, finds a fault, and every row of its table holds."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import parity, parity_method
from benchmarks.parity_runs import Bench, Run, fit


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.create(tmp_path_factory.mktemp("a parity's"), parity_method.STEPS * parity_method.BATCH_SIZE)


@pytest.fixture(scope="module")
def authors(bench: Bench) -> Run:
    return fit(bench, "authors", "authors_code", parity_method.STEPS, parity_method.BATCH_SIZE)


# --- the yardstick itself, against numbers worked out by hand ---------------------------------------------


def test_numpy_statistics_by_hand() -> None:
    statistics = parity_method.AuthorsStatistics()
    statistics.update(np.arange(1.0, 6.0))
    assert (statistics.mean, statistics.std) == pytest.approx((0.3, 0.1581139))
    statistics.update(np.arange(3.0, 8.0))
    assert (statistics.mean, statistics.std) == pytest.approx((0.77, 0.3004164))


def test_numpy_step_by_hand() -> None:
    gaps = np.array([2.0, -1.5, 1.0, 2.0])
    statistics = parity_method.AuthorsStatistics(mean=1.0, std=2.0)
    statistics.update(gaps)
    assert (statistics.mean, statistics.std) == pytest.approx((0.9875, 1.9652020))
    weights = parity_method.selection_probabilities(gaps, statistics.mean, statistics.std)
    assert weights / weights[2] * 0.9999798 == pytest.approx([0.8757078, 0.4488390, 0.9999798, 0.8757078])
    kept = gaps[[0, 2, 3]]
    beta = parity_method.batch_beta(0.1, 0.6, kept, statistics.mean)
    assert beta == pytest.approx(0.14075)
    assert parity_method.dpo_loss(kept, beta) == pytest.approx(0.5832621)
    assert parity_method.batch_beta(0.1, 0.6, kept - 30, statistics.mean) == 1e-3


def test_numpy_has_no_number_where_the_released_code_stops() -> None:
    statistics = parity_method.AuthorsStatistics()
    statistics.update(np.zeros(8))
    assert np.isnan(parity_method.selection_probabilities(np.zeros(8), 0.0, statistics.std)).all()
    assert np.isnan(parity_method.selection_probabilities(np.full(8, 50.0), 0.0, 0.1)).all()
    statistics.update(np.ones(1))
    assert np.isnan(statistics.std)


# --- a real run against it ---------------------------------------------------------------------------------


def test_every_row_of_the_method_holds(bench: Bench, authors: Run) -> None:
    rows = parity.method_rows(bench, authors)
    assert len(rows) == 9
    assert [row for row in rows if not row.holds] == []
    # the run is worth comparing: gaps spread, β moves, pairs are dropped, the weights travel
    assert len(authors.steps) >= 20
    assert authors.steps[-1].std > 0.5
    assert max(step.beta for step in authors.steps) > 1.2 * min(step.beta for step in authors.steps)
    assert all(step.kept.sum() == 12 for step in authors.steps)
    start = bench.parameters()
    assert parity.distance(start, authors.parameters) > 0.005 * parity.norm(start)


def test_the_default_is_told_from_the_authors_code(bench: Bench, authors: Run) -> None:
    default = fit(bench, "default", "beta_dpo", parity_method.STEPS, parity_method.BATCH_SIZE)
    apart = parity_method.step_differences(default)
    assert min(apart["M0"], apart["σ"], apart["β"]) > 1e-3  # a thousand times the tolerance
    first, *_, last = parity_method.differences(authors, default)
    assert first[-2] == "stops: σ = 0"
    assert last[1] == "beta_dpo.yaml (default)"
    assert last[-1] == "12"


@pytest.mark.parametrize("column", ["mean", "std", "beta", "loss", "kept", "log_weights"])
def test_a_wrong_number_is_found(column: str, authors: Run) -> None:
    step = authors.steps[5]
    right = getattr(step, column)
    if column == "kept":
        wrong = np.roll(right, 1)
    elif column == "log_weights":
        wrong = right * 1.001
    else:
        wrong = right + 1e-5
    spoilt = Run([*authors.steps[:5], replace(step, **{column: wrong}), *authors.steps[6:]], authors.parameters)
    assert max(parity_method.step_differences(spoilt).values()) > 1e-6


def test_a_wrong_parameter_is_found(bench: Bench, authors: Run) -> None:
    name, value = next(iter(authors.parameters.items()))
    spoilt = Run(authors.steps, authors.parameters | {name: value + 1e-3 * torch.randn_like(value)})
    broken = [row.quantity for row in parity.method_rows(bench, spoilt) if not row.holds]
    assert broken == ["parameters ÷ their norm", "parameters ÷ way travelled"]


def test_nan_is_out_of_tolerance() -> None:
    assert not parity.Row("", "", "", float("nan"), 1.0).holds
    assert "NO" in parity.parity_table([parity.Row("a", "b", "c", 2.0, 1.0)])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="the extra trl is not installed")
def test_every_loss_is_that_of_trl(bench: Bench) -> None:
    rows = parity.trl_rows(bench)
    assert len(rows) == 18
    assert [row for row in rows if not row.holds] == []


def test_the_document_shows_the_table_as_printed(bench: Bench, authors: Run) -> None:
    # the differences vary with the machine: what is compared and how closely does not
    document = (Path(__file__).parents[2] / "docs/method.md").read_text(encoding="utf-8")
    for row in parity.method_rows(bench, authors):
        line = next(line for line in document.splitlines() if row.against in line and row.quantity in line)
        assert f"{row.tolerance:.0e}" in line
