"""The claims that the study tests, each with its comparisons (docs/study/plan.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from benchmarks.study.analysis import Difference, Rows, Verdict, better, robust
from benchmarks.study.plan import ARMS, FLIP_RATES, LARGER, MIXTURES, STATIC, chosen
from benchmarks.study.runs import GAPS


@dataclass(frozen=True)
class Comparison:
    """A comparison of one arm with another by both primary measures."""

    label: str
    end: Difference
    within: Difference

    @property
    def verdict(self) -> Verdict:
        return better(self.end, self.within)


@dataclass(frozen=True)
class Claim:
    """A claim, its comparisons, and the rule for its verdict."""

    name: str  # file name of its figure
    title: str
    source: str  # where the claim comes from, and what was compared
    comparisons: Sequence[Comparison]
    rule: Literal["each", "robust"] = "each"
    remark: str = ""

    def verdicts(self) -> dict[str, Verdict]:
        """Return a verdict per comparison, or one for all of them under the rule "robust"."""
        if self.rule == "robust":
            return {"all": robust([one for each in self.comparisons for one in (each.end, each.within)])}
        return {each.label: each.verdict for each in self.comparisons}


def compare(rows: Rows, label: str, ours: pd.DataFrame, theirs: pd.DataFrame, comparisons: int = 1) -> Comparison:
    """Return ours minus theirs by both primary measures, at 95 % for all `comparisons` together (Bonferroni)."""
    return Comparison(label, *(rows.difference(ours, theirs, figure, comparisons) for figure in MEASURES))


def all_claims(rows: Rows) -> list[Claim]:
    """Return the claims of the confirmation phase, in the order of the document."""
    best = chosen("dpo")[0]
    static = rows.cell("dpo", beta0=best)
    return [
        best_beta_by_gap(rows),
        Claim(
            "arms",
            "β-DPO beats tuned DPO; so does another arm",
            f"The paper's main result. Each arm with its tuned settings, less the best static β ({best:g}); "
            f"intervals are 95 % for all {len(ARMS)} together (Bonferroni).",
            [compare(rows, arm, rows.cell(arm), static, len(ARMS)) for arm in ARMS],
        ),
        Claim(
            "instance",
            "One β per batch is better than one per pair",
            "The paper finds instance-level β unstable, batch-level β better on mixed gaps.",
            [compare(rows, "beta_dpo − instance_level", rows.cell("beta_dpo"), rows.cell("instance_level"))],
        ),
        Claim(
            "filter",
            "The Gaussian filter helps, and not because it drops pairs",
            "The paper reports gains of filtering, without a random filter beside it.",
            [
                compare(rows, "filter_only − best static β", rows.cell("filter_only"), static),
                compare(rows, "beta_dpo − random_filter", rows.cell("beta_dpo"), rows.cell("random_filter")),
            ],
        ),
        Claim(
            "weight",
            "It is β that helps, not the size of the step",
            "In the weight-matched control β stays β0 and the loss is multiplied by β/β0: what dynamic β does to "
            "the size of the gradient without what it does to the shape of the loss.",
            [compare(rows, "beta_dpo − weight_matched", rows.cell("beta_dpo"), rows.cell("weight_matched"))],
        ),
        Claim(
            "losses",
            "It carries over to IPO and SimPO",
            "The paper reports gains for both. SimPO has no reference; its KL is to the SFT model all the same.",
            [
                compare(rows, loss.upper(), rows.cell("beta_dpo", loss=loss), rows.cell("dpo", loss=loss))
                for loss in ("ipo", "simpo")
            ],
        ),
        alpha_and_rho(rows),
        Claim(
            "flips",
            "β-DPO against flipped labels",
            f"The paper speaks of outliers; here labels are flipped. β-DPO less the best static β ({best:g}) at "
            "three rates.",
            [
                compare(
                    rows,
                    f"flip rate {flips:g}",
                    rows.cell("beta_dpo", flips=flips),
                    rows.cell("dpo", flips=flips, beta0=best),
                )
                for flips in FLIP_RATES
            ],
        ),
        Claim(
            "own",
            "Flip weights, an arm of our own",
            "Not in the paper, and no longer in the package: pairs counted less by the probability, from the "
            "policy's own gap, M0 and σ, that their label is flipped. It was to beat the best static β and β-DPO "
            "on mixed data with flips.",
            by_flip_rate(rows, "flip_weights", best),
        ),
    ]


def by_flip_rate(rows: Rows, arm: str, best: float, *bases: float) -> list[Comparison]:
    """Compare an arm on mixed data with the best static β and with β-DPO at every flip rate.

    With `bases`, the arm is compared at each of these β0, and the intervals hold for all of them together.
    """
    return [
        compare(
            rows,
            f"flip rate {flips:g}{f', β0 = {base:g}' if base else ''}: − {name}",
            rows.cell(arm, flips=flips, beta0=base),
            theirs,
            max(len(bases), 1),
        )
        for base in bases or (None,)
        for flips in FLIP_RATES
        for name, theirs in (
            ("best static β", rows.cell("dpo", flips=flips, beta0=best)),
            ("beta_dpo", rows.cell("beta_dpo", flips=flips)),
        )
    ]


def extension_claims(rows: Rows) -> list[Claim]:
    """Return the claims of the extension phase, in the order of the document."""
    best = chosen("dpo")[0]
    return [
        mixtures(rows, best),
        Claim(
            "crossing",
            "β-DPO against flipped labels, by gap",
            "The same as above where all pairs have low or all have high gaps: β-DPO less the best static β "
            f"({best:g}). Intervals are 95 % for both cells together (Bonferroni).",
            [
                compare(
                    rows,
                    f"{data}, flip rate 0.3",
                    rows.cell("beta_dpo", data, 0.3),
                    rows.cell("dpo", data, 0.3, beta0=best),
                    2,
                )
                for data in ("low", "high")
            ],
        ),
        Claim(
            "explicit",
            "It works with explicit rewards",
            "The paper takes the gap of a reward model for M. Here M is that of the true rewards, the best reward "
            "model that there can be: of a flipped pair it is negative. β0 and the rate are those of β-DPO.",
            [
                compare(rows, f"explicit − {name}", rows.cell("explicit_reward"), theirs)
                for name, theirs in (
                    ("implicit", rows.cell("beta_dpo")),
                    ("best static β", rows.cell("dpo", beta0=best)),
                )
            ],
        ),
        Claim(
            "reference",
            "Reference weights, a second arm of our own",
            "Not in the paper ([reference weights](method.md#reference-weights)): pairs count less by "
            "the probability, estimated from the reference's margins, that their label is flipped. At β and rate "
            f"of the best static β, and at β0 = {LARGER:g}; intervals are 95 % for both together (Bonferroni).",
            by_flip_rate(rows, "reference_weights", best, best, LARGER),
        ),
    ]


def mixtures(rows: Rows, best: float) -> Claim:
    """Return the claim on mixtures: β-DPO by seed, as the mean over all shares of high-gap pairs and per share."""

    def pooled(arm: str, beta0: float | None = None) -> pd.DataFrame:
        cells = [rows.cell(arm, data, beta0=beta0)[list(MEASURES)] for data in MIXTURES]
        return sum(cells[1:], cells[0]) / len(cells)

    rivals = (("best static β", "dpo", best), ("instance_level", "instance_level", None))
    comparisons = [
        compare(rows, f"all shares: β-DPO − {name}", pooled("beta_dpo"), pooled(arm, beta0))
        for name, arm, beta0 in rivals
    ]
    for data in MIXTURES:
        share = f"{GAPS[data][1]:.0%} high"
        comparisons += [
            compare(
                rows,
                f"{share}: β-DPO − {name}",
                rows.cell("beta_dpo", data),
                rows.cell(arm, data, beta0=beta0),
                len(MIXTURES),
            )
            for name, arm, beta0 in rivals
        ]
    return Claim(
        "mixtures",
        "On mixtures of gaps, β-DPO beats DPO and instance-level β",
        f"The paper mixes 10 to 40 % high-gap pairs into low-gap ones. β-DPO less the best static β ({best:g}) and "
        "less instance-level β: the mean over the three shares at 95 %, each share at 95 % for the three together.",
        comparisons,
    )


def best_beta_by_gap(rows: Rows) -> Claim:
    """Return the claim that the best β depends on the gap: the gain of a large β over a small one, by data."""
    gains = {
        data: rows.cell("dpo", data, beta0=1.0)[["reward", "within"]]
        - rows.cell("dpo", data, beta0=0.1)[["reward", "within"]]
        for data in ("low", "mixed", "high")
    }
    pairs = (("high − low", "high", "low"), ("high − mixed", "high", "mixed"), ("mixed − low", "mixed", "low"))
    return Claim(
        "gap",
        "The best β grows with the gap of the data",
        "The paper's Figure 1: low-gap data wants a small β, high-gap data a large one. Compared is what β = 1 "
        "gains over β = .1 on one kind of data with what it gains on another.",
        [compare(rows, label, gains[high], gains[low]) for label, high, low in pairs],
        remark=" ".join(_best_by_data(rows, figure, told) for figure, told in MEASURES.items()),
    )


MEASURES = {"reward": "at the end of training", "within": "within the KL budget"}


def _best_by_data(rows: Rows, figure: str, told: str) -> str:
    best = {}
    for data in ("low", "mixed", "high"):
        means = {beta: rows.cell("dpo", data, beta0=beta)[figure].mean() for beta in STATIC}
        best[data] = max(means, key=means.__getitem__)
    return f"Highest mean {told}: " + ", ".join(f"β = {beta:g} on {data}" for data, beta in best.items()) + "."


def alpha_and_rho(rows: Rows) -> Claim:
    default, others = rows.cell("beta_dpo"), ((0.2, 0.8), (2.0, 0.8), (0.6, 0.5))
    return Claim(
        "robust",
        "β-DPO is robust to α and ρ",
        "The paper sweeps α from .2 to 2 and filters from 0 to 40 %. Each less the default (α = .6, ρ = .8).",
        [
            compare(
                rows,
                f"α = {alpha:g}, ρ = {keep:g}",
                rows.cell("beta_dpo", alpha=alpha, keep=keep),
                default,
                len(others),
            )
            for alpha, keep in others
        ],
        rule="robust",
    )
