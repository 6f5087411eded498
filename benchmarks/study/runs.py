"""The runs of the study: settings, commands, and the table with one row per run (docs/study/results.csv)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from app.commands.judge import figures, summary, win_rate
from app.core.files import atomic_file
from app.core.locks import locked
from app.core.samples import read_samples
from app.judges.rewards import OwnReward
from app.main import main
from app.report.run import read_run
from benchmarks.study import sentiment
from benchmarks.study.verdicts import reward_within
from benchmarks.tables import ROOT, processor

RESULTS = ROOT / "docs" / "study" / "results.csv"
FOLDER = Path("runs/study")
TUNING, JUDGED = "tuning", "judged"  # the phases of the plan in the table
TUNING_SEEDS = tuple(range(51, 56))  # choose β0 and rate of every arm, and decide nothing
# data of the controlled task: name → (gap, share of high-gap pairs)
GAPS = {"low": ("adjacent", 0.0), "mixed": ("mixed", 0.5), "high": ("extreme", 1.0)}
GAPS |= {f"high{percent}": ("mixed", percent / 100) for percent in (10, 20, 40)}
# arms that are another file of configs/method with more options
OPTIONS: dict[str, tuple[str, ...]] = {
    "adaptive_margin": ("standardised_margin",),  # its name when the runs were made
    "head_filter": ("filter_only", "--filter.by", "head"),
    "tail_filter": ("filter_only", "--filter.by", "tail"),
    "constant_m0": ("beta_dpo", "--schedule.m0", "0.0"),
    "re_po": ("dpo", "--confidence", "AnnotatorReliability"),
    **{by: ("dpo", "--weights", "LossWeights", "--weights.by", by) for by in ("dr_dpo", "kldpo")},
    "gamma_po": ("dpo", "--margin", "GammaPOMargin"),
    "amapo": ("dpo", "--margin", "AMaPOMargin"),
    "alpha_dpo": ("dpo",),  # the loss of the same name
}
GONE = ("flip_weights", "flip_weights_tail")  # tried and not kept: rows, but no longer a part of the package
# pairs of film reviews: ranks of chosen and rejected among the four samples of a prompt
RANKS = {"high": "[[1, 4]]", "low": "[[2, 3]]", "mixed": "[[1, 4], [2, 3]]"}
LOSSES: dict[str, tuple[str, ...]] = {
    "sigmoid": (),
    "ipo": ("--model.loss", "IPOLoss"),
    "simpo": ("--config", "configs/loss/simpo.yaml"),
    "simpo_no_margin": ("--config", "configs/loss/simpo.yaml", "--model.loss.gamma", "0"),
    "alpha_dpo": ("--config", "configs/loss/alpha_dpo.yaml"),
}
Command = list[str]


@dataclass(frozen=True, order=True)
class Run:
    """A cell of the design at one seed: the columns of the table that identify a row."""

    task: str  # a key of TASKS
    phase: str
    seed: int
    data: str
    flip_rate: float
    loss: str  # a key of LOSSES
    arm: str  # a file of configs/method, or a key of OPTIONS
    beta0: float
    learning_rate: float
    alpha: float = 0.6  # alpha and keep_ratio vary only for β-DPO
    keep_ratio: float = 0.8
    options: str = ""  # further words of `beta-dpo fit`

    @property
    def folder(self) -> Path:
        """Return the log folder."""
        varied = [f"alpha={self.alpha:g}", f"keep={self.keep_ratio:g}"] if self.arm == "beta_dpo" else []
        varied += [self.options.replace("/", "_")] if self.options else []
        settings = [f"{self.data}-{self.flip_rate:g}", self.loss, self.arm, f"beta0={self.beta0:g}"]
        name = ",".join([*settings, f"lr={self.learning_rate:g}", *varied])
        return FOLDER / self.task / f"seed-{self.seed}" / name

    def reference(self, task: Task) -> tuple[str, ...]:
        """Return the words that name the SFT model; ε-DPO compares distributions, which a cache does not hold."""
        kept = "frozen" if self.arm == "epsilon_dpo" else "cached"
        return "--model.name", str(task.folder(self.seed) / "model"), "--model.reference", kept

    def fit(self, config: str, *task: str) -> Command:
        """Return the command that trains, with the configuration and further words of the task."""
        if self.arm in GONE:
            raise LookupError(f"{self.arm} is no longer a part of the package: version 0.1 has it")
        file, *words = OPTIONS.get(self.arm, (self.arm,))
        if self.arm == "beta_dpo":
            words = ["--filter.keep_ratio", f"{self.keep_ratio:g}", "--schedule.alpha", f"{self.alpha:g}"]
        return [
            *("fit", "--config", config, "--config", f"configs/method/{file}.yaml"),
            *(*words, *LOSSES[self.loss], *task),
            *("--model.beta0", f"{self.beta0:g}", "--model.optimizer.init_args.lr", f"{self.learning_rate:g}"),
            *("--trainer.logger.init_args.save_dir", str(self.folder.parent)),
            *("--trainer.logger.init_args.name", self.folder.name, "--trainer.logger.init_args.version", ""),
            *("--seed_everything", str(self.seed), *self.options.split()),
        ]


class Task:
    """A task: the commands of its runs and the figures of their samples."""

    name: str
    margin: float  # smaller differences of the mean reward count as equal
    budget: float  # nats of KL to the SFT model
    collapsed: float  # a run with a larger share of malformed responses has collapsed
    steps: tuple[int, ...]  # checkpoints that are sampled; the last is the end of training
    minutes: tuple[float, float, float]  # of one core: what a seed shares, a run that tunes, a run that is judged

    def folder(self, seed: int) -> Path:
        """Return the folder of the SFT model of a seed, and of its samples."""
        return FOLDER / self.name / f"seed-{seed}" / "sft"

    def prepare(self) -> None:
        """Make what all seeds share."""

    def sft(self, seed: int) -> list[Command]:
        """Return the commands for what the runs of a seed share: the SFT model and its samples."""
        return []

    def train(self, run: Run) -> list[Command]:
        """Return the commands that train a run from the SFT model."""
        raise NotImplementedError

    def sample(self, model: Path, out: Path, seed: int, count: int, *words: str) -> Command:
        raise NotImplementedError

    def score(self, samples: Path) -> dict[str, float]:
        """Return mean reward, share of malformed responses and KL of a file of samples."""
        raise NotImplementedError

    def sampled(self, run: Run) -> tuple[int, ...]:
        """Return the checkpoints of a run that are sampled: to choose settings the last is enough."""
        return self.steps[-1:] if run.phase == TUNING else self.steps

    def commands(self, run: Run) -> list[Command]:
        """Return all commands from the SFT model to the samples of a run."""
        made, start = self.train(run), self.folder(run.seed) / "model"
        for step in self.sampled(run):
            model, count = run.folder / f"model-{step}", 1024 if step == self.steps[-1] else 512
            made.append(["export", str(run.folder / "checkpoints" / f"step={step}.ckpt"), str(model)])
            out = run.folder / f"samples-{step}.jsonl"
            made.append(self.sample(model, out, run.seed, count, "--reference", str(start)))
        return made

    def figures(self, run: Run, read: Any) -> dict[str, float]:
        """Return what the samples and the audit of a finished run say."""
        sft = self.score(self.folder(run.seed) / "samples.jsonl")
        found = {"sft_reward": sft["reward"], "sft_malformed": sft["malformed"]}
        for step in self.sampled(run):
            end = "" if step == self.steps[-1] else f"_{step}"
            told = self.score(run.folder / f"samples-{step}.jsonl")
            found |= {f"{name}{end}": value for name, value in told.items()}
        flipped = read.audit.flipped.to_numpy(bool)
        for name, mask in {"flipped": flipped, "clean": ~flipped}.items():
            found[f"dropped_{name}"] = float(1 - read.audit.kept[mask].mean())  # NaN without such pairs
        return found


class Controlled(Task):
    """The controlled task (datamodules/controlled_task), whose reward, from 0 to 4.5, is exact."""

    name, margin, budget, collapsed, steps = "controlled", 0.1, 1.0, 0.25, (16, 32, 48, 64)
    minutes = (0.8, 0.4, 0.5)

    def sft(self, seed: int) -> list[Command]:
        folder = self.folder(seed)
        return [
            [
                *("fit", "--config", "configs/quickstart_sft.yaml", "--seed_everything", str(seed)),
                *("--trainer.logger.init_args.save_dir", str(folder.parent)),
                *("--trainer.logger.init_args.name", folder.name),
            ],
            ["export", str(folder / "checkpoints" / "last.ckpt"), str(folder / "model")],
            self.sample(folder / "model", folder / "samples.jsonl", seed, 1024),
        ]

    def train(self, run: Run) -> list[Command]:
        gap, share = GAPS[run.data]
        # 64 steps of 64 pairs, each seen once; the reference is scored once for all runs on the same pairs
        return [
            run.fit(
                *("configs/quickstart.yaml", "--data.pairs", "4096", *run.reference(self)),
                *("--checkpoint.every_n_steps", "16", "--checkpoint.keep_all", "true", "--data.gap", gap),
                *("--data.high_gap_share", f"{share:g}", "--data.flip_rate", f"{run.flip_rate:g}"),
                *("--data.broken_share", "0.25"),
            )
        ]

    def sample(self, model: Path, out: Path, seed: int, count: int, *words: str) -> Command:
        words = ("--seed", str(seed), "--count", str(count), *words)
        return ["generate", str(model), str(out), *words, "--max_new_tokens", "32"]  # more than an answer needs

    def score(self, samples: Path) -> dict[str, float]:
        told = summary(rows_of(samples))
        names = {"reward": "mean true reward", "malformed": "malformed share", "kl": "KL to the reference"}
        return {name: told[long].mean for name, long in names.items() if long in told}

    def figures(self, run: Run, read: Any) -> dict[str, float]:
        files = (run.folder / f"samples-{self.steps[-1]}.jsonl", self.folder(run.seed) / "samples.jsonl")
        return super().figures(run, read) | {"win_rate": win_rate(*map(rows_of, files)).mean}


class Quickstart(Controlled):
    """What `make quickstart` does, by the settings in its files, sampled at the end of training."""

    name = "quickstart"
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    steps = (settings["data"]["init_args"]["pairs"] // settings["data"]["init_args"]["batch_size"],)

    def train(self, run: Run) -> list[Command]:
        return [run.fit("configs/quickstart.yaml", "--model.name", str(self.folder(run.seed) / "model"))]


class Reviews(Task):
    """Film reviews (benchmarks/study/sentiment.py); the reward is the gold probability that a sentence praises."""

    name, margin, budget, collapsed, steps = "sentiment", 0.02, 3.0, 0.5, (16, 32, 48)
    minutes = (14.0, 1.1, 1.7)
    data = FOLDER / "sentiment" / "data"
    reward = "benchmarks.study.sentiment.praise"

    def folder(self, seed: int) -> Path:
        """Return the folder of an SFT model, which all tuning seeds share, because it takes minutes."""
        return super().folder(TUNING_SEEDS[0] if seed in TUNING_SEEDS else seed)

    def prepare(self) -> None:
        sentiment.main(["data", str(self.data)])

    def sft(self, seed: int) -> list[Command]:
        folder, text, tokenizer = self.folder(seed), self.data / "sentences.jsonl", self.data / "tokenizer"
        prompts = folder / "prompts.jsonl"
        return [
            ["sentiment", "data", str(self.data)],
            [
                *("fit", "--config", "benchmarks/study/sentiment_sft.yaml", "--seed_everything", str(seed)),
                *("--data.path", str(text), "--data.tokenizer", str(tokenizer)),
                *("--trainer.logger.init_args.save_dir", str(folder.parent)),
                *("--trainer.logger.init_args.name", folder.name),
            ],
            # the logits over .7: sampled as they are, these models write word salad
            ["export", str(folder / "checkpoints" / "last.ckpt"), str(folder / "model"), "--temperature", "0.7"],
            ["sentiment", "prompts", str(self.data), str(prompts), "--seed", str(seed)],
            self.sample(
                *(folder / "model", folder / "drawn.jsonl", seed, sentiment.PROMPTS),
                *("--samples", "4", "--prompts", str(prompts)),
            ),
            self.sample(folder / "model", folder / "samples.jsonl", seed, 1024),
        ]

    def train(self, run: Run) -> list[Command]:
        drawn, pairs = self.folder(run.seed) / "drawn.jsonl", run.folder.with_name(f"{run.folder.name}.jsonl")
        return [
            [
                *("pairs", str(drawn), str(pairs), "--ranks", RANKS[run.data], "--reward", self.reward),
                *("--reward_args", json.dumps({"path": str(self.data / "proxy.json")})),
                *("--flip_rate", f"{run.flip_rate:g}", "--seed", str(run.seed)),
            ],
            run.fit("benchmarks/study/sentiment.yaml", "--data.path", str(pairs), *run.reference(self)),
        ]

    def sample(self, model: Path, out: Path, seed: int, count: int, *words: str) -> Command:
        prompts = () if "--prompts" in words else ("--prompts", str(self.data / "evaluation.jsonl"))
        words = ("--seed", str(seed), "--count", str(count), *words, *prompts)
        return ["generate", str(model), str(out), *words, "--max_new_tokens", "64", "--max_prompt_length", "48"]

    def score(self, samples: Path) -> dict[str, float]:
        told = figures(rows_of(samples), OwnReward(self.reward, {"path": str(self.data / "gold.json")}))
        ended, kl = (told[name].mean if name in told else other for name, other in (("finished", 1.0), ("KL", 0.0)))
        return {"reward": told["reward"].mean, "malformed": 1 - ended, "kl": kl}


class SmolLM2(Task):
    """Six steps of SmolLM2-135M on Anthropic-HH, whose file is named by the environment variable HH."""

    name, margin, budget, collapsed, steps = "smollm2", 0.1, 1.0, 1.0, ()

    def prepare(self) -> None:
        if not Path("models/smollm2").is_dir() or not Path(os.environ.get("HH", "")).is_file():
            raise SystemExit("smollm2 needs `make smollm2` and HH=pairs.jsonl.gz, a file of Anthropic-HH pairs")

    def train(self, run: Run) -> list[Command]:
        steps = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "6"]
        return [run.fit("configs/smollm2_hh.yaml", "--data.path", os.environ.get("HH", "HH"), *steps)]

    def figures(self, run: Run, read: Any) -> dict[str, float]:
        return {}


TASKS: dict[str, Task] = {task.name: task for task in (Controlled(), Quickstart(), Reviews(), SmolLM2())}

# --- the table ----------------------------------------------------------------------------------------------

KEY = tuple(each.name for each in fields(Run))
BY_STEP = tuple(f"{figure}_{step}" for step in (16, 32, 48) for figure in ("reward", "kl", "malformed"))
FIGURES = (
    *("accuracy", "reward", "win_rate", "malformed", "kl", *BY_STEP, "log_ratio_chosen", "log_ratio_rejected"),
    *("dropped_flipped", "dropped_clean", "clamped", "beta_low", "beta_high", "gap", "sft_reward", "sft_malformed"),
    "seconds",
)
COLUMNS = (*KEY, "processor", *FIGURES)


def read_results(path: Path = RESULTS) -> pd.DataFrame:
    """Return the table at `path`, empty if there is no file."""
    return pd.read_csv(path).fillna({"options": ""}) if path.exists() else pd.DataFrame(columns=list(COLUMNS))


def append_result(row: Mapping[str, object], path: Path = RESULTS) -> None:
    """Put a row in its place and replace an earlier row of the same run; the file is written atomically."""
    with locked(path.with_suffix(".lock"), f"The table {path}", "name another file"):
        before, fresh = read_results(path), pd.DataFrame([row], columns=list(COLUMNS))
        table = fresh if before.empty else pd.concat([before, fresh])
        table = table.drop_duplicates(list(KEY), keep="last").sort_values(list(KEY), kind="stable")
        with atomic_file(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


def runs_of(table: pd.DataFrame) -> list[Run]:
    """Return the run of every row."""
    return [Run(**row) for row in table[list(KEY)].to_dict("records")]


def with_measures(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with what the verdicts read.

    `collapsed`: whether a run has; in the phases of the plan its `reward` then is that of the SFT model. `within`:
    the highest reward within the KL budget of its task. `per_root`: the gain in reward over √KL at the end.
    """
    rows = [row for _, row in table.iterrows()]
    collapsed = np.array([row.malformed > TASKS[row.task].collapsed for row in rows], bool)
    lost = collapsed & table.phase.isin((TUNING, JUDGED)).to_numpy(bool)
    reward = table.reward.where(~lost, table.sft_reward)
    return table.assign(
        collapsed=collapsed,
        within=[reward_within(path_of(row), TASKS[row.task].budget) for row in rows],
        reward=reward,
        per_root=(reward - table.sft_reward) / np.sqrt(table.kl.astype(float).clip(lower=1e-3)),
    )


