"""Which pairs are likely mislabelled and which are outliers, judged from what a run measured of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from app.method.moments import RunningMoments
from app.run_folder import grouping_labels


def pair_histories(audit: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of the audit's rows (one per pair and step), in order of first appearance.

    Columns: `times_seen`, `times_dropped` (seen and not trained on), `first_step`, `last_step`, `first_gap`,
    `last_gap` in nats, and the two scores, which grow with suspicion:

    * `mislabelled`: Σ −2·M0·h/σ² over the pair's steps, in nats. Where the gaps of rightly labelled pairs are
      normal with mean M0 and deviation σ, those of swapped pairs are the mirror image; this is then the log of
      the likelihood ratio of the two. It weighs a step by what the policy knew: zero while M0 is.
    * `outlier`: the mean |h − M0|/σ over the pair's steps; an extreme gap of either sign.

    M0 and σ are running moments of the gaps themselves, so that every arm is judged alike, plain DPO too. A
    step without a finite gap counts as seen and says nothing; neither do steps before σ is known. Labels of the
    data that group its pairs (an annotator, a language) come last, as `label_…` where a column has their name.
    """
    seen = audit.sort_values("step", kind="stable")
    seen = seen.assign(finite=np.isfinite(seen.gap.to_numpy(float)))
    mean, std = running_moments(seen)
    known = (seen.finite & (std > 1e-6)).to_numpy()
    mean, std, gap = mean.to_numpy(), std.to_numpy(), seen.gap.to_numpy(float)
    evidence, distance = np.zeros(len(seen)), np.full(len(seen), np.nan)
    # a policy whose mean gap is negative has not learned the labels yet: it cannot tell which are wrong
    evidence[known] = -2 * np.maximum(mean[known], 0) * gap[known] / std[known] ** 2
    distance[known] = np.abs(gap[known] - mean[known]) / std[known]
    seen = seen.assign(evidence=evidence, distance=distance, dropped=~seen.kept.astype(bool))
    columns = {
        "times_seen": ("step", "size"),
        "times_dropped": ("dropped", "sum"),
        "first_step": ("step", "first"),
        "last_step": ("step", "last"),
        "first_gap": ("gap", "first"),
        "last_gap": ("gap", "last"),
        "mislabelled": ("evidence", "sum"),
        "outlier": ("distance", "mean"),
    }
    labels = {f"label_{name}" if name in columns else name: (name, "first") for name in grouping_labels(audit)}
    histories = seen.groupby("pair_id", sort=False).agg(**columns, **labels)
    return histories.reset_index().fillna({"outlier": 0.0})


def running_moments(seen: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """M0 and σ (0 while unknown) at the step of every row, from the finite gaps of all pairs of that step."""
    running = RunningMoments()
    mean, std = {}, {}
    for step, rows in seen.groupby("step", sort=True):
        moments = running.update(torch.tensor(rows.gap[rows.finite].to_numpy(float)))
        mean[step], std[step] = moments.mean, moments.std or 0.0
    return seen.step.map(mean), seen.step.map(std)


def hits(scores: np.ndarray, wrong: np.ndarray, listed: int) -> np.ndarray:
    """Whether each of the `listed` pairs with the highest `scores` [n] is `wrong` [n] bool, highest first: [k].

    Ties are in the order of the pairs. Raises ValueError for a number outside [1, n].
    """
    if not 1 <= listed <= len(scores):
        raise ValueError(f"cannot list {listed} of {len(scores)} pairs")
    return wrong[np.argsort(-np.asarray(scores, float), kind="stable")[:listed]]
