"""Scores for pairs that are likely mislabelled and for outliers, computed from the audit of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from app.method.dynamic_beta import RunningMoments
from app.method.reference_flips import fitted
from app.report.run import grouping_labels


def pair_histories(audit: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair, in order of first appearance, from an audit with one row per pair and step.

    Columns: `times_seen`, `times_dropped` (seen and not trained on), `first_step`, `last_step`, `first_gap`,
    `last_gap` in nats, and scores that are higher for more suspicious pairs:

    * `mislabelled`: Σ −2·max(M0, 0)·h/σ² over the pair's steps, in nats. If the gaps of correctly labelled pairs
      are normal with mean M0 and deviation σ, those of swapped pairs have mean −M0, and this is the log-likelihood
      ratio of the two. A step has weight zero while M0 ≤ 0: such a policy has not learned the labels yet.
    * `outlier`: the mean of |h − M0|/σ over the pair's steps, large for an extreme gap of either sign; 0 if no step
      of the pair counts.

    * `wrong_by_posterior`: 1 − the mean confidence that RE-PO had in the label; NaN without RE-PO.
    * `wrong_by_reference`: the probability that the label is flipped, fitted to the reference's margins
      (`app.method.reference_flips`); NaN without a reference.
    * `dropped_share`: `times_dropped` over `times_seen`.

    M0 and σ are running moments of the gaps themselves, so that all arms, plain DPO too, are scored in the same
    way. A step without a finite gap, or before σ is known, counts as seen but adds to neither score. Labels of the
    data that group its pairs (an annotator, a language) are the last columns, with the prefix `label_` if the name
    is taken.
    """
    seen = audit.sort_values("step", kind="stable")
    for name in ("reference_margin", "label_confidence"):  # audits of version 0.1 lack them
        seen[name] = pd.to_numeric(seen[name]) if name in seen else np.nan
    gap = seen.gap.astype(float)
    running, moments = RunningMoments(), {}
    for step, gaps in gap.groupby(seen.step):
        found = running.update(torch.tensor(gaps[np.isfinite(gaps)].to_numpy()))
        moments[step] = found.mean, found.std or 0.0
    mean, std = (seen.step.map({step: both[place] for step, both in moments.items()}) for place in (0, 1))
    known = gap.where(np.isfinite(gap) & (std > 1e-6))
    seen = seen.assign(
        # a policy with a negative mean gap has not learned the labels yet and cannot tell which are wrong
        evidence=-2 * mean.clip(lower=0) * known / std**2,
        distance=(known - mean).abs() / std,
        dropped=~seen.kept.astype(bool),
    )
    columns = {
        "times_seen": ("step", "size"),
        "times_dropped": ("dropped", "sum"),
        "first_step": ("step", "first"),
        "last_step": ("step", "last"),
        "first_gap": ("gap", "first"),
        "last_gap": ("gap", "last"),
        "mislabelled": ("evidence", "sum"),
        "outlier": ("distance", "mean"),
        "wrong_by_posterior": ("label_confidence", lambda confidence: 1.0 - confidence.mean()),
        "wrong_by_reference": ("reference_margin", "first"),
        "dropped_share": ("dropped", "mean"),
    }
    # not of `seen`, whose columns may have their names
    labels = audit.groupby("pair_id")[grouping_labels(audit)].first()
    labels = labels.rename(columns={name: f"label_{name}" for name in columns})
    histories = seen.groupby("pair_id", sort=False).agg(**columns).join(labels)
    margins = torch.tensor(histories.wrong_by_reference.to_numpy(float))
    fit = fitted(margins[torch.isfinite(margins)], None, 500)
    histories["wrong_by_reference"] = np.nan if fit is None else fit.probability(margins).numpy()
    histories["reference_margin"] = margins.numpy()
    return histories.reset_index().fillna({"outlier": 0.0})


# the column of the score by the name of the signal, the best first as measured (docs/monitoring.md)
SIGNALS = {
    "reference": "wrong_by_reference",
    "gaps": "mislabelled",
    "posterior": "wrong_by_posterior",
    "dropped": "dropped_share",
}


def available(histories: pd.DataFrame) -> dict[str, str]:
    """Return why each signal that can rank these pairs can do so, the best signal first.

    The reference counts only if it prefers the labelled response more often than chance would, by three standard
    errors: one that knows nothing of these pairs cannot tell which labels are wrong.
    """
    found = {}
    margins = histories.reference_margin.dropna()
    agreement = float((margins > 0).mean())  # NaN without a margin
    if agreement - 0.5 > 3 * 0.5 / max(len(margins), 1) ** 0.5:
        found["reference"] = f"the reference prefers the labelled response in {agreement:.0%} of the pairs"
    if (histories.mislabelled != 0).any():  # below 0 for a pair whose gaps speak for its label
        found["gaps"] = "the mean gap rose above 0"
    if histories.wrong_by_posterior.notna().any():
        found["posterior"] = "the run estimated the probability of every label (RE-PO)"
    if histories.dropped_share.nunique() > 1:
        found["dropped"] = "the filter dropped some pairs more often than others"
    return found


def hits(scores: np.ndarray, wrong: np.ndarray, listed: int) -> np.ndarray:
    """Return [listed] bool: whether each pair with one of the highest `scores` [n] is `wrong` [n], highest first.

    Ties keep the order of the pairs. Raises ValueError unless `listed` lies in [1, n].
    """
    if not 1 <= listed <= len(scores):
        raise ValueError(f"cannot list {listed} of {len(scores)} pairs")
    return wrong[np.argsort(-np.asarray(scores, float), kind="stable")[:listed]]
