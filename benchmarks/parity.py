"""Compare this project's losses and β-DPO step with TRL, NumPy and plain PyTorch, in one table.

    make parity        (or: python -m benchmarks.parity, with the extra `trl` installed)

Exits with status 1 when a row is out of tolerance, or when TRL is missing and its rows could not be measured.
All runs train a random model of two layers, in about half a minute on one CPU core.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from benchmarks import parity_method
from benchmarks.parity_runs import Bench, Run, distance, fit, norm
from benchmarks.tables import markdown, versions

Parameters = dict[str, Tensor]


class Row(NamedTuple):
    """One comparison: the largest difference found, and the largest that rounding can explain."""

    against: str
    subject: str
    quantity: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


def parameter_rows(against: str, subject: str, bench: Bench, ours: Parameters, theirs: Parameters) -> list[Row]:
    """Return how far apart two policies are that were trained from the weights of `bench`."""
    apart = distance(ours, theirs)
    return [
        Row(against, subject, "parameters ÷ their norm", apart / norm(theirs), 1e-5),
        Row(against, subject, "parameters ÷ way travelled", apart / distance(bench.parameters(), theirs), 1e-3),
    ]


def trl_rows(bench: Bench) -> list[Row]:
    """Return the comparison of losses at a fixed β with TRL, over ten AdamW steps each."""
    from benchmarks import parity_trl

    against, rows = f"TRL {version('trl')}", []
    for name, run, theirs, parameters in parity_trl.compare(bench):
        # relative for IPO and SPPO, whose losses start at 25 and 50
        apart = [abs(step.loss - loss) / max(1.0, abs(loss)) for step, loss in zip(run.steps, theirs, strict=True)]
        rows.append(Row(against, name, f"loss, {len(apart)} steps", float(np.max(apart)), 1e-5))
        rows += parameter_rows(against, name, bench, run.parameters, parameters)
    return rows


def method_rows(bench: Bench, run: Run) -> list[Row]:
    """Return the comparison of the β-DPO step of configs/method/authors_code.yaml with NumPy and plain PyTorch."""
    steps = f"{len(run.steps)} steps"
    rows = [
        Row("NumPy float64", "β-DPO", f"{name}, {steps}", difference, 0.0 if name == "pairs kept" else 1e-6)
        for name, difference in parity_method.step_differences(run).items()
    ]
    gaps, parameters = parity_method.replay(bench, run)
    worst = max(float(np.abs(step.gaps - seen).max()) for step, seen in zip(run.steps, gaps, strict=True))
    rows.append(Row("plain PyTorch", "β-DPO", f"gap in nats, {steps}", worst, 1e-3))
    return rows + parameter_rows("plain PyTorch", "β-DPO", bench, run.parameters, parameters)


def parity_table(rows: Sequence[Row]) -> str:
    header = ["against", "loss or method", "quantity", "largest difference", "tolerance", "holds"]
    lines = [
        [*row[:3], f"{row.difference:.1e}", f"{row.tolerance:.0e}", "yes" if row.holds else "NO"] for row in rows
    ]
    return markdown(header, lines, aligned=True)


def main() -> int:
    """Run and print all comparisons and return the exit status."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # only the tables go to standard output
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        os.environ["BETA_DPO_CACHE"] = f"{folder}/cache"
        bench = Bench.create(Path(folder), parity_method.STEPS * parity_method.BATCH_SIZE)
        authors, default = (
            fit(bench, name, name, parity_method.STEPS, parity_method.BATCH_SIZE)
            for name in ("authors_code", "beta_dpo")
        )
        with_trl = find_spec("trl") is not None
        rows = [*(trl_rows(bench) if with_trl else []), *method_rows(bench, authors)]
    found = versions("torch", "transformers", "lightning", "numpy", "trl")
    told = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    print(f"Python {platform.python_version()}, {told}\n")
    print(parity_table(rows), end="\n\n")
    print("What the default makes of the same data:\n")
    header = ["step", "setting", "mean gap", "M0", "σ", "β", "kept"]
    print(markdown(header, parity_method.differences(authors, default), aligned=True))
    if not with_trl:
        print("\nTRL is not installed, so no loss was compared with it: pip install '.[trl]'.", file=sys.stderr)
    return 0 if with_trl and all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
