"""Measure the range of β around β0 for several schedules, on simulated gaps or on the gaps in a run's audit.

python -m benchmarks.beta_range                      # simulated runs of 478 steps of 128 pairs, ρ = 0.8
python -m benchmarks.beta_range --audit RUN [RUN …]  # log folders of runs with PairAudit

In a simulated run the mean gap grows from 0 to σ, the standard deviation of the gaps at the end, and their variance
grows linearly; their tails are those of Student's t with 5 degrees of freedom. A replay shows how β would have
followed the recorded gaps, although another β would have trained another policy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from app.method.dynamic_beta import RunningMoments, gaussian_log_weights, gumbel_top_k, number_kept, selection_noise
from benchmarks.tables import markdown
from callbacks import BetaScheduler
from callbacks.pair_audit import read_audit

STEPS, PAIRS, KEEP_RATIO = 478, 128, 0.8  # configs/ultrafeedback_instruct.yaml
SCHEDULES = {
    "α = .6 per nat": BetaScheduler(0.6),
    "α = .1 per nat": BetaScheduler(0.1),
    "α = .6 per σ": BetaScheduler(0.6, 0.2, 5, z_normalised=True),
    "α = 1.2 per σ": BetaScheduler(1.2, 0.2, 5, z_normalised=True),
    "α = 2 per σ": BetaScheduler(2.0, 0.2, 5, z_normalised=True),
}


def simulated_gaps(std: float, seed: int = 0) -> Iterator[torch.Tensor]:
    """Yield the gaps [PAIRS] float64, in nats, of each step of a run whose gaps open to `std`."""
    random = np.random.default_rng(seed)
    for step in range(STEPS):
        opened = (step + 1) / STEPS
        tails = random.standard_t(5, PAIRS) / np.sqrt(5 / 3)  # of unit variance
        yield torch.from_numpy(std * (opened + np.sqrt(opened) * tails))


def recorded_gaps(run: Path) -> Iterator[torch.Tensor]:
    """Yield the finite gaps of each step that the audit of `run` holds."""
    audit = read_audit(run)
    for _, gaps in audit[np.isfinite(audit.gap)].groupby("step").gap:
        yield torch.tensor(gaps.to_numpy(float))


def multiples(batches: Sequence[torch.Tensor], schedule: BetaScheduler) -> np.ndarray:
    """Return β/β0 [steps] as the statistics, the Gaussian filter and the schedule of the package give it."""
    running, found = RunningMoments(), []
    for step, gaps in enumerate(batches):
        moments, count = running.update(gaps), len(gaps)
        weights, noise = gaussian_log_weights(gaps, moments), selection_noise(0, step, count)
        kept = gumbel_top_k(weights, number_kept(count, KEEP_RATIO), noise)
        found.append(schedule.beta(1.0, gaps, kept, moments).clamp(*schedule.bounds(1.0))[0].item())
    return np.array(found)


def table(batches: Sequence[torch.Tensor]) -> str:
    """Return one row per schedule: the spread of β/β0, and how often it is near 1 or at a bound."""
    rows = []
    for name, schedule in SCHEDULES.items():
        beta, (floor, ceiling) = multiples(batches, schedule), schedule.bounds(1.0)
        low, high = np.quantile(beta, [0.05, 0.95])
        met = (beta <= floor) | (beta >= (ceiling or np.inf))
        inside = (beta >= 1 / 3) & (beta <= 3)
        rows.append([name, f"{low:.2f} to {high:.2f}", f"{inside.mean():.1%}", f"{met.mean():.1%}"])
    header = ["schedule", "β/β0, 5 % to 95 % of steps", "within a factor of 3", "at a bound"]
    return markdown(header, rows, aligned=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audit", nargs="+", type=Path, default=[], metavar="RUN", help="log folders to replay")
    runs = parser.parse_args().audit
    for run in runs:
        print(f"{run}, recorded gaps\n\n{table(list(recorded_gaps(run)))}\n", flush=True)
    for std in () if runs else (2.0, 10.0, 20.0, 40.0, 60.0):
        gaps = list(simulated_gaps(std))
        print(f"simulated gaps, σ = {std:g} nats at the end\n\n{table(gaps)}\n", flush=True)


if __name__ == "__main__":
    main()
