"""The runs of the study: settings, commands, and the table with one row per run (docs/study/results.csv)."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from app.commands.judge import summary, win_rate
from app.files import atomic_file
from app.locks import locked
from app.main import main
from app.report.run import read_run
from app.samples import read_samples
from benchmarks.study import sentiment
from benchmarks.study.verdicts import reward_within
from benchmarks.tables import ROOT, processor

RESULTS = ROOT / "docs" / "study" / "results.csv"
FOLDER = Path("runs/study")
STEPS = (16, 32, 48, 64)  # checkpoints that are sampled; the last is the end of training
KL_BUDGET = 1.0  # nats
COLLAPSED = 0.25  # a run with a larger share of malformed answers has collapsed
LENGTH = ("--max_new_tokens", "32")  # more than an answer of the controlled task needs
# data of the controlled task: name → (gap, share of high-gap pairs)
GAPS = {"low": ("adjacent", 0.0), "mixed": ("mixed", 0.5), "high": ("extreme", 1.0)}
GAPS |= {f"high{percent}": ("mixed", percent / 100) for percent in (10, 20, 40)}
# arms that are another file of configs/method with one option more
OPTIONS: dict[str, tuple[str, ...]] = {
    "adaptive_margin": ("standardised_margin",),  # its name when the runs were made
    "head_filter": ("filter_only", "--filter.by", "head"),
    "tail_filter": ("filter_only", "--filter.by", "tail"),
    "constant_m0": ("beta_dpo", "--schedule.m0", "0.0"),
}
GONE = ("flip_weights", "flip_weights_tail")  # tried and not kept: rows, but no longer a part of the package
LOSSES: dict[str, tuple[str, ...]] = {
    "sigmoid": (),
    "ipo": ("--model.loss", "IPOLoss"),
    "simpo": ("--config", "configs/loss/simpo.yaml"),
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

    def fit(self, config: str, *task: str) -> Command:
        """Return the command that trains, with the configuration and further words of the task."""
        if self.arm in GONE:
            raise LookupError(f"{self.arm} is no longer a part of the package: version 0.1 has it")
        file, *words = OPTIONS.get(self.arm, (self.arm,))
        if self.arm == "beta_dpo":
            words = ["--filter.keep_ratio", f"{self.keep_ratio:g}", "--schedule.alpha", f"{self.alpha:g}"]
        return [
            *(
                "fit",
                "--config",
                config,
                "--config",
                f"configs/method/{file}.yaml",
                *words,
                *LOSSES[self.loss],
                *task,
            ),
            *("--model.beta0", f"{self.beta0:g}", "--model.optimizer.init_args.lr", f"{self.learning_rate:g}"),
            *("--trainer.logger.init_args.save_dir", str(self.folder.parent)),
            *("--trainer.logger.init_args.name", self.folder.name, "--trainer.logger.init_args.version", ""),
            *("--seed_everything", str(self.seed), *self.options.split()),
        ]


class Controlled:
    """The controlled task (datamodules/controlled_task), whose reward is exact."""

    margin = 0.1  # of mean true reward, from 0 to 4.5: smaller differences count as equal
    budget = KL_BUDGET
    steps = STEPS

    def prepare(self) -> None:
        """Make what all seeds share."""

    def sft_folder(self, seed: int) -> Path:
        return FOLDER / "controlled" / f"seed-{seed}" / "sft"

    def sft(self, seed: int) -> list[Command]:
        """Return the commands for the SFT model of a seed and its samples, which are the rivals of every arm."""
        folder = self.sft_folder(seed)
        return [
            [
                *("fit", "--config", "configs/quickstart_sft.yaml", "--seed_everything", str(seed)),
                *("--trainer.logger.init_args.save_dir", str(folder.parent)),
                *("--trainer.logger.init_args.name", folder.name),
            ],
            ["export", str(folder / "checkpoints" / "last.ckpt"), str(folder / "model")],
            ["generate", str(folder / "model"), str(folder / "samples.jsonl"), "--seed", str(seed), *LENGTH],
        ]

    def commands(self, run: Run) -> list[Command]:
        """Return the arguments of all `beta-dpo` commands from the SFT model to the samples of a run."""
        (gap, share), start = GAPS[run.data], str(self.sft_folder(run.seed) / "model")
        # 64 steps of 64 pairs, each seen once; the reference is scored once for all runs on the same pairs, but for
        # ε-DPO, which compares distributions
        reference = "frozen" if run.arm == "epsilon_dpo" else "cached"
        made = [
            run.fit(
                *("configs/quickstart.yaml", "--model.reference", reference, "--data.pairs", "4096"),
                *("--checkpoint.every_n_steps", str(STEPS[0]), "--checkpoint.keep_all", "true"),
                *("--model.name", start, "--data.gap", gap, "--data.high_gap_share", f"{share:g}"),
                *("--data.flip_rate", f"{run.flip_rate:g}"),
            )
        ]
        for step in STEPS:
            model, count = str(run.folder / f"model-{step}"), "1024" if step == STEPS[-1] else "512"
            made.append(["export", str(run.folder / "checkpoints" / f"step={step}.ckpt"), model])
            words = ["--reference", start, "--seed", str(run.seed), "--count", count, *LENGTH]
            made.append(["generate", model, str(run.folder / f"samples-{step}.jsonl"), *words])
        return made

    def figures(self, run: Run, read: Any) -> dict[str, float]:
        """Return what the samples and the audit of a finished run say."""
        rivals = samples(self.sft_folder(run.seed) / "samples.jsonl")
        sft = summary(rivals)
        found = {"sft_reward": sft["mean true reward"].mean, "sft_malformed": sft["malformed share"].mean}
        for step in STEPS:
            answers = samples(run.folder / f"samples-{step}.jsonl")
            told, end = summary(answers), "" if step == STEPS[-1] else f"_{step}"
            found |= {
                f"reward{end}": told["mean true reward"].mean,
                f"malformed{end}": told["malformed share"].mean,
                f"kl{end}": told["KL to the reference"].mean,
            }
        return found | dropped(read.audit) | {"win_rate": win_rate(answers, rivals).mean}


class Reviews:
    """Film reviews (benchmarks/study/sentiment.py): finish a sentence so that it praises, by a gold reward."""

    margin = 0.02  # of the mean probability of praise
    budget = 3.0  # nats: responses are five times as long as those of the controlled task
    steps = (16, 32, 48)
    data = FOLDER / "sentiment" / "data"

    def prepare(self) -> None:
        sentiment.main(["data", str(self.data)])

    def sft_folder(self, seed: int) -> Path:
        return FOLDER / "sentiment" / f"seed-{seed}" / "sft"

    def generate(self, model: Path, prompts: str, out: Path, seed: int, count: int | None, *words: str) -> Command:
        length = ("--max_new_tokens", "64", "--max_prompt_length", "48", "--count", str(count or "null"))
        return ["generate", str(model), str(out), "--prompts", prompts, "--seed", str(seed), *length, *words]

    def sft(self, seed: int) -> list[Command]:
        """Return the commands for the SFT model of a seed, and its samples for the pairs of all arms."""
        folder = self.sft_folder(seed)
        return [
            [
                *("fit", "--config", "benchmarks/study/sentiment_sft.yaml", "--seed_everything", str(seed)),
                *(
                    "--data.path",
                    str(self.data / "sentences.jsonl"),
                    "--data.tokenizer",
                    str(self.data / "tokenizer"),
                ),
                *("--trainer.logger.init_args.save_dir", str(folder.parent)),
                *("--trainer.logger.init_args.name", folder.name),
            ],
            ["export", str(folder / "checkpoints" / "last.ckpt"), str(folder / "raw")],
            ["sentiment", "sharpen", str(folder / "raw"), str(folder / "model")],
            ["sentiment", "prompts", str(self.data), str(folder / "prompts.jsonl"), "--seed", str(seed)],
            self.generate(folder / "model", str(folder / "prompts.jsonl"), folder / "drawn.jsonl", seed, None),
            self.evaluate(folder / "model", folder / "samples.jsonl", seed),
        ]

    def evaluate(self, model: Path, out: Path, seed: int, *words: str) -> Command:
        return self.generate(model, str(self.data / "evaluation.jsonl"), out, seed, 1024, *words)

    def commands(self, run: Run) -> list[Command]:
        """Return all commands from the SFT model's samples to the samples of a run."""
        folder, pairs = self.sft_folder(run.seed), str(run.folder.with_name(f"{run.folder.name}.jsonl"))
        reference = "frozen" if run.arm == "epsilon_dpo" else "cached"
        made = [
            [
                *("sentiment", "pairs", str(self.data), str(folder / "drawn.jsonl"), pairs, "--gap", run.data),
                *("--flip-rate", f"{run.flip_rate:g}", "--seed", str(run.seed)),
            ],
            run.fit(
                *("benchmarks/study/sentiment.yaml", "--data.path", pairs, "--model.name", str(folder / "model")),
                *("--model.reference", reference),
            ),
        ]
        for step in self.steps:
            model = run.folder / f"model-{step}"
            made.append(["export", str(run.folder / "checkpoints" / f"step={step}.ckpt"), str(model)])
            words = ("--reference", str(folder / "model"))
            made.append(self.evaluate(model, run.folder / f"samples-{step}.jsonl", run.seed, *words))
        return made

    def figures(self, run: Run, read: Any) -> dict[str, float]:
        sft = sentiment.figures(self.data, self.sft_folder(run.seed) / "samples.jsonl")
        found = {"sft_reward": sft["gold"], "sft_malformed": 1 - sft["finished"]}
        for step in self.steps:
            told, end = sentiment.figures(self.data, run.folder / f"samples-{step}.jsonl"), f"_{step}"
            end = "" if step == self.steps[-1] else end
            found |= {f"reward{end}": told["gold"], f"malformed{end}": 1 - told["finished"], f"kl{end}": told["KL"]}
        return found | dropped(read.audit)


