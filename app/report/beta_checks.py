"""The report's checks of β and the filter: each is a pure function that maps a `Run` to a finding or None."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from app.core.intervals import share_over
from app.report.finding import Finding, sentence
from app.report.run import Run
from callbacks.beta_scheduler import BetaScheduler
from callbacks.epsilon_beta import EpsilonBeta
from callbacks.health import BOUND_SHARE, BY_NAME, FAR_FROM_BETA0, FAR_SHARE, SMALL_SAMPLE

SOME_STEPS = 0.01  # smallest share of steps with β at a bound that gives a finding
WIDE_SWING = 0.5  # mean change of β from step to step, as a share of β0


def calmer_beta(run: Run) -> str:
    """Return the clause of this run's schedule that makes its β vary less."""
    name, settings = next(
        (entry for entry in run.callbacks if entry[0] in ("BetaScheduler", "EpsilonBeta")), ("", {})
    )
    if name == "EpsilonBeta":
        return EpsilonBeta.calmer
    return BetaScheduler(z_normalised=bool(settings.get("z_normalised"))).calmer


def beta_at_its_floor(run: Run) -> Finding | None:
    """Return a finding if β is at its floor in at least SOME_STEPS of the steps."""
    floor = run.last("beta/floor")
    return at_bound(run, "floor", floor, lambda beta: beta <= (floor or 0) * (1 + 1e-5))


def beta_at_its_ceiling(run: Run) -> Finding | None:
    """Return a finding if β is at its ceiling in at least SOME_STEPS of the steps."""
    ceiling = run.last("beta/ceiling")
    rest = "; raise the schedule's ceiling only if β may go there"
    return at_bound(run, "ceiling", ceiling, lambda beta: beta >= (ceiling or 0) * (1 - 1e-5), rest)


def at_bound(
    run: Run, name: str, bound: float | None, meets: Callable[[np.ndarray], np.ndarray], rest: str = ""
) -> Finding | None:
    """Return a finding if the β used `meets` its `bound` in at least SOME_STEPS of the steps."""
    beta = run.curve("beta/used")
    if beta is None or bound is None:
        return None
    share = float(meets(beta.values).mean())
    if share < SOME_STEPS:
        return None
    return Finding(
        run.name,
        "act" if share >= BOUND_SHARE else "watch",
        f"β sat at its {name} of {bound:g} in {share:.0%} of steps.",
        f"{round(share * len(beta.values))} of {len(beta.values)} steps",
        sentence(BY_NAME["β at its bounds"].advice_with(calmer_beta(run)) + rest),
        "beta",
    )


def beta_far_from_base(run: Run) -> Finding | None:
    """Return a finding if β is FAR_FROM_BETA0 times larger or smaller than β0 in more than FAR_SHARE of steps."""
    beta, base = run.curve("beta/used"), run.last("beta/base")
    if beta is None or base is None or not run.chooses_beta:
        return None
    above = float((beta.values > FAR_FROM_BETA0 * base).mean())
    below = float((beta.values < base / FAR_FROM_BETA0).mean())
    if above + below <= FAR_SHARE:
        return None
    return Finding(
        run.name,
        "act",
        f"β lay beyond three times β0 = {base:g}, or below a third of it, in {above + below:.0%} of steps.",
        f"above 3·β0 in {above:.0%}, below β0/3 in {below:.0%}; largest {np.nanmax(beta.values) / base:.3g}·β0",
        sentence(BY_NAME["β far from β0"].advice_with(calmer_beta(run))),
        "beta",
    )


def how_beta_moved(run: Run) -> Finding | None:
    """Return a finding on a dynamic β: it hardly moved, varied too much between steps, or followed the data."""
    beta, base = run.curve("beta/used"), run.last("beta/base")
    if beta is None or base is None or not run.chooses_beta:
        return None
    low, high = np.nanquantile(beta.values, [0.05, 0.95])
    swing = float(np.abs(np.diff(beta.values)).mean()) / base if len(beta.values) > 1 else 0.0
    evidence = (
        f"5 % to 95 % of steps: {low:.4g} to {high:.4g}; mean change from step to step {swing:.0%} of β0 = {base:g}"
    )
    if max(abs(high - base), abs(low - base)) < 0.02 * base:
        return Finding(
            run.name,
            "watch",
            f"β hardly left β0 = {base:g}.",
            evidence,
            "This run is plain DPO in all but name: raise the schedule's α or ε, or train until the gaps open.",
            "beta",
        )
    if swing > WIDE_SWING:
        return Finding(
            run.name,
            "act",
            f"β jumped by {swing:.0%} of β0 from one step to the next.",
            evidence,
            "Such a β follows the noise of the batch. " + sentence(f"{calmer_beta(run)}, or raise data.batch_size"),
            "beta",
        )
    return Finding(
        run.name, "good", f"β followed the data, mostly between {low:.3g} and {high:.3g}.", evidence, "", "beta"
    )


def few_pairs_carry_the_weight(run: Run) -> Finding | None:
    """Return a finding if the filter's weights have a small effective sample size in the second half of the run."""
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
        sentence(BY_NAME["effective sample size collapsed"].advice),
        "filter",
    )


def who_is_dropped(run: Run) -> Finding | None:
    """Return a finding on whether the filter drops flipped pairs more often, if the data marks flipped pairs."""
    if run.audit is None or "flipped" not in run.audit or not run.filters:
        return None
    known = run.audit[run.audit.flipped.notna()]
    wrong = known.flipped.astype(bool)
    if wrong.all() or not wrong.any():
        return None
    flipped, clean = (share_over(rows.pair_id.to_numpy(), ~rows.kept) for rows in (known[wrong], known[~wrong]))
    evidence = f"dropped: flipped {flipped}, not flipped {clean} (share [95 % interval over pairs])"
    if flipped.low > clean.high:
        times = f"{flipped.mean / clean.mean:.1f} times as often as" if clean.mean else "and never"
        return Finding(
            run.name,
            "good",
            f"The filter dropped pairs marked as flipped {times} the others.",
            evidence,
            "",
            "filter",
        )
    return Finding(
        run.name,
        "watch",
        "The filter did not drop pairs marked as flipped more often than the others.",
        evidence,
        "It needs gaps that tell them apart: train longer, or lower ρ (filter.keep_ratio).",
        "filter",
    )
