"""The findings of a report: every check applied to every run, with findings that ask for a change first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from app.report import beta_checks, policy_checks
from app.report.finding import Finding, Level
from app.report.run import Run

CHECKS: tuple[Callable[[Run], Finding | None], ...] = (
    policy_checks.against_the_baseline,
    policy_checks.against_other_runs,
    beta_checks.beta_at_its_floor,
    beta_checks.beta_at_its_ceiling,
    beta_checks.beta_far_from_base,
    beta_checks.how_beta_moved,
    beta_checks.few_pairs_carry_the_weight,
    beta_checks.who_is_dropped,
    policy_checks.chosen_probability_falls,
    policy_checks.overfitting,
    policy_checks.accuracy_is_saturated,
    policy_checks.more_malformed_answers,
    policy_checks.pairs_without_a_gap,
    policy_checks.slower_at_the_end,
)


def findings(runs: Sequence[Run]) -> list[Finding]:
    """Return all findings of all runs, sorted by level and then by run."""
    found = [finding for run in runs for check in CHECKS if (finding := check(run)) is not None]
    return sorted(found, key=lambda finding: get_args(Level).index(finding.level))
