"""The figure of a run for a slide or a README, in four panels."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np

from app.report.run import Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(run: Run) -> Any:
    """Draw four panels of a run with an audit: β, the gap and its running band, gaps kept and dropped, accuracy."""
    audit = run.audit
    assert audit is not None
    steps = audit.groupby("step")
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    beta, gap, histogram, accuracy = panels.flat

    beta.plot(steps.beta.first(), color="tab:blue", label="β used")
    if "beta/base" in run.curves:
        beta.axhline(run.curves["beta/base"][1][-1], color="gray", linestyle="--", label="β0")
    beta.set(title="β follows the gap of the kept pairs", xlabel="step", ylabel="β")

    gap.plot(steps.gap.mean(), color="tab:orange", label="batch mean of the gap h")
    mean, std = steps.running_mean.first(), steps.running_std.first()
    if mean.notna().any():
        gap.plot(mean, color="black", label="running mean M0")
        gap.fill_between(mean.index, mean - std, mean + std, color="black", alpha=0.12, label="M0 ± σ")
    gap.set(title="reward gap", xlabel="step", ylabel="nats")

    late = audit[audit.step >= audit.step.max() / 2]
    low, high = np.quantile(late.gap, [0.001, 0.999])
    bins = np.linspace(float(low), float(high), 50)
    groups = [("kept", late[late.kept], "tab:blue"), ("dropped", late[~late.kept], "tab:red")]
    for name, part, color in groups:
        if len(part):
            histogram.hist(part.gap, bins=bins, density=True, alpha=0.5, color=color, label=name)
    if "flipped" in late and late.flipped.any():
        flipped = late[late.flipped.astype(bool)]
        histogram.hist(flipped.gap, bins=bins, density=True, histtype="step", color="black", label="flipped label")
    histogram.set(title="gaps in the second half of the run", xlabel="h in nats", ylabel="density")

    accuracy.plot(
        steps.gap.apply(lambda h: ((1 + np.sign(h)) / 2).mean()), color="tab:green", label="training pairs"
    )
    if "val/reward_accuracy" in run.curves:
        at, value = run.curves["val/reward_accuracy"]
        accuracy.plot(at, value, "k*", markersize=10, label="held-out pairs")
    accuracy.set(title="reward accuracy (a tie counts half)", xlabel="step", ylim=(0, 1))
    for panel in panels.flat:
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    return figure
