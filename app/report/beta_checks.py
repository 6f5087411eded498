"""What is worth telling about β and the filter. Pure functions of a `Run`: a finding, or None."""

from __future__ import annotations

import numpy as np

from app.intervals import wilson
from app.report.finding import Finding
from app.report.run import Run
from callbacks.health import BOUND_SHARE, SMALL_SAMPLE

SOME_STEPS = 0.01  # share of steps with β at a bound that is worth a word
WIDE_SWING = 0.5  # mean change of β from step to step, as a share of β0


def beta_at_its_floor(run: Run) -> Finding | None:
    """β at or below the smallest value allowed."""
    beta, floor = run.curve("beta/used"), run.last("beta/floor")
    if beta is None or floor is None:
        return None
    share = float((beta.values <= floor * (1 + 1e-5)).mean())
    if share < SOME_STEPS:
        return None
    return Finding(
        run.name,
        "act" if share >= BOUND_SHARE else "watch",
        f"β sat at its floor of {floor:g} in {share:.0%} of steps.",
        f"{round(share * len(beta.values))} of {len(beta.values)} steps",
        "The gaps are wide for this α: lower BetaScheduler.alpha, or set z_normalised: true, which measures them "
        "in standard deviations.",
        "beta",
    )


def beta_at_its_ceiling(run: Run) -> Finding | None:
    """β at or above the largest value allowed."""
    beta, ceiling = run.curve("beta/used"), run.last("beta/ceiling")
    if beta is None or ceiling is None:
        return None
    share = float((beta.values >= ceiling * (1 - 1e-5)).mean())
    if share < SOME_STEPS:
        return None
    return Finding(
        run.name,
        "act" if share >= BOUND_SHARE else "watch",
        f"β sat at its ceiling of {ceiling:g} in {share:.0%} of steps.",
        f"{round(share * len(beta.values))} of {len(beta.values)} steps",
        "Raise BetaScheduler.maximum if β may go there, or lower BetaScheduler.alpha.",
        "beta",
    )


def how_beta_moved(run: Run) -> Finding | None:
    """The range of a dynamic β: hardly any, wild, or as meant."""
    beta, base = run.curve("beta/used"), run.last("beta/base")
    if beta is None or base is None or not run.chooses_beta:
        return None
    low, high = np.nanquantile(beta.values, [0.05, 0.95])
    swing = float(np.abs(np.diff(beta.values)).mean()) / base if len(beta.values) > 1 else 0.0
    evidence = (
        f"5 % to 95 % of steps: {low:.4g} to {high:.4g}; mean change from step to step {swing:.0%} of β0 = {base:g}"
    )
    if high - low < 0.02 * base:
        return Finding(
            run.name,
            "watch",
            f"β hardly left β0 = {base:g}.",
            evidence,
            "This run is plain DPO in all but name: raise BetaScheduler.alpha, or train until the gaps open.",
            "beta",
        )
    if swing > WIDE_SWING:
        return Finding(
            run.name,
            "act",
            f"β jumped by {swing:.0%} of β0 from one step to the next.",
            evidence,
            "Such a β follows the noise of the batch: lower BetaScheduler.alpha or raise data.batch_size.",
            "beta",
        )
    return Finding(
        run.name, "good", f"β followed the data, mostly between {low:.3g} and {high:.3g}.", evidence, "", "beta"
    )


def few_pairs_carry_the_weight(run: Run) -> Finding | None:
    """Effective sample size of the filter's weights in the second half."""
    size = run.curve("filter/effective_sample_size")
    if size is None or run.audit is None or not len(size.part(0.5, 1)):
        return None
    pairs = float(run.audit.groupby("step").size().median())
    share = float(np.median(size.part(0.5, 1))) / pairs
    if share >= SMALL_SAMPLE:
        return None
    return Finding(
        run.name,
        "act",
        f"A few pairs carry nearly all the filter's weight: worth {share:.0%} of a batch.",
        f"median effective sample size in the second half {share * pairs:.1f} of {pairs:.0f} pairs",
        "Outliers stretch the gaps: look at the pairs with the most extreme ones (TensorBoard, text tab).",
        "filter",
    )


def who_is_dropped(run: Run) -> Finding | None:
    """Whether the filter finds mislabelled pairs, where the data knows them."""
    if run.audit is None or "flipped" not in run.audit or not run.filters:
        return None
    known = run.audit[run.audit.flipped.notna()]
    wrong = known.flipped.astype(bool)
    if wrong.all() or not wrong.any():
        return None
    flipped, clean = (wilson(float((~known.kept[group]).mean()), int(group.sum())) for group in (wrong, ~wrong))
    evidence = f"dropped: flipped {flipped}, clean {clean} (share [95 % interval])"
    if flipped.low > clean.high:
        times = f"{flipped.mean / clean.mean:.1f} times as often as" if clean.mean else "and never"
        return Finding(
            run.name, "good", f"The filter dropped mislabelled pairs {times} clean ones.", evidence, "", "filter"
        )
    return Finding(
        run.name,
        "watch",
        "The filter did not drop mislabelled pairs more often than clean ones.",
        evidence,
        "It needs gaps that tell them apart: train longer, or lower ρ (PairFilter.keep_ratio).",
        "filter",
    )