class SmolLM2:
    """A few steps of SmolLM2-135M on Anthropic-HH, whose file is named by the environment variable HH."""

    steps = (6,)

    def prepare(self) -> None:
        if not Path("models/smollm2").is_dir() or not Path(os.environ.get("HH", "")).is_file():
            raise SystemExit("smollm2 needs `make smollm2` and HH=pairs.jsonl.gz, a file of Anthropic-HH pairs")

    def sft(self, seed: int) -> list[Command]:
        return []

    def commands(self, run: Run) -> list[Command]:
        last = str(self.steps[-1])
        steps = ["--trainer.max_steps", last, "--trainer.val_check_interval", last]
        return [run.fit("configs/smollm2_hh.yaml", "--data.path", os.environ.get("HH", "HH"), *steps)]

    def figures(self, run: Run, read: Any) -> dict[str, float]:
        return {}


def dropped(audit: pd.DataFrame) -> dict[str, float]:
    """Return the share of flipped and of other pairs that the filter dropped, NaN without such pairs."""
    flipped = audit.flipped.to_numpy(bool)
    sides = {"flipped": flipped, "clean": ~flipped}
    return {f"dropped_{name}": float(1 - audit.kept[mask].mean()) for name, mask in sides.items()}


TASKS: dict[str, Any] = {"controlled": Controlled(), "sentiment": Reviews(), "smollm2": SmolLM2()}

