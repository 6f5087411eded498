"""Figures as they are reported: their digits, and means with intervals (bootstrap or Wilson)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

MOST_DRAWS = 4_000_000  # largest number of bootstrap draws in memory


def digits(value: float) -> str:
    """Return `value` as log lines, the report and its charts show it: with four significant digits."""
    return f"{value:.4g}"


def span(values: Iterable[float]) -> str:
    """Return the lowest and the highest of `values`, as one number where they print alike."""
    ends = sorted(values)
    return " to ".join(dict.fromkeys((digits(ends[0]), digits(ends[-1]))))


class Estimate(NamedTuple):
    """A mean and its interval, at 95 % unless stated otherwise."""

    mean: float
    low: float
    high: float

    def text(self, decimals: int = 3) -> str:
        """Return `mean [low, high]`, as every table, finding and chart shows it."""
        mean, low, high = (f"{value:,.{decimals}f}" for value in self)
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return self.text()


def bootstrap_mean(values: np.ndarray) -> Estimate:
    """Return the mean of independent `values` [n], n > 0, and its 95 % percentile bootstrap interval."""
    values = np.asarray(values, dtype=float)
    means = [values[drawn].mean(axis=1) for drawn in _resampled(len(values), 2000)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def _resampled(count: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield the items of bootstrap samples, [some, count]. Raises ValueError if there is no item."""
    if not count:
        raise ValueError("no values to take the mean of")
    random = np.random.default_rng(0)
    # in chunks, because the audit of a long run has millions of pairs
    at_once = max(MOST_DRAWS // count, 1)
    for done in range(0, resamples, at_once):
        yield random.integers(count, size=(min(at_once, resamples - done), count))


def length_controlled(scores: np.ndarray, longer: np.ndarray, prompts: Sequence[str]) -> Estimate:
    """Return the win rate at equal length, with its 95 % bootstrap interval over prompts.

    With scores s [n] in [0, 1] and `longer` d [n], how many characters an answer is longer than its rival, θ and φ
    maximise Σ w·(s·log q + (1 − s)·log(1 − q)) − ½·1e-6·(θ² + φ²), where q = σ(θ + φ·tanh(d / std(d))) and w
    gives every prompt the weight 1. The win rate at equal length is σ(θ). It is the model of AlpacaEval 2 (Dubois
    et al. 2024, arXiv 2404.04475, section 3) without the difficulty of the instruction, which needs the answers of
    many models; the penalty keeps θ finite where one side wins everything. Raises ValueError without scores.
    """
    scores, longer = np.asarray(scores, float), np.asarray(longer, float)
    _, prompt, size = np.unique(list(prompts), return_inverse=True, return_counts=True)
    spread = longer.std()
    x = np.stack([np.ones(len(longer)), np.tanh(longer / spread) if spread else np.zeros(len(longer))], axis=1)
    whole = _fit(x, scores, (1 / size[prompt])[None], np.zeros((1, 2)))
    thetas = []
    for drawn in _resampled(len(size), 400):
        times = np.stack([np.bincount(row, minlength=len(size)) for row in drawn])
        thetas.append(_fit(x, scores, (times / size)[:, prompt], whole.repeat(len(drawn), axis=0))[:, 0])
    low, high = np.quantile(np.concatenate(thetas), [0.025, 0.975])
    return Estimate(*(float(1 / (1 + np.exp(-theta))) for theta in (whole[0, 0], low, high)))


def _fit(x: np.ndarray, scores: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return the logistic fits [b, 2] to x [n, 2] under `weights` [b, n], by Newton's method from `start`."""
    fit, penalty = start.copy(), 1e-6
    for _ in range(100):
        q = 1 / (1 + np.exp(-fit @ x.T))
        slope = (weights * (scores - q)) @ x - penalty * fit
        curvature = np.einsum("bn,ni,nj->bij", weights * q * (1 - q), x, x) + penalty * np.eye(2)
        step = np.clip(np.linalg.solve(curvature, slope[..., None])[..., 0], -2, 2)
        fit += step
        if np.abs(step).max() < 1e-9:
            break
    return fit


def share_over(groups: np.ndarray, hits: np.ndarray) -> Estimate:
    """Return the share of `hits` [n] bool with a 95 % Wilson interval that counts the distinct `groups` [n]."""
    # a pair of several epochs is one item; if its hits differ, the interval is too wide rather than too narrow
    return wilson(float(np.mean(hits)) if len(hits) else 0.0, len(np.unique(groups)))


def wilson(share: float, count: int) -> Estimate:
    """Return a share of `count` independent items with its 95 % Wilson interval. ValueError if there is no item."""
    if count < 1:
        raise ValueError("no values to take the mean of")
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))
