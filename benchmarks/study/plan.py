"""The plan of the study, plan.yaml: tasks, questions, and runs with their commands as a reader gives them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.tables import ROOT

PLAN = yaml.safe_load(Path(__file__).with_name("plan.yaml").read_text(encoding="utf-8"))
FOLDER = Path("runs/study")
TUNING, JUDGED = "tuning", "judged"  # the phases of the plan in the table
SEEDS = tuple(range(101, 131))
TUNING_SEEDS = tuple(PLAN["tuning_seeds"])
PEOPLE = "(j) On pairs of people, does the filter drop flipped pairs, does the audit find them?"


@dataclass(frozen=True)
class Task:
    """A task: the commands of its runs, how their samples are scored, and what counts as equal and as collapsed."""

    name: str
    steps: Sequence[int]  # checkpoints that are sampled; the last is the end of training
    config: str
    train: Sequence[str]  # commands that train a run from the SFT model
    prepare: Sequence[str] = ()  # commands for what the runs of a seed share: the SFT model and its samples
    once: Sequence[str] = ()  # commands for what all seeds share
    needs: Sequence[str] = ()  # files and folders
    sampling: str = ""  # words of `generate`
    reward: str = ""  # as of `judge`; the true reward by default
    reward_args: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # words of the commands by a run's data
    margin: float = 0.1  # smaller differences of the mean reward count as equal
    budget: float = 1.0  # nats of KL to the SFT model
    collapsed: float = 0.25  # a run with a larger share of malformed responses has collapsed
    bases: Sequence[float] = ()  # β0 to choose from, a factor of about three; and rates, a factor of two
    rates: Sequence[float] = ()
    # of one core of an Intel Xeon without other work: what a seed shares, a run that tunes, a run that is judged
    minutes: Sequence[float] = (0, 0, 0)
    one_model_tunes: bool = False  # whether the tuning seeds share an SFT model

    @property
    def shared(self) -> Path:
        """Return the folder of what all seeds share."""
        return FOLDER / self.name / "data"


TASKS = {name: Task(name, **fields) for name, fields in PLAN["tasks"].items()}


@dataclass(frozen=True, order=True)
class Run:
    """A cell of the design at one seed: the columns of the table that identify a row."""

    task: str  # a key of TASKS
    phase: str
    seed: int
    data: str
    flip_rate: float
    loss: str  # a key of PLAN["losses"]
    arm: str  # a file of configs/method, or a key of PLAN["arms"]
    beta0: float
    learning_rate: float
    alpha: float = 0.6  # alpha and keep_ratio vary only for β-DPO
    keep_ratio: float = 0.8
    options: str = ""  # further words of `beta-dpo fit`

    def __str__(self) -> str:
        return " ".join(f"{each:g}" if isinstance(each, float) else f"{each}" for each in astuple(self)).rstrip()

    @property
    def folder(self) -> Path:
        """Return the log folder."""
        return FOLDER / self.task / f"seed-{self.seed}" / str(self).replace(" ", ",").replace("/", "_")

    @property
    def sft_seed(self) -> int:
        return TUNING_SEEDS[0] if TASKS[self.task].one_model_tunes and self.seed in TUNING_SEEDS else self.seed

    @property
    def sft(self) -> Path:
        """Return the folder of the SFT model and of its samples."""
        return FOLDER / self.task / f"seed-{self.sft_seed}" / "sft"

    @property
    def sampled(self) -> Sequence[int]:
        """Return the checkpoints that are sampled: to choose settings the last is enough."""
        steps = TASKS[self.task].steps
        return steps[-1:] if self.phase == TUNING else steps

    @property
    def words(self) -> dict[str, Any]:
        """Return what the names in the commands of plan.yaml stand for."""
        task = TASKS[self.task]
        words = {"run": self, "task": task, **task.data.get(self.data, {}), "loss": PLAN["losses"][self.loss]}
        words["method"] = PLAN["arms"].get(self.arm, f"{self.arm}.yaml").format(run=self)
        # ε-DPO compares distributions, which a cache does not hold
        words["kept"] = "frozen" if self.arm == "epsilon_dpo" else "cached"
        return words | {name: text.format(**words).strip() for name, text in PLAN["words"].items()}

    def preparing(self) -> list[str]:
        """Return the commands for what the runs of the seed share."""
        task = TASKS[self.task]
        return [command.format(**self.words) for command in (*task.once, *task.prepare)]

    def commands(self) -> list[str]:
        """Return all commands from the SFT model to the samples."""
        task = TASKS[self.task]
        made = [command.format(**self.words) for command in task.train]
        for step in self.sampled:
            count = 1024 if step == task.steps[-1] else 512
            made += [command.format(**self.words, step=step, count=count) for command in PLAN["sample"]]
        return made


def tuning(run: Run) -> list[Run]:
    """Return the runs that choose β0 and rate of a run: all six settings, without a seed."""
    task, arm = TASKS[run.task], PLAN["tuned_as"].get(run.arm, run.arm)
    place = (run.task, TUNING, run.seed, run.data, run.flip_rate, run.loss, arm)
    return [Run(*place, base, rate) for base in PLAN["bases"].get(run.loss, task.bases) for rate in task.rates]


class Question(NamedTuple):
    """A claim and what is compared: by label two runs, or two differences of two; seeds and settings come later."""

    name: str  # file name of its figure
    title: str
    source: str
    seeds: Sequence[int]
    comparisons: Mapping[str, Sequence[Run]]

    @property
    def runs(self) -> list[Run]:
        return list(dict.fromkeys(itertools.chain(*self.comparisons.values())))

    @property
    def judged(self) -> list[Run]:
        """Return the runs of all seeds, without the settings that tuning chooses."""
        return [replace(run, seed=seed) for run in self.runs for seed in self.seeds]


def judged(arm: str, shuffled: str = "", **settings: Any) -> Run:
    """Return a run that is judged, without seed, β0 and rate; `shuffled` names what a control shuffles."""
    usual = Run("controlled", JUDGED, -1, "mixed", 0.15, "sigmoid", arm, 0.0, 0.0)
    options = f"--control Control --control.by shuffled_{shuffled}" if shuffled else ""
    return replace(usual, **{"options": options, **settings})


def question(name: str, title: str, source: str, seeds: int, blocks: Sequence[Mapping[str, Any]]) -> Question:
    """Return a question of plan.yaml, whose runs are an arm or a mapping."""
    comparisons = {
        f"{label}{condition}": [judged(**({"arm": run} if isinstance(run, str) else run) | changes) for run in runs]
        for block in blocks
        for condition, changes in block.get("under", {"": {}}).items()
        for label, runs in block["compare"].items()
    }
    return Question(name, title, source, SEEDS[:seeds], comparisons)


QUESTIONS = [question(**each) for each in PLAN["questions"]]  # they share the level of the verdicts

# reward against KL on reviews, on one seed: static β, β-DPO and its control
PILOT = [
    Run("sentiment", "pilot", 1, "mixed", 0.0, "sigmoid", arm, beta0, 2e-4)
    for arm, beta0 in (("dpo", 0.1), ("dpo", 0.3), ("dpo", 1.0), ("beta_dpo", 0.3), ("random_filter", 0.3))
]
ON_PEOPLE = [
    Run("real", JUDGED, seed, data, rate, "sigmoid", arm, 0.1, 2e-5)
    for seed, data, rate, arm in itertools.product(SEEDS[:3], TASKS["real"].data, (0.0, 0.2), ("beta_dpo", "dpo"))
]
_model = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
_tuned = (_model["beta0"], _model["optimizer"]["init_args"]["lr"])
# on seeds that played no part in the quickstart's settings, and on one with gradients added up in another order
QUICKSTARTS = [
    Run("quickstart", "seeds", seed, "high", 0.15, "sigmoid", arm, *_tuned, options=options)
    for arm in ("beta_dpo", "dpo")
    for seed, options in (*((seed, "") for seed in SEEDS[:10]), (SEEDS[0], "--data.micro_batch_tokens 1024"))
]