def path_of(row: pd.Series) -> list[tuple[float, float]]:
    """Return (KL, reward) of the SFT model and of every checkpoint in order."""
    ends = [*(f"_{step}" for step in TASKS[row.task].steps[:-1]), ""]
    return [(0.0, float(row.sft_reward)), *((float(row[f"kl{e}"]), float(row[f"reward{e}"])) for e in ends)]


# --- the work -----------------------------------------------------------------------------------------------


def make_sft_model(task_and_seed: tuple[str, int]) -> None:
    """Do what the runs of a seed share, unless it is done."""
    task, seed = task_and_seed
    commands, folder = TASKS[task].sft(seed), TASKS[task].folder(seed)
    if commands and not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run of minutes needs no resume
        do(commands, folder.with_suffix(".log"))
        (folder / "done").touch()


def make_row(run: Run) -> dict[str, object]:
    """Train and sample a run, and return its row; its models and checkpoints are deleted."""
    started = time.perf_counter()
    shutil.rmtree(run.folder, ignore_errors=True)
    do(TASKS[run.task].commands(run), run.folder.with_name(f"{run.folder.name}.log"))
    row = asdict(run) | {"processor": processor()} | measured(run) | {"seconds": time.perf_counter() - started}
    for folder in (*run.folder.glob("model-*"), run.folder / "checkpoints"):
        shutil.rmtree(folder)
    return row


