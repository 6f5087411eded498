"""The questions of the study: which cells each compares, and thereby which runs are needed (docs/study/plan.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from benchmarks.study.runs import GAPS, TASKS, Quickstart, Run, runs_of, with_within
from benchmarks.study.verdicts import Difference

DEVELOPMENT_SEEDS = (3,)  # choose β0 and learning rate of every arm, and decide nothing
MAIN_SEEDS, SIDE_SEEDS = range(21, 28), range(21, 26)
QUICKSTART_SEEDS = range(101, 106)
EXTENSION_SEEDS, OWN_SEEDS = range(31, 36), range(41, 48)
STATIC = (0.03, 0.1, 0.3, 1.0)
RATES = (2.4e-4, 3.6e-4)
# arm or loss → the β0 to choose from; .1, .3 and 1 for all others
BASES: Mapping[str, Sequence[float]] = {"dpo": STATIC, "simpo": (1.0, 3.0, 10.0)}
CONTROLS = ("random_filter", "weight_matched")  # controls of β-DPO, with its settings
ARMS = (
    *("beta_dpo", "dynamic_beta", "filter_only", "instance_level", "constant_m0", "head_filter", "tail_filter"),
    *("adaptive_margin", "epsilon_dpo", "flip_weights", *CONTROLS),
)
# arms that take the settings of another arm, so that only the arm differs
SETTINGS_OF = {**dict.fromkeys((*CONTROLS, "explicit_reward"), "beta_dpo"), "reference_weights": "dpo"}
LARGER = 1.0  # second β0 of reference weights; the first is the best static β
FLIP_RATES = (0.0, 0.15, 0.3)
MIXTURES = ("high10", "high20", "high40")
MEASURES = {"reward": "at the end of training", "within": "within the KL budget"}


@dataclass(frozen=True)
class Comparison:
    """A weighted sum of cells, such as one arm less another, by seed; `end` and `within` are its results."""

    label: str
    weights: Mapping[Run, float]  # cell → weight; a cell is a run without its seed
    family: int = 1  # comparisons whose intervals hold together (Bonferroni)
    end: Difference | None = None
    within: Difference | None = None
    unpaired: int = 0  # seeds that all cells have, but not from one processor


@dataclass(frozen=True)
class Question:
    """A claim, where it comes from and what is compared, and its comparisons."""

    name: str  # file name of its figure
    title: str
    source: str
    seeds: Iterable[int]
    comparisons: Sequence[Comparison]
    margin: float | None = None  # that of the task unless given
    shown: Sequence[Run] = ()  # further cells that its figure draws


class Rows:
    """The rows of the table by cell, and the settings that development chose."""

    def __init__(self, table: pd.DataFrame, phase: str = "confirmation", task: str = "controlled") -> None:
        self.phase, self.task = phase, task
        self.table = with_within(table[table.task == task])
        self.by_run = dict(zip(runs_of(self.table), self.table.to_dict("records"), strict=True))

    def chosen(self, arm: str, loss: str = "sigmoid", beta0: float | None = None) -> tuple[float, float]:
        """Return β0 (unless given) and learning rate of an arm: those with the highest reward in development.

        Raises LookupError while a development run of the arm is missing, or if their processors differ.
        """
        wanted = list(grid(SETTINGS_OF.get(arm, arm), loss, beta0, self.task))
        missing = [run for run in wanted if run not in self.by_run]
        if missing:
            raise LookupError(f"{len(missing)} development runs of {arm} ({loss}) have no row yet")
        found = pd.DataFrame([self.by_run[run] for run in wanted])
        if found.processor.nunique() > 1:
            raise LookupError(f"the development runs of {arm} ({loss}) are from different processors")
        best = found.groupby(["beta0", "learning_rate"]).reward.mean().idxmax()
        return float(best[0]), float(best[1])

    def named(
        self,
        arm: str,
        data: str = "mixed",
        flips: float = 0.15,
        loss: str = "sigmoid",
        beta0: float | None = None,
        alpha: float = 0.6,
        keep: float = 0.8,
    ) -> Run:
        """Return the cell of an arm with its chosen settings. Raises LookupError while they cannot be chosen."""
        settings = self.chosen(arm, loss, beta0)
        return Run(self.task, self.phase, -1, data, flips, loss, arm, *settings, alpha, keep)

    def cell(self, arm: str, *where: object, **settings: object) -> pd.DataFrame:
        """Return the rows of a cell, as `named`, indexed by seed."""
        return self.of(self.named(arm, *where, **settings)).droplevel("processor")  # type: ignore[arg-type]

    def of(self, cell: Run) -> pd.DataFrame:
        """Return the rows of a cell, indexed by seed and processor. Raises LookupError when there is none."""
        rows = [row for run, row in self.by_run.items() if replace(run, seed=-1) == cell]
        if not rows:
            raise LookupError(f"no rows of {cell}")
        return pd.DataFrame(rows).set_index(["seed", "processor"]).sort_index()

    def result(self, comparison: Comparison, margin: float | None = None) -> Comparison:
        """Return the comparison with its results, paired by seed; rows of different processors are not paired."""
        cells = {cell: self.of(cell) for cell in comparison.weights}
        shared = set.intersection(*(set(rows.index.get_level_values("seed")) for rows in cells.values()))
        bound, found = TASKS[self.task].margin if margin is None else margin, {}
        for measure in MEASURES:
            parts = [weight * cells[cell][measure] for cell, weight in comparison.weights.items()]
            values = pd.concat(parts, axis=1, join="inner").sum(axis=1).drop("unknown", level=1, errors="ignore")
            found[measure] = Difference.of(values.to_numpy(float), bound, comparison.family)
        unpaired = len(shared) - len(values)
        return replace(comparison, end=found["reward"], within=found["within"], unpaired=unpaired)


def grid(arm: str, loss: str = "sigmoid", beta0: float | None = None, task: str = "controlled") -> Iterator[Run]:
    """Yield the development runs that choose the settings of an arm: on mixed data, a flip rate of .15."""
    bases = BASES.get(arm if loss == "sigmoid" else loss, (0.1, 0.3, 1.0))
    for seed in DEVELOPMENT_SEEDS:
        for base in bases if beta0 is None else (beta0,):
            for rate in RATES if loss == "sigmoid" else RATES[:1]:
                yield Run(task, "development", seed, "mixed", 0.15, loss, arm, base, rate)


def less(label: str, ours: Run, theirs: Run, family: int = 1) -> Comparison:
    return Comparison(label, {ours: 1.0, theirs: -1.0}, family)


def confirmation(rows: Rows) -> list[Question]:
    """Return the questions of the confirmation phase, in the order of the document."""
    named, best = rows.named, rows.chosen("dpo")[0]
    static, ours = named("dpo"), named("beta_dpo")

    def gain(high: str, low: str) -> Comparison:
        signs = ((high, 1.0, 1.0), (high, 0.1, -1.0), (low, 1.0, -1.0), (low, 0.1, 1.0))
        return Comparison(f"{high} − {low}", {named("dpo", data, beta0=beta): sign for data, beta, sign in signs})

    others = ((0.2, 0.8), (2.0, 0.8), (0.6, 0.5))
    return [
        Question(
            "gap",
            "The best β grows with the gap of the data",
            "The paper's Figure 1: low-gap data wants a small β, high-gap data a large one. Compared is what β = 1 "
            "gains over β = .1 on one kind of data with what it gains on another.",
            SIDE_SEEDS,
            [gain("high", "low"), gain("high", "mixed"), gain("mixed", "low")],
            shown=[named("dpo", x, beta0=beta) for x in ("low", "mixed", "high") for beta in STATIC],
        ),
        Question(
            "arms",
            "β-DPO beats tuned DPO; so does another arm",
            f"The paper's main result. Each arm with its tuned settings, less the best static β ({best:g}); "
            f"intervals are 95 % for all {len(ARMS)} together (Bonferroni).",
            MAIN_SEEDS,
            [less(arm, named(arm), static, len(ARMS)) for arm in ARMS],
        ),
        Question(
            "instance",
            "One β per batch is better than one per pair",
            "The paper finds instance-level β unstable, batch-level β better on mixed gaps.",
            MAIN_SEEDS,
            [less("beta_dpo − instance_level", ours, named("instance_level"))],
        ),
        Question(
            "filter",
            "The Gaussian filter helps, and not because it drops pairs",
            "The paper reports gains of filtering, without a random filter beside it.",
            MAIN_SEEDS,
            [
                less("filter_only − best static β", named("filter_only"), static),
                less("beta_dpo − random_filter", ours, named("random_filter")),
            ],
        ),
        Question(
            "weight",
            "It is β that helps, not the size of the step",
            "In the weight-matched control β stays β0 and the loss is multiplied by β/β0: what dynamic β does to "
            "the size of the gradient without what it does to the shape of the loss.",
            MAIN_SEEDS,
            [less("beta_dpo − weight_matched", ours, named("weight_matched"))],
        ),
        Question(
            "losses",
            "It carries over to IPO and SimPO",
            "The paper reports gains for both. SimPO has no reference; its KL is to the SFT model all the same.",
            SIDE_SEEDS,
            [less(x.upper(), named("beta_dpo", loss=x), named("dpo", loss=x)) for x in ("ipo", "simpo")],
        ),
        Question(
            "robust",
            "β-DPO is robust to α and ρ",
            "The paper sweeps α from .2 to 2 and filters from 0 to 40 %. Each less the default (α = .6, ρ = .8); "
            "here the margin is the .2 of the plan.",
            SIDE_SEEDS,
            [
                less(f"α = {alpha:g}, ρ = {keep:g}", named("beta_dpo", alpha=alpha, keep=keep), ours, len(others))
                for alpha, keep in others
            ],
            margin=0.2,
        ),
        Question(
            "flips",
            "β-DPO against flipped labels",
            f"The paper speaks of outliers; here labels are flipped. β-DPO less the best static β ({best:g}) at "
            "three rates.",
            SIDE_SEEDS,
            [less(f"flip rate {x:g}", named("beta_dpo", flips=x), named("dpo", flips=x)) for x in FLIP_RATES],
        ),
        Question(
            "own",
            "Flip weights, an arm of our own",
            "Not in the paper, and no longer in the package: pairs counted less by the probability, from the "
            "policy's own gap, M0 and σ, that their label is flipped. It was to beat the best static β and β-DPO "
            "on mixed data with flips.",
            SIDE_SEEDS,
            by_flip_rate(rows, "flip_weights"),
        ),
    ]


def by_flip_rate(rows: Rows, arm: str, *bases: float) -> list[Comparison]:
    """Compare an arm on mixed data with the best static β and with β-DPO at every flip rate.

    With `bases`, the arm is compared at each of these β0, and the intervals hold for all of them together.
    """
    return [
        less(
            f"flip rate {flips:g}{f', β0 = {base:g}' if base else ''}: − {told}",
            rows.named(arm, flips=flips, beta0=base),
            rows.named(rival, flips=flips),
            max(len(bases), 1),
        )
        for base in bases or (None,)
        for flips in FLIP_RATES
        for told, rival in (("best static β", "dpo"), ("beta_dpo", "beta_dpo"))
    ]


def extension(rows: Rows) -> list[Question]:
    """Return the questions of the extension phase, in the order of the document."""
    named, best = rows.named, rows.chosen("dpo")[0]
    rivals = (("best static β", "dpo"), ("instance_level", "instance_level"))
    each, comparisons = 1 / len(MIXTURES), []
    for told, rival in rivals:
        ours, theirs = ([named(arm, data) for data in MIXTURES] for arm in ("beta_dpo", rival))
        pooled = dict.fromkeys(ours, each) | dict.fromkeys(theirs, -each)
        comparisons.append(Comparison(f"all shares: β-DPO − {told}", pooled))
        for data, our, their in zip(MIXTURES, ours, theirs, strict=True):
            label = f"{GAPS[data][1]:.0%} high: β-DPO − {told}"
            comparisons.append(less(label, our, their, len(MIXTURES)))
    return [
        Question(
            "mixtures",
            "On mixtures of gaps, β-DPO beats DPO and instance-level β",
            f"The paper mixes 10 to 40 % high-gap pairs into low-gap ones. β-DPO less the best static β ({best:g}) "
            "and less instance-level β: the mean over the three shares at 95 %, each share at 95 % for the three "
            "together.",
            EXTENSION_SEEDS,
            comparisons,
        ),
        Question(
            "crossing",
            "β-DPO against flipped labels, by gap",
            "The same as above where all pairs have low or all have high gaps: β-DPO less the best static β "
            f"({best:g}). Intervals are 95 % for both cells together (Bonferroni).",
            EXTENSION_SEEDS,
            [
                less(f"{x}, flip rate 0.3", named("beta_dpo", x, 0.3), named("dpo", x, 0.3), 2)
                for x in ("low", "high")
            ],
        ),
        Question(
            "explicit",
            "It works with explicit rewards",
            "The paper takes the gap of a reward model for M. Here M is that of the true rewards, the best reward "
            "model that there can be: of a flipped pair it is negative. β0 and the rate are those of β-DPO.",
            EXTENSION_SEEDS,
            [
                less(f"explicit − {told}", named("explicit_reward"), named(rival))
                for told, rival in (("implicit", "beta_dpo"), ("best static β", "dpo"))
            ],
        ),
        Question(
            "reference",
            "Reference weights, a second arm of our own",
            "Not in the paper ([reference weights](method.md#reference-weights)): pairs count less by "
            "the probability, estimated from the reference's margins, that their label is flipped. At β and rate "
            f"of the best static β, and at β0 = {LARGER:g}; intervals are 95 % for both together (Bonferroni).",
            OWN_SEEDS,
            by_flip_rate(rows, "reference_weights", best, LARGER),
        ),
    ]


def pilot() -> Iterator[Run]:
    """Yield runs that show reward against KL on reviews, on one seed: static β, β-DPO and its control."""
    for arm, beta0 in (("dpo", 0.1), ("dpo", 0.3), ("dpo", 1.0), ("beta_dpo", 0.3), ("random_filter", 0.3)):
        yield Run("sentiment", "pilot", 1, "mixed", 0.0, "sigmoid", arm, beta0, 2e-4)


def quickstarts() -> Iterator[Run]:
    """Yield the quickstart's arms on seeds that played no part in its settings, on one with other rounding, too."""
    model = Quickstart.settings["model"]["init_args"]
    settings = (model["beta0"], model["optimizer"]["init_args"]["lr"])
    for arm in ("beta_dpo", "dpo"):
        for seed in QUICKSTART_SEEDS:
            yield Run("quickstart", "seeds", seed, "high", 0.15, "sigmoid", arm, *settings)
        # other micro-batches add up the same gradients in another order
        words = "--data.micro_batch_tokens 1024"
        yield Run(
            "quickstart", "seeds", QUICKSTART_SEEDS[0], "high", 0.15, "sigmoid", arm, *settings, options=words
        )


def planned(table: pd.DataFrame) -> Iterator[Run]:
    """Yield every run that the questions need: development first, and all others once it has chosen settings."""
    tuned = {SETTINGS_OF.get(arm, arm): None for arm in ("dpo", *ARMS)}
    development = [*(run for arm in tuned for run in grid(arm))]
    development += [run for loss in ("ipo", "simpo") for arm in ("dpo", "beta_dpo") for run in grid(arm, loss)]
    yield from development
    if set(development) <= set(runs_of(table)):
        for phase, questions in (("confirmation", confirmation), ("extension", extension)):
            for question in questions(Rows(table, phase)):
                cells = [cell for comparison in question.comparisons for cell in comparison.weights]
                yield from (
                    replace(cell, seed=seed) for seed in question.seeds for cell in [*cells, *question.shown]
                )
    yield from quickstarts()
    for seed in (1, 2):
        for arm in ("dpo", "beta_dpo"):
            yield Run("smollm2", "illustration", seed, "hh", 0.0, "sigmoid", arm, 0.1, 5e-6)
