"""Runs made of numbers that a test chooses, in memory or as a log folder on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from app.report.run import Run

STEPS, PAIRS = 40, 16


def run_with(
    name: str = "run", audit: pd.DataFrame | None = None, /, **curves: Sequence[float] | np.ndarray
) -> Run:
    """A run in memory; `beta__used=[…]` is the curve beta/used."""
    found = {
        tag.replace("__", "/"): pd.Series(np.asarray(values, float), 1 + np.arange(len(values)))
        for tag, values in curves.items()
    }
    return Run(name, Path(name), found, audit)


def audit_of(steps: int = STEPS, pairs: int = PAIRS, seed: int = 0, filtered: bool = True) -> pd.DataFrame:
    """Gaps that open with the step; flipped pairs have them mirrored and are dropped, the others hardly ever."""
    random = np.random.default_rng(seed)
    step = np.repeat(np.arange(steps), pairs)
    flipped = random.random(steps * pairs) < 0.2
    gap = step / steps * (2 + random.normal(size=steps * pairs)) * np.where(flipped, -1, 1)
    kept = ~flipped | (random.random(steps * pairs) < 0.3) if filtered else np.ones(steps * pairs, bool)
    mean = pd.Series(gap).groupby(step).transform("mean")
    return pd.DataFrame(
        {
            "step": step + 1,
            "pair_id": [f"p{number}" for number in range(steps * pairs)],
            "gap": gap,
            "log_weight": 0.0,
            "kept": kept,
            "beta": 0.1 * (1 + 0.1 * mean) if filtered else 0.1,
            "running_mean": mean if filtered else None,
            "running_std": 1.0 if filtered else None,
            "flipped": flipped,
            "kind": np.where(random.random(steps * pairs) < 0.5, "<b>broken</b>", "graded"),
        }
    )


def write_run(
    folder: Path, audit: pd.DataFrame | None, scalars: Mapping[str, Sequence[float]], **files: str
) -> Path:
    """A log folder with what is given; `config_yaml="…"` becomes config.yaml."""
    folder.mkdir(parents=True)
    if audit is not None:
        (folder / "audit").mkdir()
        audit.to_parquet(folder / "audit" / "steps.parquet")
    if scalars:
        with SummaryWriter(str(folder)) as writer:
            for tag, values in scalars.items():
                for step, value in enumerate(values, 1):
                    writer.add_scalar(tag, value, step)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def scalars_of(steps: int = STEPS, dynamic: bool = True, seed: int = 0) -> dict[str, Any]:
    """Every curve that a run of the quickstart logs and the report draws."""
    random, at = np.random.default_rng(seed), np.linspace(0, 1, steps)

    def noisy(values: np.ndarray, by: float = 0.05) -> np.ndarray:
        return values + by * random.normal(size=steps)

    found = {
        "beta/used": noisy(0.1 + 0.02 * at, 0.005) if dynamic else np.full(steps, 0.1),
        "beta/base": np.full(steps, 0.1),
        "gap/mean": noisy(at),
        "filter/kept_fraction": np.full(steps, 0.8 if dynamic else 1.0),
        "train/loss": noisy(0.69 - 0.2 * at),
        "train/reward_accuracy": noisy(0.5 + 0.4 * at),
        "train/log_ratio_chosen": noisy(-0.3 * at),
        "train/log_ratio_rejected": noisy(-1.5 * at),
        "train/kl_chosen": at[::10],
        "train/kl_rejected": at[::10],
        "train/pairs_per_second": noisy(np.full(steps, 100.0), 5),
        "train/tokens_per_second": noisy(np.full(steps, 9000.0), 300),
        "val/reward_accuracy": [0.9],
        "val/policy_accuracy": [0.8],
        "val/reference_accuracy": [0.7],
        "val/pairs": [512.0],
    }
    if dynamic:
        found |= {
            "beta/floor": np.full(steps, 0.001),
            "beta/clamped": np.zeros(steps),
            "gap/running_mean": at,
            "gap/running_std": 0.5 + at,
            "filter/effective_sample_size": np.full(steps, 13.0),
        }
    return found
