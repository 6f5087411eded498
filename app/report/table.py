"""The numbers of a run that the terminal and the page show in a table."""

from __future__ import annotations

import numpy as np

from app.core.intervals import share_over
from app.report.run import Run


def numbers_of(run: Run) -> dict[str, str]:
    """Return the rows of the table for one run, name → text, without the rows that the run cannot fill."""
    column: dict[str, str] = {}
    for tag, name in (
        ("val/reference_accuracy", "held-out pairs ranked right by the SFT model"),
        ("val/policy_accuracy", "held-out pairs ranked right by the policy"),
        ("val/reward_accuracy", "held-out reward accuracy (0.5 before)"),
    ):
        if (value := run.last(tag)) is not None:
            column[name] = f"{value:.3f}"
    for name, estimate in run.samples.items():
        before = f" (SFT {run.baseline[name].mean:.3f})" if name in run.baseline else ""
        column[f"samples: {'win rate over SFT' if name == 'win rate' else name}"] = f"{estimate}{before}"
    if (beta := run.curve("beta/used")) is not None:
        values = beta.values
        column["β: first, lowest, highest, last"] = ", ".join(
            f"{value:.3f}" for value in (values[0], np.nanmin(values), np.nanmax(values), values[-1])
        )
    if (mean := run.last("gap/running_mean")) is not None and (std := run.last("gap/running_std")) is not None:
        column["running mean M0 and σ at the end"] = f"{mean:.3f}, {std:.3f}"
    if run.audit is not None:
        column |= numbers_of_pairs(run)
    return column


def numbers_of_pairs(run: Run) -> dict[str, str]:
    """Return the rows that need the audit."""
    audit = run.audit
    assert audit is not None
    kept = audit.groupby("step").kept.sum()
    late = audit.gap[audit.step > audit.step.max() / 2]
    column = {
        "pairs kept a step: fewest, most": f"{kept.min()}, {kept.max()}",
        "reward accuracy of training pairs, second half": f"{((1 + np.sign(late)) / 2).mean():.3f}",
    }
    if "flipped" in audit:
        for flipped, name in ((True, "flipped"), (False, "not flipped")):
            rows = audit[audit.flipped == flipped]
            if len(rows):
                column[f"share of pairs {name} dropped"] = str(share_over(rows.pair_id.to_numpy(), ~rows.kept))
    return column