def measured(run: Run) -> dict[str, float]:
    """Return the figures of a finished run."""
    read = read_run(run.folder, run.arm)

    def last(tag: str) -> float:
        value = read.last(tag)
        return math.nan if value is None else value

    beta, clamped = read.curves["beta/used"], read.curve("beta/clamped")
    return {
        "accuracy": last("val/reward_accuracy"),
        "log_ratio_chosen": last("val/log_ratio_chosen"),
        "log_ratio_rejected": last("val/log_ratio_rejected"),
        "beta_low": float(beta.min()),
        "beta_high": float(beta.max()),
        "clamped": math.nan if clamped is None else float(clamped.values.mean()),
        "gap": last("gap/mean"),
        **TASKS[run.task].figures(run, read),
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_samples(str(path))]


def do(commands: Sequence[Command], log: Path) -> None:
    """Run `beta-dpo` commands one after the other in this process, so that its start-up is paid once."""
    torch.set_num_threads(1)
    with quietly(log):
        for command in commands:
            print(spoken(command), flush=True)
            sentiment.main(command[1:]) if command[0] == "sentiment" else main(command)


def spoken(command: Command) -> str:
    """Return a command as a reader gives it in the project's folder."""
    own = command[0] == "sentiment"
    program = ["python", "-m", "benchmarks.study.sentiment"] if own else ["beta-dpo", command[0]]
    return shlex.join([*program, *command[1:]])


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Redirect all output of this process to a file, including output from outside Python."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
