"""The runs of the study, by phase; docs/study/plan.md gives the reasons."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from benchmarks.study.runs import StudyRun
from benchmarks.study.table import read_results

DEVELOPMENT_SEED = 3
MAIN_SEEDS = tuple(range(21, 28))
SIDE_SEEDS = MAIN_SEEDS[:5]
EXTENSION_SEEDS = tuple(range(31, 36))
OWN_SEEDS = tuple(range(41, 48))

STATIC = (0.03, 0.1, 0.3, 1.0)
BASES = (0.1, 0.3, 1.0)  # β0 of the arms that are not static
RATES = (2.4e-4, 3.6e-4)
TUNED = (
    *("beta_dpo", "dynamic_beta", "filter_only", "instance_level", "constant_m0", "head_filter", "tail_filter"),
    *("adaptive_margin", "epsilon_dpo", "flip_weights"),
)
CONTROLS = ("random_filter", "weight_matched")  # controls of β-DPO, with its settings
ARMS = (*TUNED, *CONTROLS)
# arms that take the settings of another arm, so that only the arm differs
SETTINGS_OF = dict.fromkeys((*CONTROLS, "explicit_reward"), "beta_dpo")
LARGER = 1.0  # second β0 of reference weights; the first is the best static β
FLIP_RATES = (0.0, 0.15, 0.3)
MIXTURES = ("high10", "high20", "high40")
OTHER_LOSSES = {"ipo": BASES, "simpo": (1.0, 3.0, 10.0)}  # loss → the β0 to choose from


def exploration() -> Iterator[StudyRun]:
    """Yield the exploratory runs outside the grid of `development`; they choose no setting."""
    yield StudyRun(DEVELOPMENT_SEED, "mixed", 0.15, "beta_dpo", 0.1, 6e-5)
    for rate in (6e-5, 1.2e-4):
        for beta in STATIC:
            yield StudyRun(DEVELOPMENT_SEED, "mixed", 0.15, "dpo", beta, rate)
    for arm in ("dpo", "flip_weights"):
        for beta in (0.3, 1.0):
            yield StudyRun(DEVELOPMENT_SEED, "mixed", 0.15, arm, beta, 4.8e-4)
        for rate in RATES:
            yield StudyRun(DEVELOPMENT_SEED, "mixed", 0.15, arm, 2.0, rate)
            for beta in (0.3, 1.0, 2.0):
                yield StudyRun(4, "mixed", 0.15, arm, beta, rate)
    for beta in BASES:
        for rate in RATES:
            yield StudyRun(DEVELOPMENT_SEED, "mixed", 0.15, "flip_weights_tail", beta, rate)
    # our second arm at the settings that the rule for all arms would choose, and the arms it was compared with
    for seed, flips in ((31, 0.0), (31, 0.15), (31, 0.3), (32, 0.0), (32, 0.15), (32, 0.3), (33, 0.0)):
        yield StudyRun(seed, "mixed", flips, "reference_weights", 0.1, 3.6e-4)
        if flips != 0.15:  # the runs at .15 belong to the extension
            yield StudyRun(seed, "mixed", flips, "dpo", 0.3, 3.6e-4)
            yield StudyRun(seed, "mixed", flips, "beta_dpo", 0.3, 2.4e-4)


def development() -> Iterator[StudyRun]:
    """Yield the runs that choose β0 and the learning rate of every arm."""
    for arm in ("dpo", *TUNED, "reference_weights"):
        for beta0 in STATIC if arm == "dpo" else BASES:
            for rate in RATES:
                yield StudyRun(DEVELOPMENT_SEED, "mixed", 0.15, arm, beta0, rate)
    for loss, bases in OTHER_LOSSES.items():
        for arm in ("dpo", "beta_dpo"):
            for beta0 in bases:
                yield StudyRun(DEVELOPMENT_SEED, "mixed", 0.15, arm, beta0, RATES[0], loss)


def chosen(arm: str, loss: str = "sigmoid", beta0: float | None = None) -> tuple[float, float]:
    """Return β0 (unless given) and learning rate of an arm: those of its development run with the highest reward.

    Raises LookupError while a development run of the arm is missing.
    """
    arm = SETTINGS_OF.get(arm, arm)
    table = read_results()
    rows = table[(table.phase == "development") & (table.arm == arm) & (table.loss == loss)]
    wanted = [
        run
        for run in development()
        if run.arm == arm and run.loss == loss and (beta0 is None or run.beta0 == beta0)
    ]
    rows = rows[rows.beta0.isin({run.beta0 for run in wanted})]
    if len(rows) < len(wanted):
        raise LookupError(f"{len(wanted) - len(rows)} development runs of {arm} ({loss}) have no row yet")
    best = rows.loc[rows.reward.idxmax()]
    return float(best.beta0), float(best.learning_rate)


def tuned(seed: int, arm: str, data: str = "mixed", flips: float = 0.15, loss: str = "sigmoid") -> StudyRun:
    """Return a run of an arm with its chosen settings. Raises LookupError while they cannot be chosen."""
    return StudyRun(seed, data, flips, arm, *chosen(arm, loss), loss)


def static(seed: int, beta: float, data: str = "mixed", flips: float = 0.15) -> StudyRun:
    """Return a run of plain DPO at a given β. Raises LookupError while its learning rate cannot be chosen."""
    return StudyRun(seed, data, flips, "dpo", beta, chosen("dpo", beta0=beta)[1])


def confirmation() -> Iterator[StudyRun]:
    """Yield the runs on which the verdicts of `claims.all_claims` rest."""
    for seed in MAIN_SEEDS:
        yield from (static(seed, beta) for beta in STATIC)
        yield from (tuned(seed, arm) for arm in ARMS)
    for seed in SIDE_SEEDS:
        for data in ("low", "high"):
            yield from (static(seed, beta, data) for beta in STATIC)
            yield from (tuned(seed, arm, data) for arm in ("beta_dpo", "flip_weights"))
        for flips in (0.0, 0.3):
            yield from (static(seed, beta, flips=flips) for beta in dict.fromkeys((chosen("dpo")[0], 1.0)))
            yield from (tuned(seed, arm, flips=flips) for arm in ("beta_dpo", "flip_weights"))
        for loss in OTHER_LOSSES:
            yield from (tuned(seed, arm, loss=loss) for arm in ("dpo", "beta_dpo"))
        beta0, rate = chosen("beta_dpo")
        for alpha, keep in ((0.2, 0.8), (2.0, 0.8), (0.6, 0.5)):
            yield StudyRun(seed, "mixed", 0.15, "beta_dpo", beta0, rate, alpha=alpha, keep_ratio=keep)


def extension() -> Iterator[StudyRun]:
    """Yield further runs on other seeds: mixtures, flips by gap, explicit rewards, reference weights."""
    best = chosen("dpo")[0]
    for seed, flips in itertools.product(OWN_SEEDS, FLIP_RATES):
        yield static(seed, best, flips=flips)
        yield tuned(seed, "beta_dpo", flips=flips)
        for beta in (best, LARGER):
            yield StudyRun(seed, "mixed", flips, "reference_weights", beta, chosen("dpo")[1])
    for seed in EXTENSION_SEEDS:
        for data in MIXTURES:
            yield static(seed, best, data)
            yield from (tuned(seed, arm, data) for arm in ("beta_dpo", "instance_level"))
        for data in ("low", "high"):
            yield static(seed, best, data, 0.3)
            yield tuned(seed, "beta_dpo", data, 0.3)
        yield static(seed, best)
        yield from (tuned(seed, arm) for arm in ("beta_dpo", "explicit_reward"))


PHASES: dict[str, Callable[[], Iterator[StudyRun]]] = {
    "exploration": exploration,
    "development": development,
    "confirmation": confirmation,
    "extension": extension,
}
