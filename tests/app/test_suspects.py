"""The scores of suspicion: against numbers worked out by hand, and against the likelihood ratio they stand for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from app.commands.audit import LAST, available, hits, pair_histories


def audit_of(*steps: dict[str, float], kept: bool = True) -> pd.DataFrame:
    """The audit of steps given as pair id → gap."""
    rows = [(step, id, gap, kept) for step, gaps in enumerate(steps) for id, gap in gaps.items()]
    return pd.DataFrame(rows, columns=["step", "pair_id", "gap", "kept"])


def test_scores_worked_out_by_hand() -> None:
    found = pair_histories(audit_of({"a": 3.0, "b": 1.0}, {"b": -1.0, "c": 3.0})).set_index("pair_id")
    # step 0: M0 = 2, σ = 1. Step 1: M0 = (0.9·0.2 + 0.1·1)/0.19 = 28/19, σ = (0.9·0.1 + 0.1·2)/0.19 = 29/19.
    m0, std = 28 / 19, 29 / 19
    expected = {"a": -2 * 2 * 3, "b": -2 * 2 * 1 + 2 * m0 / std**2, "c": -2 * m0 * 3 / std**2}
    assert found.mislabelled.to_dict() == pytest.approx(expected)
    assert found.outlier["b"] == pytest.approx((1 + (1 + m0) / std) / 2)
    assert found.times_seen.to_dict() == {"a": 1, "b": 2, "c": 1}
    assert found.loc["b", ["first_step", "last_step", "first_gap", "last_gap"]].tolist() == [0, 1, 1.0, -1.0]


def test_labels_that_group_the_pairs_are_carried_along() -> None:
    gaps = {str(number): float(number % 3) for number in range(20)}
    audit = audit_of(gaps, gaps)
    audit["annotator"] = [f"a{int(id) % 2}" for id in audit.pair_id]
    audit["comment"] = audit.pair_id  # another for every pair: no group
    for name in ("outlier", "listed_as", "label_outlier", "distance"):  # of the result, and one of the working
        audit[name] = audit.annotator
    found = pair_histories(audit)
    assert found.distance.tolist() == found.annotator.tolist()
    assert found.annotator.tolist() == ["a0", "a1"] * 10
    assert found.label_outlier.tolist() == found.annotator.tolist()
    named = {"annotator", "label_label_outlier", "label_listed_as", "label_outlier", "distance"}
    assert {*found.columns[found.columns.get_loc(LAST) + 1 :]} == named
    assert "comment" not in found


def test_a_policy_that_knows_nothing_accuses_nobody() -> None:
    equal = pair_histories(audit_of({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}))
    assert (equal[["mislabelled", "outlier"]] == 0).all(axis=None)
    # nor does one that prefers the rejected responses on average
    backwards = pair_histories(audit_of({"a": -3.0, "b": -1.0, "c": 2.0}))
    assert (backwards.mislabelled == 0).all()
    assert (backwards.outlier > 0).all()


def test_steps_without_a_finite_gap_count_as_seen_and_say_nothing() -> None:
    one = audit_of({"a": 2.0, "b": 1.0, "c": 0.0})
    more = audit_of({"a": 2.0, "b": 1.0, "c": 0.0, "d": np.nan}, {"d": np.inf})
    scores = ["mislabelled", "outlier"]
    assert pair_histories(more)[scores].iloc[:3].equals(pair_histories(one)[scores])
    last = pair_histories(more).iloc[3]
    assert (last.times_seen, last.mislabelled, last.outlier) == (2, 0, 0)


def test_dropped_pairs_are_counted() -> None:
    audit = pd.concat([audit_of({"a": 1.0, "b": 2.0}, {"a": 1.0}, kept=False), audit_of({"b": 3.0})])
    found = pair_histories(audit).set_index("pair_id")
    assert found.times_dropped.to_dict() == {"a": 2, "b": 1}
    assert found.times_seen.to_dict() == {"a": 2, "b": 2}


def test_the_score_ranks_as_well_as_the_true_likelihood_ratio() -> None:
    """Gaps of N(μ_t, 1), their sign swapped for a tenth of the pairs, each pair seen three times as μ grows."""
    draws, pairs = np.random.default_rng(0), 4000
    wrong = draws.random(pairs) < 0.1
    sign, means = np.where(wrong, -1, 1), [0.1, 0.6, 1.2]
    gaps = [sign * mean + draws.normal(size=pairs) for mean in means]
    ids = [f"p{i}" for i in range(pairs)]
    found = pair_histories(audit_of(*(dict(zip(ids, gap, strict=True)) for gap in gaps)))
    truth = -2 * np.dot(means, gaps)
    listed = int(wrong.sum())
    ours, best, last = (
        hits(scores, wrong, listed).mean() for scores in (found.mislabelled.to_numpy(), truth, -gaps[-1])
    )
    assert best - 0.02 < ours <= best + 0.02
    assert ours > last  # all three looks tell more than the last one
    assert last > 3 * wrong.mean()


def test_hits_are_in_the_order_of_suspicion() -> None:
    wrong = np.array([False, True, True, False])
    assert hits(np.array([1.0, 3.0, 2.0, 3.0]), wrong, 3).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="cannot list 5 of 4"):
        hits(np.zeros(4), wrong, 5)


def test_the_best_signal_is_one_that_knows() -> None:
    draws = np.random.default_rng(0)
    wrong = draws.random(300) < 0.15
    margin = np.abs(draws.normal(size=300)) * np.where(wrong, -1, 1)
    rows = pd.DataFrame({"step": 0, "pair_id": [f"p{i}" for i in range(300)], "gap": 0.0, "kept": True})
    knows = pair_histories(rows.assign(reference_margin=margin, label_confidence=np.where(wrong, 0.4, 0.9)))
    assert list(available(knows)) == ["reference", "posterior"]
    assert knows.wrong_by_posterior.to_numpy() == pytest.approx(np.where(wrong, 0.6, 0.1))
    assert hits(knows.wrong_by_reference.to_numpy(), wrong, 20).mean() > 0.9
    assert float(knows.wrong_by_reference.mean()) == pytest.approx(0.15, abs=0.05)  # a probability
    ignorant = pair_histories(rows.assign(reference_margin=draws.normal(size=300)))
    assert available(ignorant) == {}
    assert available(pair_histories(rows)) == {}  # an audit of version 0.1 has neither column