# --- the table ----------------------------------------------------------------------------------------------

KEY = tuple(each.name for each in fields(Run))
BY_STEP = tuple(f"{figure}_{step}" for step in STEPS[:-1] for figure in ("reward", "kl", "malformed"))
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


def with_within(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a further column `within`, the highest reward within the KL budget of its task."""
    rows = [row for _, row in table.iterrows()]
    return table.assign(within=[reward_within(path_of(row), TASKS[row.task].budget) for row in rows])


def path_of(row: pd.Series) -> list[tuple[float, float]]:
    """Return (KL, reward) of the SFT model and of every checkpoint in order."""
    ends = [*(f"_{step}" for step in TASKS[row.task].steps[:-1]), ""]
    return [(0.0, float(row.sft_reward)), *((float(row[f"kl{e}"]), float(row[f"reward{e}"])) for e in ends)]


# --- the work -----------------------------------------------------------------------------------------------


def make_sft_model(task_and_seed: tuple[str, int]) -> None:
    """Do what the runs of a seed share, unless it is done."""
    task, seed = task_and_seed
    commands = TASKS[task].sft(seed)
    folder = FOLDER / task / f"seed-{seed}" / "sft"
    if commands and not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run of a minute needs no resume
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

    beta, clamped = read.curves["beta/used"].values, read.curve("beta/clamped")
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


def samples(path: Path) -> list[dict[str, Any]]:
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
