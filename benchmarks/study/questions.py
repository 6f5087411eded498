"""The plan of the study as code: its questions, the settings by its rule, and its runs in their order.

docs/study/plan.md says the same in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.study.runs import runs_of, with_measures
from benchmarks.study.tasks import JUDGED, PAIR_FILES, TASKS, TUNING, TUNING_SEEDS, Quickstart, Run
from benchmarks.study.verdicts import Difference
from benchmarks.tables import processor

SEEDS = tuple(range(101, 131))
QUICKSTART_SEEDS = range(101, 111)
MAIN, FILTER, SIDE, REVIEWS = SEEDS, SEEDS[:16], SEEDS[:12], SEEDS[:8]
# β0 to choose from by task, loss or arm, and two rates by task: a factor of about three, and of two
BASES = {
    "controlled": (0.1, 0.3, 1.0),
    "sentiment": (0.03, 0.1, 0.3),
    "ipo": (0.03, 0.1, 0.3),
    **dict.fromkeys(("simpo", "simpo_no_margin"), (0.3, 1.0, 3.0)),
    "alpha_dpo": (0.8, 2.5, 7.5),
}
RATES = {"controlled": (1.8e-4, 3.6e-4), "sentiment": (1e-4, 2e-4)}
FLIP_RATES = (0.0, 0.15, 0.3)
MEASURES = {"reward": "at the end", "within": "within the KL budget", "per_root": "gain per √KL"}


class Cell(NamedTuple):
    """A setting that runs on several seeds. Tuning chooses its β0 and rate: for the arm `like`, or for its own."""

    arm: str
    flips: float = 0.15
    data: str = "mixed"
    loss: str = "sigmoid"
    task: str = "controlled"
    like: str = ""
    beta0: float | None = None  # fixed: only the rate is that of tuning
    alpha: float = 0.6
    keep: float = 0.8
    options: str = ""

    @property
    def tuned(self) -> Cell:
        """Return the cell that is tuned for this one."""
        return Cell(self.like or self.arm, self.flips, self.data, self.loss, self.task)

    def controlled_by(self, name: str) -> Cell:
        return self._replace(options=f"--control Control --control.by {name}")


@dataclass(frozen=True)
class Comparison:
    """A weighted sum of cells, such as one arm less another, by seed; the last three are its results."""

    label: str
    weights: Mapping[Cell, float]
    family: int = 1  # comparisons whose intervals hold together (Bonferroni)
    found: Mapping[str, Difference] | None = None  # by measure
    collapsed: tuple[int, ...] = ()  # of the runs of each cell that are compared

    @property
    def task(self) -> str:
        return next(iter(self.weights)).task

    def of(self, measure: str) -> Difference:
        assert self.found is not None
        return self.found[measure]


@dataclass(frozen=True)
class Question:
    """A claim, where it comes from and what is compared."""

    name: str  # file name of its figure
    title: str
    source: str
    comparisons: Sequence[Comparison]
    seeds: Sequence[int]


class Untuned(LookupError):
    """Settings cannot be chosen before some `runs` have rows."""

    def __init__(self, runs: Sequence[Run]):
        super().__init__(f"{len(runs)} tuning runs of {runs[0].arm} ({runs[0].loss}) have no row yet")
        self.runs = runs


class Rows:
    """The rows of the table by run and processor, and what the plan reads from them.

    Rounding takes a run elsewhere on another processor, so only rows of one processor are compared within a seed.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        table = with_measures(table)
        self.by_run: dict[Run, dict[str, dict[Any, Any]]] = {}
        for run, row in zip(runs_of(table), table.to_dict("records"), strict=True):
            self.by_run.setdefault(run, {})[row["processor"]] = row

    def together(self, runs: Iterable[Run]) -> list[str]:
        """Return the known processors that have a row of every run."""
        made = [self.by_run.get(run, {}).keys() for run in runs]
        return sorted(set.intersection(*map(set, made)) - {"unknown"}) if made else []

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs to do here, so that all `runs` have rows of one processor."""
        here = processor()
        return [] if self.together(runs) else [run for run in runs if here not in self.by_run.get(run, {})]

    def settings(self, cell: Cell) -> tuple[float, float]:
        """Return β0 and rate by the plan's rule, in two rounds: all six on one seed, the best two on four more.

        The best has the highest mean reward at the end. Raises Untuned while runs of a round are missing.
        """
        bases = BASES.get(cell.arm, BASES.get(cell.loss, BASES[cell.task]))
        tried = [(base, rate) for base in bases for rate in RATES[cell.task]]
        for seeds, left in ((TUNING_SEEDS[:1], 2), (TUNING_SEEDS, 1)):
            place = (cell.data, cell.flips, cell.loss, cell.arm)
            by_seed = [[Run(cell.task, TUNING, seed, *place, *at) for at in tried] for seed in seeds]
            if missing := [run for runs in by_seed for run in self.missing(runs)]:
                raise Untuned(missing)
            reward = dict.fromkeys(tried, 0.0)
            for runs in by_seed:
                where = self.together(runs)[0]
                for at, run in zip(tried, runs, strict=True):
                    reward[at] += self.by_run[run][where]["reward"]
            tried = sorted(tried, key=reward.__getitem__, reverse=True)[:left]
        return tried[0]

    def run(self, cell: Cell) -> Run:
        """Return the run of a cell without its seed (−1). Raises Untuned while its settings cannot be chosen."""
        base, rate = self.settings(cell.tuned)
        place = (cell.task, JUDGED, -1, cell.data, cell.flips, cell.loss, cell.arm)
        return Run(*place, cell.beta0 or base, rate, cell.alpha, cell.keep, cell.options)

    def of(self, cell: Cell) -> pd.DataFrame:
        """Return the rows of a cell, indexed by seed and processor. Raises LookupError when there is none."""
        wanted = self.run(cell)
        rows = [
            row for run, made in self.by_run.items() if replace(run, seed=-1) == wanted for row in made.values()
        ]
        if not rows:
            raise LookupError(f"no rows of {wanted}")
        return pd.DataFrame(rows).set_index(["seed", "processor"]).sort_index()

    def result(self, comparison: Comparison) -> Comparison:
        """Return the comparison with its results, paired by seed; rows of different processors are not paired.

        Raises LookupError while it has fewer than two pairs.
        """
        cells = {cell: self.of(cell) for cell in comparison.weights}
        pairs = reduce(pd.Index.intersection, [rows.index for rows in cells.values()])
        pairs = pairs[pairs.get_level_values("processor") != "unknown"]
        pairs = pairs[~pairs.get_level_values("seed").duplicated()]  # a seed counts once, on whichever processor
        if len(pairs) < 2:
            raise LookupError(f"fewer than two pairs of rows: {comparison.label}")
        cells = {cell: rows.loc[pairs] for cell, rows in cells.items()}
        found = {}
        for measure in MEASURES:
            values = sum(
                weight * cells[cell][measure].to_numpy(float) for cell, weight in comparison.weights.items()
            )
            found[measure] = Difference.of(values, TASKS[comparison.task].margin, comparison.family)
        return replace(
            comparison, found=found, collapsed=tuple(int(rows.collapsed.sum()) for rows in cells.values())
        )


# --- the plan ------------------------------------------------------------------------------------------------


def less(label: str, ours: Cell, theirs: Cell, family: int = 1) -> Comparison:
    return Comparison(label, {ours: 1.0, theirs: -1.0}, family)


def plan() -> list[Question]:
    """Return the questions of the plan, the most important first; their runs are made in this order."""
    static, ours, gaussian, instance = (Cell(arm) for arm in ("dpo", "beta_dpo", "filter_only", "instance_level"))
    random = Cell("random_filter", like="filter_only")
    at = {f"flip rate {flips:g}": flips for flips in FLIP_RATES}
    ends = (0.0, 0.3)

    def by_gap(data: str, sign: float) -> dict[Cell, float]:
        cell = static._replace(data=data)
        return {cell._replace(beta0=1.0): sign, cell._replace(beta0=0.1): -sign}

    def batch(size: int, arm: str) -> Cell:  # always 64 steps
        return Cell(arm, options=f"--data.batch_size {size} --data.pairs {64 * size}")

    def shared(pairs: int) -> Cell:
        return ours._replace(options=f"--schedule benchmarks.study.shared_beta.SharedBeta --schedule.pairs {pairs}")

    # name → arm and its control
    methods = {
        "RE-PO": (Cell("re_po"), "shuffled_confidence"),
        "Dr. DPO": (Cell("dr_dpo"), "shuffled_weights"),
        "KLDPO": (Cell("kldpo"), "shuffled_weights"),
        "reference weights": (Cell("reference_weights"), "shuffled_weights"),
        "ε-DPO": (Cell("epsilon_dpo"), "shuffled_beta"),
    }
    margins = {name: Cell(arm, loss="simpo_no_margin") for name, arm in (("γ-PO", "gamma_po"), ("AMaPO", "amapo"))}
    simpo = Cell("dpo", loss="simpo")
    questions = [
        Question(
            "whole",
            "(d) Is β-DPO as a whole better than static β?",
            "The paper's main result: batch-level β and the Gaussian filter together, by flip rate.",
            [
                less(f"β-DPO − static β, {told}", ours._replace(flips=f), static._replace(flips=f))
                for told, f in at.items()
            ],
            MAIN,
        ),
        Question(
            "filters",
            "(c) Does the Gaussian filter help, and more than dropping pairs at random?",
            "At a fixed β0, by flip rate. The random filter drops as many, at the settings of the Gaussian one.",
            [
                less(f"Gaussian − {name}, {told}", gaussian._replace(flips=f), other._replace(flips=f))
                for told, f in at.items()
                for name, other in (("none", static), ("random", random))
            ],
            FILTER,
        ),
        Question(
            "both-tasks",
            "(i) Does anything beat tuned static β on both tasks?",
            "Film reviews; on the controlled task see (c), (d) and (g). A method beats static β on both if it is "
            "better at the end at the same flip rate.",
            [
                less(
                    f"{name} − static β, flip rate {x:g}",
                    Cell(arm, x, task="sentiment"),
                    Cell("dpo", x, task="sentiment"),
                )
                for x in ends
                for arm, name in (("beta_dpo", "β-DPO"), ("re_po", "RE-PO"))
            ],
            REVIEWS,
        ),
        Question(
            "levels",
            "(b) Is one β per batch better than static β, than one per pair, and than its controls?",
            "Batch-level β without the filter; then, with it, against a β per pair, and against the control in "
            "which only the size of the step follows β. A β per pair against the same shuffled among pairs.",
            [
                less("batch-level β alone − static β", Cell("dynamic_beta"), static),
                less("batch level − instance level", ours, instance),
                less("batch level − weight-matched", ours, Cell("weight_matched", like="beta_dpo")),
                less("instance level − shuffled", instance, instance.controlled_by("shuffled_beta")),
            ],
            FILTER,
        ),
        Question(
            "gaps",
            "(h) Does β-DPO help more where gaps are low, mixed or high?",
            "The paper's Figure 1 and its mixtures; static β is tuned on each.",
            [
                less(f"β-DPO − static β, {x} gaps", ours._replace(data=x), static._replace(data=x))
                for x in ("low", "high")
            ],
            SIDE,
        ),
        Question(
            "best-beta",
            "(a) Does the best β grow with the gap?",
            "(Reward at β = 1 − reward at β = .1) on the first kind of gaps, minus the same on the second.",
            [
                Comparison(f"{high} − {low}", by_gap(high, 1.0) | by_gap(low, -1.0))
                for high, low in (("high", "low"), ("high", "mixed"), ("mixed", "low"))
            ],
            SIDE,
        ),
        Question(
            "under-losses",
            "(e) Does it carry over to IPO and SimPO?",
            "β-DPO less static β, both tuned under the loss. SimPO has no reference; its KL is to the SFT model.",
            [
                less(f"β-DPO − static β under {told}", Cell("beta_dpo", loss=x), Cell("dpo", loss=x))
                for x, told in (("ipo", "IPO"), ("simpo", "SimPO"))
            ],
            SIDE,
        ),
        Question(
            "robustness",
            "(f) Is it robust to α, ρ, batch size and to how many pairs share a β?",
            "β-DPO at other settings less the default (α = .6, ρ = .8, β of 64 pairs); at other batch sizes less "
            "static β. Micro-batches that choose their own β share it among 2 or 8 pairs; here filter, M0 and σ "
            "remain those of the batch.",
            [
                *(less(f"α = {x:g}", ours._replace(alpha=x), ours) for x in (0.2, 2.0)),
                less("ρ = 0.5", ours._replace(keep=0.5), ours),
                *(less(f"β shared by {n} pairs", shared(n), ours) for n in (2, 8)),
                *(
                    less(f"β-DPO − static β, batches of {n}", batch(n, "beta_dpo"), batch(n, "dpo"))
                    for n in (32, 128)
                ),
            ],
            SIDE,
        ),
        Question(
            "methods",
            "(g) Do later methods beat static β, and their own controls?",
            "Each tuned as static β is. The control is the same arm with its weights, confidence, β or margin "
            "shuffled among pairs. γ-PO, AMaPO and α-DPO are compared with SimPO, whose margins they change.",
            [
                less(f"{name} − {told}, flip rate {x:g}", arm._replace(flips=x), other._replace(flips=x))
                for x in ends
                for name, (arm, control) in methods.items()
                for told, other in (("static β", static), ("its control", arm.controlled_by(control)))
                if x or other is static  # controls only where there is something to find
            ]
            + [
                less(f"{name} − {told}", arm, other)
                for name, arm in margins.items()
                for told, other in (("SimPO", simpo), ("its control", arm.controlled_by("shuffled_margin")))
            ]
            + [less("α-DPO − SimPO", Cell("alpha_dpo", loss="alpha_dpo"), simpo)],
            REVIEWS,
        ),
    ]
    return [
        replace(each, comparisons=[replace(one, family=len(questions)) for one in each.comparisons])
        for each in questions
    ]


def pilot() -> Iterator[Run]:
    """Yield runs that show reward against KL on reviews, on one seed: static β, β-DPO and its control."""
    for arm, beta0 in (("dpo", 0.1), ("dpo", 0.3), ("dpo", 1.0), ("beta_dpo", 0.3), ("random_filter", 0.3)):
        yield Run("sentiment", "pilot", 1, "mixed", 0.0, "sigmoid", arm, beta0, 2e-4)


def real() -> Iterator[Run]:
    """Yield the runs on pairs of people, with settings that are not tuned."""
    for seed in SEEDS[:3]:
        for data in PAIR_FILES:
            for flips in (0.0, 0.2):
                for arm in ("beta_dpo", "dpo"):
                    yield Run("real", JUDGED, seed, data, flips, "sigmoid", arm, 0.1, 2e-5)


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


def missing(question: Question, rows: Rows) -> list[Run]:
    """Return the runs of a question without a row: those of tuning, then those of tuned cells, seed by seed."""
    cells = list(dict.fromkeys(cell for one in question.comparisons for cell in one.weights))
    runs: list[Run] = []
    left: list[Run] = []
    for cell in cells:
        try:
            runs.append(rows.run(cell))
        except Untuned as error:
            left += error.runs
    for seed in question.seeds:
        left += rows.missing([replace(run, seed=seed) for run in runs])
    return list(dict.fromkeys(left))


def sizes() -> Iterator[tuple[Question, int, int]]:
    """Yield each question with the number of runs that tune and that judge it, those of earlier ones left out."""
    tuned: set[Cell] = set()
    done: set[tuple[Cell, int]] = set()
    for question in plan():
        cells = {cell for one in question.comparisons for cell in one.weights}
        fresh = {cell.tuned for cell in cells} - tuned
        runs = {(cell, seed) for cell in cells for seed in question.seeds} - done
        tuned, done = tuned | fresh, done | runs
        first = 2 * len(BASES["controlled"])
        yield question, len(fresh) * (first + 2 * (len(TUNING_SEEDS) - 1)), len(runs)
