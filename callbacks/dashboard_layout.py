"""The charts of the dashboard: their curves, what they show, and what to do when they look wrong."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# every chart of the "custom scalars" tab is explained under this tag in the "text" tab
GUIDE = "how to read"


@dataclass(frozen=True)
class Chart:
    """A chart of the dashboard; `band` draws the first curve against an area between the second and the third."""

    title: str
    tags: tuple[str, ...]
    shows: str
    when_wrong: str
    band: bool = False

    @property
    def layout(self) -> list[object]:
        """Return the chart as `SummaryWriter.add_custom_scalars` takes it."""
        if self.band:
            return ["Margin", list(self.tags)]
        # TensorBoard matches a tag as the start of a regular expression
        return ["Multiline", [f"{re.escape(tag)}$" for tag in self.tags]]


CHARTS: dict[str, tuple[Chart, ...]] = {
    "β": (
        Chart(
            "β used, between floor and ceiling",
            ("beta/used", "beta/base", "beta/floor", "beta/ceiling"),
            "The β of each step (mean over the kept pairs), β0, and the bounds that clamp it.",
            "On the floor again and again: the gaps are wide for this α; lower `schedule.alpha`, or choose "
            "`z_normalised: true`. Never leaves β0: raise α, or check that `BetaScheduler` is in the list. "
            "Swings by more than half of β0 from step to step: lower α, or raise the batch size.",
        ),
        Chart(
            "batch mean of M, against running mean ± σ",
            ("band/batch_mean", "band/lower", "band/upper"),
            "The mean reward discrepancy M of a batch (line) and the running M0 ± σ (area) that it is compared "
            "with.",
            "A batch mean outside of the area: one odd batch; look at its pairs (`PairAudit`). Above M0 for "
            "hundreds of steps: the gap still grows and the running mean lags behind, which by itself raises β; "
            "a lower `momentum` follows faster. Below zero: pairs are ranked the wrong way round; check the "
            "columns.",
            band=True,
        ),
        Chart(
            "β and the gap that moves it",
            ("beta/used", "gap/mean", "gap/kept_mean", "gap/running_mean"),
            "β beside the mean gap h of the batch, of its kept pairs, and the running mean.",
            "β must rise where the kept mean stands above the running mean, and fall where it stands below. If "
            "it does not, another callback writes β after `BetaScheduler`. Kept mean always far from the batch "
            "mean: the gaps are skewed, and the filter shifts β.",
        ),
        Chart(
            "share of pairs kept; share clamped",
            ("filter/kept_fraction", "beta/clamped"),
            "The share ρ of each batch that is trained on, and the share of kept pairs whose β met a bound.",
            "Kept below `keep_ratio`: pairs without a finite gap; see `train/nonfinite_pairs`. Clamped above "
            "zero for more than a few steps: lower α, or set the bounds wider on purpose.",
        ),
        Chart(
            "effective sample size of the filter, in pairs",
            ("filter/effective_sample_size",),
            "(Σw)²/Σw² of the selection weights: as if so many pairs were drawn with equal weight.",
            "Normal gaps give 0.87 of the batch. Below a third of the batch, few pairs carry the weight: σ is too "
            "small for these gaps, or outliers stretch them; look at the histograms and at the extreme pairs.",
        ),
        Chart(
            "confidence in the labels (RE-PO)",
            ("confidence/mean", "confidence/doubted", "confidence/lowest_reliability"),
            "Mean probability that a label of the batch is right, the share of labels below one half, and the "
            "reliability η of the least reliable annotator; `confidence/reliability_…` has up to 20 by name.",
            "η falls for all annotators alike: the policy is unsure of most pairs; raise β0 or train longer. One "
            "far below the others: look at that annotator's pairs (`beta-dpo audit`).",
        ),
    ),
    "rewards": (
        Chart(
            "rewards at β0",
            ("train/reward_chosen", "train/reward_rejected"),
            "Implicit reward β0·(log π − log π_ref) of both sides; comparable between runs of equal β0.",
            "Both fall: see drift. Both stay at 0: the learning rate is too low, or the schedule still warms up.",
        ),
        Chart(
            "rewards at the β used",
            ("train/reward_chosen_at_beta_used", "train/reward_rejected_at_beta_used"),
            "The same with the β of the step: what the loss has seen.",
            "Jagged where the chart at β0 is smooth: β swings; lower α.",
        ),
        Chart(
            "margin: at β0, and at the β used",
            ("train/reward_margin", "train/reward_margin_at_beta_used"),
            "Chosen minus rejected reward; with the sigmoid loss, what it pushes up.",
            "Flat: nothing is learned. Grows without end while held-out accuracy stands still: overfitting; stop "
            "earlier, or raise β0.",
        ),
        Chart(
            "accuracy: training and held-out pairs",
            ("train/reward_accuracy", "val/reward_accuracy"),
            "Share of pairs with a positive gap; 0.5 before training, since every gap is 0 then. Training pairs "
            "are measured before their own step.",
            "Training near 1 and held-out behind: pairs are memorised; fewer epochs. Both at 0.5: no signal. "
            "Both well below 0.5: chosen and rejected are swapped.",
        ),
        Chart(
            "loss: training and held-out pairs",
            ("train/loss", "val/loss"),
            "Loss of the kept pairs at the β used, and of held-out pairs at β0; log 2 = 0.693 at step 1 (sigmoid).",
            "The two are on different β, so compare each with itself only. Held-out loss that rises: stop.",
        ),
    ),
    "drift": (
        Chart(
            "displacement: log-ratio of chosen and rejected, nats",
            ("train/log_ratio_chosen", "train/log_ratio_rejected"),
            "log π − log π_ref of each side. Only their difference is trained, so both may sink together.",
            "Chosen falls by more than the margin grows: probability leaks to answers that nobody rated; raise β0, "
            "lower the learning rate, or add `sft_weight`.",
        ),
        Chart(
            "KL to the reference, nats per response",
            ("train/kl_chosen", "train/kl_rejected"),
            "KL(π‖π_ref) of the next token, exact, summed over the tokens of the data's responses.",
            "Grows by more than accuracy does: raise β0 or stop. For the KL on the policy's own answers, use "
            "`beta-dpo generate --reference`.",
        ),
        Chart(
            "log-probability of the responses, nats",
            ("train/logp_chosen", "train/logp_rejected"),
            "log π of whole responses, the reference aside.",
            "A jump: other data, or a truncation that cuts responses. NaN: see `train/nonfinite_pairs`.",
        ),
        Chart(
            "gradient norm before clipping",
            ("train/grad_norm",),
            "The norm that `max_grad_norm` is compared with.",
            "Always above `max_grad_norm`: the limit sets the step, not the learning rate; lower the latter. "
            "Spikes: look at the extreme pairs of those steps.",
        ),
    ),
    "speed": (
        Chart(
            "pairs per second",
            ("train/pairs_per_second",),
            "Pairs of the global batch over the time since the last step, with loading and callbacks.",
            "Falls and stays down: another program on the machine, thermal limits, or longer pairs (see tokens).",
        ),
        Chart(
            "tokens per second",
            ("train/tokens_per_second",),
            "The same in tokens, each prompt counted once; does not depend on how long the pairs are.",
            "Low from the start: raise `micro_batch_tokens`, check `layout` in the log (separate rows cost more).",
        ),
    ),
}


def charts_with(tags: Collection[str]) -> dict[str, list[Chart]]:
    """Return the charts of each category that have at least one of the curves `tags`.

    A chart never loses single curves: TensorBoard draws a chart twice if it differs between runs.
    """
    return {name: [chart for chart in charts if set(chart.tags) & set(tags)] for name, charts in CHARTS.items()}


def layout(tags: Collection[str]) -> dict[str, dict[str, list[object]]]:
    """Return the layout for `SummaryWriter.add_custom_scalars` of a run that logs `tags`."""
    return {
        name: {chart.title: chart.layout for chart in charts}
        for name, charts in charts_with(tags).items()
        if charts
    }


def guide(tags: Collection[str]) -> dict[str, str]:
    """Return a Markdown text per category that explains its charts, for a run that logs `tags`."""
    return {
        name: "\n".join(
            ["| chart | shows | when it looks wrong |", "|---|---|---|"]
            + [f"| **{chart.title}** | {chart.shows} | {chart.when_wrong} |" for chart in charts]
        )
        for name, charts in charts_with(tags).items()
        if charts
    }
