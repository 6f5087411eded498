"""The plan of the study as code: its questions, the settings that tuning tries, and the runs without tuning.

docs/study/plan.md says the same in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.study.tasks import GAPS, JUDGED, PAIR_FILES, TUNING, TUNING_SEEDS, Quickstart, Run

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
TUNED_AS = {"random_filter": "filter_only", "weight_matched": "beta_dpo"}  # arms with the settings of another
QUESTIONS = 9  # (a) to (i), which share the level of the verdicts
PEOPLE = "(j) On pairs of people, does the filter drop flipped pairs, does the audit find them?"


class Question(NamedTuple):
    """A claim, where it comes from, and what is compared: by label two runs, or two differences of two runs.

    The runs have no seed yet, and no settings but those that tuning does not choose.
    """

    name: str  # file name of its figure
    title: str
    source: str
    seeds: Sequence[int]
    comparisons: Mapping[str, Sequence[Run]]

    @property
    def runs(self) -> list[Run]:
        return list(dict.fromkeys(itertools.chain(*self.comparisons.values())))


def plan() -> list[Question]:
    """Return the questions of the plan, the most important first; their runs are made in this order."""
    static, ours, gaussian, instance = map(judged, ("dpo", "beta_dpo", "filter_only", "instance_level"))
    simpo = judged("dpo", loss="simpo")
    main = {"β-DPO − static β": (ours, static)}
    methods: dict[str, Sequence[Run]] = {}
    for name, arm, what in (
        ("RE-PO", "re_po", "confidence"),
        ("Dr. DPO", "dr_dpo", "weights"),
        ("KLDPO", "kldpo", "weights"),
        ("reference weights", "reference_weights", "weights"),
        ("ε-DPO", "epsilon_dpo", "beta"),
    ):
        pair = shuffled(arm, what)
        methods |= {f"{name} − static β": (pair[0], static), f"{name} − its control": pair}
    margins: dict[str, Sequence[Run]] = {}
    for name, arm in (("γ-PO", "gamma_po"), ("AMaPO", "amapo")):
        pair = shuffled(arm, "margin", loss="simpo_no_margin")
        margins |= {f"{name} − SimPO": (pair[0], simpo), f"{name} − its control": pair}
    shared = "--schedule benchmarks.study.shared_beta.SharedBeta --schedule.pairs"
    bases = {gaps: [replace(static, data=gaps, beta0=base) for base in (1.0, 0.1)] for gaps in GAPS}
    return [
        Question(
            "whole",
            "(d) Is β-DPO as a whole better than static β?",
            "The paper's main result: batch-level β and the Gaussian filter together, by flip rate.",
            MAIN,
            crossed(main, flips(0, 0.15, 0.3)),
        ),
        Question(
            "filters",
            "(c) Does the Gaussian filter help, and more than dropping pairs at random?",
            "At a fixed β0, by flip rate. The random filter drops as many, at the settings of the Gaussian one.",
            FILTER,
            crossed(
                {"Gaussian − none": (gaussian, static), "Gaussian − random": (gaussian, judged("random_filter"))},
                flips(0, 0.15, 0.3),
            ),
        ),
        Question(
            "both-tasks",
            "(i) Does anything beat tuned static β on both tasks?",
            "Film reviews; on the controlled task see (c), (d) and (g). A method beats static β on both if it is "
            "better at the end at the same flip rate.",
            REVIEWS,
            crossed(main | {"RE-PO − static β": (judged("re_po"), static)}, flips(0, 0.3, task="sentiment")),
        ),
        Question(
            "levels",
            "(b) Is one β per batch better than static β, than one per pair, and than its controls?",
            "Batch-level β without the filter; then, with it, against a β per pair, and against the control in "
            "which only the size of the step follows β. A β per pair against the same shuffled among pairs.",
            FILTER,
            {
                "batch-level β alone − static β": (judged("dynamic_beta"), static),
                "batch level − instance level": (ours, instance),
                "batch level − weight-matched": (ours, judged("weight_matched")),
                "instance level − shuffled": shuffled("instance_level", "beta"),
            },
        ),
        Question(
            "gaps",
            "(h) Does β-DPO help more where gaps are low, mixed or high?",
            "The paper's Figure 1 and its mixtures; static β is tuned on each.",
            SIDE,
            crossed(main, {f", {gaps} gaps": {"data": gaps} for gaps in ("low", "high")}),
        ),
        Question(
            "best-beta",
            "(a) Does the best β grow with the gap?",
            "(Reward at β = 1 − reward at β = .1) on the first kind of gaps, minus the same on the second.",
            SIDE,
            {
                f"{first} − {second}": (*bases[first], *bases[second])
                for first, second in (("high", "low"), ("high", "mixed"), ("mixed", "low"))
            },
        ),
        Question(
            "under-losses",
            "(e) Does it carry over to IPO and SimPO?",
            "β-DPO less static β, both tuned under the loss. SimPO has no reference; its KL is to the SFT model.",
            SIDE,
            crossed(main, {f" under {name}": {"loss": name.lower()} for name in ("IPO", "SimPO")}),
        ),
        Question(
            "robustness",
            "(f) Is it robust to α, ρ, batch size and to how many pairs share a β?",
            "β-DPO at other settings less the default (α = .6, ρ = .8, β of 64 pairs); at other batch sizes less "
            "static β. Micro-batches that choose their own β share it among 2 or 8 pairs; here filter, M0 and σ "
            "remain those of the batch.",
            SIDE,
            {
                "α = 0.2": (replace(ours, alpha=0.2), ours),
                "α = 2": (replace(ours, alpha=2.0), ours),
                "ρ = 0.5": (replace(ours, keep_ratio=0.5), ours),
                "β shared by 2 pairs": (replace(ours, options=f"{shared} 2"), ours),
                "β shared by 8 pairs": (replace(ours, options=f"{shared} 8"), ours),
                **crossed(
                    main,  # always 64 steps
                    {
                        f", batches of {size}": {"options": f"--data.batch_size {size} --data.pairs {64 * size}"}
                        for size in (32, 128)
                    },
                ),
            },
        ),
        Question(
            "methods",
            "(g) Do later methods beat static β, and their own controls?",
            "Each tuned as static β is. The control is the same arm with its weights, confidence, β or margin "
            "shuffled among pairs. γ-PO, AMaPO and α-DPO are compared with SimPO, whose margins they change.",
            REVIEWS,
            {
                # controls only where there is something to find
                **crossed({label: runs for label, runs in methods.items() if static in runs}, flips(0)),
                **crossed(methods, flips(0.3)),
                **margins,
                "α-DPO − SimPO": (judged("alpha_dpo", loss="alpha_dpo"), simpo),
            },
        ),
    ]


def judged(arm: str, **settings: Any) -> Run:
    """Return a run that is judged, on mixed gaps with 15 % of flipped labels, without seed, β0 and rate."""
    usual = {"task": "controlled", "data": "mixed", "flip_rate": 0.15, "loss": "sigmoid"}
    open_ = {"seed": -1, "beta0": 0.0, "learning_rate": 0.0}
    return Run(**{**usual, **open_, "phase": JUDGED, "arm": arm, **settings})


def shuffled(arm: str, what: str, **settings: Any) -> tuple[Run, Run]:
    """Return a run and its control, which shuffles `what` among the pairs."""
    run = judged(arm, **settings)
    return run, replace(run, options=f"--control Control --control.by shuffled_{what}")


def flips(*rates: float, **settings: Any) -> dict[str, dict[str, Any]]:
    return {f", flip rate {rate:g}": {"flip_rate": rate, **settings} for rate in rates}


def crossed(
    comparisons: Mapping[str, Sequence[Run]], conditions: Mapping[str, Mapping[str, Any]]
) -> dict[str, Sequence[Run]]:
    """Return every comparison under every condition: the settings that it changes, by their name in the label."""
    return {
        f"{label}{name}": [replace(run, **changes) for run in runs]
        for name, changes in conditions.items()
        for label, runs in comparisons.items()
    }


def tuning(run: Run) -> list[Run]:
    """Return the runs that choose β0 and rate of a run: all six settings, without a seed."""
    arm = TUNED_AS.get(run.arm, run.arm)
    bases = BASES.get(arm, BASES.get(run.loss, BASES[run.task]))
    place = (run.task, TUNING, run.seed, run.data, run.flip_rate, run.loss, arm)
    return [Run(*place, base, rate) for base in bases for rate in RATES[run.task]]


def sizes() -> Iterator[tuple[Question, int, int]]:
    """Yield each question with the number of runs that tune and that judge it, those of earlier ones left out."""
    tuned: set[Run] = set()
    done: set[Run] = set()
    for question in plan():
        settings = {tuning(run)[0] for run in question.runs} - tuned
        runs = {replace(run, seed=seed) for run in question.runs for seed in question.seeds} - done
        tuned, done = tuned | settings, done | runs
        # six settings on the first seed, two on each of the others
        yield question, len(settings) * (6 + 2 * (len(TUNING_SEEDS) - 1)), len(runs)


# --- runs whose settings are not tuned -----------------------------------------------------------------------


def pilot() -> Iterator[Run]:
    """Yield runs that show reward against KL on reviews, on one seed: static β, β-DPO and its control."""
    for arm, beta0 in (("dpo", 0.1), ("dpo", 0.3), ("dpo", 1.0), ("beta_dpo", 0.3), ("random_filter", 0.3)):
        yield Run("sentiment", "pilot", 1, "mixed", 0.0, "sigmoid", arm, beta0, 2e-4)


def real() -> Iterator[Run]:
    """Yield the runs on pairs of people."""
    for seed, data, rate, arm in itertools.product(SEEDS[:3], PAIR_FILES, (0.0, 0.2), ("beta_dpo", "dpo")):
        yield Run("real", JUDGED, seed, data, rate, "sigmoid", arm, 0.1, 2e-5)


def quickstarts() -> Iterator[Run]:
    """Yield the quickstart's arms on seeds that played no part in its settings, on one with other rounding, too."""
    model = Quickstart.settings["model"]["init_args"]
    settings = (model["beta0"], model["optimizer"]["init_args"]["lr"])
    other_sums = (QUICKSTART_SEEDS[0], "--data.micro_batch_tokens 1024")  # gradients added up in another order
    for arm in ("beta_dpo", "dpo"):
        for seed, options in (*((seed, "") for seed in QUICKSTART_SEEDS), other_sums):
            yield Run("quickstart", "seeds", seed, "high", 0.15, "sigmoid", arm, *settings, options=options)
