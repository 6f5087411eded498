"""β-DPO as the authors' released code computes it, rewritten in NumPy float64 from its description.

It shares no code with `app.method`, so agreement between the two is evidence. The result is NaN where the released
code would crash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class AuthorsStatistics:
    """M0 and σ as exponential averages that start at zero, without bias correction, used after the update."""

    momentum: float = 0.9
    mean: float = 0.0
    std: float = 0.0

    def update(self, gaps: Floats) -> None:
        """Update with the gaps [n] of a batch; a batch of one pair makes σ NaN from then on, like the authors'."""
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt(np.sum((gaps - gaps.mean()) ** 2) / np.float64(len(gaps) - 1))
        self.mean = self.momentum * self.mean + (1 - self.momentum) * float(gaps.mean())
        self.std = self.momentum * self.std + (1 - self.momentum) * float(spread)


def selection_probabilities(gaps: Floats, mean: float, std: float) -> Floats:
    """Return the normalised normal densities of the gaps [n]; NaN if σ is 0 or every density underflows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        density = np.exp(-0.5 * ((gaps - mean) / np.float64(std)) ** 2) / (np.float64(std) * np.sqrt(2 * np.pi))
        return density / density.sum()


def number_kept(n: int, keep_ratio: float) -> int:
    """Return ⌊n·ρ⌋, which is 0 for a very small batch."""
    return int(n * keep_ratio)


def batch_beta(beta0: float, alpha: float, kept_gaps: Floats, mean: float, floor: float = 1e-3) -> float:
    """Return β0·(1 + α·(mean gap of the kept pairs − M0)), but at least `floor`."""
    return max(floor, beta0 * (1 + alpha * (float(kept_gaps.mean()) - mean)))


def dpo_loss(kept_gaps: Floats, beta: float) -> float:
    """Return the mean of −log σ(β·h) over the kept pairs."""
    return float(np.logaddexp(0.0, -beta * kept_gaps).mean())


def micro_batch_betas(
    statistics: AuthorsStatistics, gaps: Floats, size: int, rng: np.random.Generator, keep_ratio: float = 0.8
) -> Floats:
    """Return the β of every micro-batch of `size` pairs if each in turn selects its own pairs and its own β.

    β0 = 0.1 and α = 0.6. NaN if the released code would stop because it has no selection probabilities.
    """
    betas = []
    for start in range(0, len(gaps), size):
        part = gaps[start : start + size]
        statistics.update(part)
        p = selection_probabilities(part, statistics.mean, statistics.std)
        if np.isfinite(p).all():
            kept = rng.choice(len(part), number_kept(len(part), keep_ratio), replace=False, p=p)
            betas.append(batch_beta(0.1, 0.6, part[kept], statistics.mean))
        else:
            betas.append(np.nan)
    return np.array(betas)
