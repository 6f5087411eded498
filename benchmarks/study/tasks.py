"""The tasks of the study: the settings of a run, its commands as a reader gives them, and its figures."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import pandas as pd
import yaml

from app.commands.judge import figures, summary, win_rate
from app.core.samples import read_samples
from app.judges.rewards import OwnReward
from benchmarks.study import real_pairs, sentiment
from benchmarks.tables import ROOT

FOLDER = Path("runs/study")
TUNING, JUDGED = "tuning", "judged"  # the phases of the plan in the table
TUNING_SEEDS = tuple(range(51, 56))  # choose β0 and rate of every arm, and decide nothing
# data of the controlled task: name → (gap, share of high-gap pairs)
GAPS = {"low": ("adjacent", 0.0), "mixed": ("mixed", 0.5), "high": ("extreme", 1.0)}
# arms that are another file of configs/method with more options
ARMS = {
    "re_po": "dpo.yaml --confidence AnnotatorReliability",
    "dr_dpo": "dpo.yaml --weights LossWeights --weights.by dr_dpo",
    "kldpo": "dpo.yaml --weights LossWeights --weights.by kldpo",
    "gamma_po": "dpo.yaml --margin GammaPOMargin",
    "amapo": "dpo.yaml --margin AMaPOMargin",
    "alpha_dpo": "dpo.yaml",  # the loss of the same name
}
LOSSES = {
    "sigmoid": "",
    "ipo": "--model.loss IPOLoss",
    "simpo": "--config configs/loss/simpo.yaml",
    "simpo_no_margin": "--config configs/loss/simpo.yaml --model.loss.gamma 0",
    "alpha_dpo": "--config configs/loss/alpha_dpo.yaml",
}
# pairs of film reviews: ranks of chosen and rejected among the four samples of a prompt
RANKS = {"high": "[[1, 4]]", "low": "[[2, 3]]", "mixed": "[[1, 4], [2, 3]]"}
# pairs of people, and the most characters of one; PandaLM has several pairs a prompt, so fewer are left to hold out
PAIR_FILES = {"hh": ("hh_harmless_base_test.jsonl.gz", 350), "pandalm": ("pandalm_human_pairs.jsonl.gz", 450)}


@dataclass(frozen=True, order=True)
class Run:
    """A cell of the design at one seed: the columns of the table that identify a row."""

    task: str  # a key of TASKS
    phase: str
    seed: int
    data: str
    flip_rate: float
    loss: str  # a key of LOSSES
    arm: str  # a file of configs/method, or a key of ARMS
    beta0: float
    learning_rate: float
    alpha: float = 0.6  # alpha and keep_ratio vary only for β-DPO
    keep_ratio: float = 0.8
    options: str = ""  # further words of `beta-dpo fit`

    @property
    def folder(self) -> Path:
        """Return the log folder."""
        name = (
            f"{self.data}-{self.flip_rate:g},{self.loss},{self.arm},beta0={self.beta0:g},lr={self.learning_rate:g}"
        )
        if self.arm == "beta_dpo":
            name += f",alpha={self.alpha:g},keep={self.keep_ratio:g}"
        if self.options:
            name += "," + re.sub("[ /]", "_", self.options)
        return FOLDER / self.task / f"seed-{self.seed}" / name

    def fit(self, config: str, words: str = "") -> str:
        """Return the command that trains, with the configuration and further words of the task."""
        arm = ARMS.get(self.arm, f"{self.arm}.yaml")
        if self.arm == "beta_dpo":
            arm += f" --filter.keep_ratio {self.keep_ratio:g} --schedule.alpha {self.alpha:g}"
        parts = [
            *(f"beta-dpo fit --config {config} --config configs/method/{arm}", LOSSES[self.loss], words),
            f"--model.beta0 {self.beta0:g} --model.optimizer.init_args.lr {self.learning_rate:g}",
            f"{logged(self.folder)} --trainer.logger.init_args.version ''",
            *(f"--seed_everything {self.seed}", self.options),
        ]
        return " ".join(filter(None, parts))


def logged(folder: Path) -> str:
    """Return the words of `fit` that name the log folder."""
    log = "--trainer.logger.init_args"
    return f"{log}.save_dir {folder.parent} {log}.name {folder.name}"


class Task:
    """A task: the commands of its runs and the figures of their samples."""

    name: str
    margin: float  # smaller differences of the mean reward count as equal
    budget: float  # nats of KL to the SFT model
    collapsed: float  # a run with a larger share of malformed responses has collapsed
    steps: tuple[int, ...]  # checkpoints that are sampled; the last is the end of training
    # of one core of an Intel Xeon without other work: what a seed shares, a run that tunes, a run that is judged
    minutes: tuple[float, float, float]
    sampling: str  # words of `generate`

    def folder(self, seed: int) -> Path:
        """Return the folder of the SFT model of a seed, and of its samples."""
        return FOLDER / self.name / f"seed-{seed}" / "sft"

    def prepare(self) -> None:
        """Make what all seeds share."""

    def sft(self, seed: int) -> list[str]:
        """Return the commands for what the runs of a seed share: the SFT model and its samples."""
        return []

    def train(self, run: Run) -> list[str]:
        """Return the commands that train a run from the SFT model."""
        raise NotImplementedError

    def score(self, samples: Path) -> dict[str, float]:
        """Return mean reward, share of malformed responses and KL of a file of samples."""
        raise NotImplementedError

    def reference(self, run: Run) -> str:
        """Return the words that name the SFT model; ε-DPO compares distributions, which a cache does not hold."""
        kept = "frozen" if run.arm == "epsilon_dpo" else "cached"
        return f"--model.name {self.folder(run.seed)}/model --model.reference {kept}"

    def sample(self, model: str, out: str, seed: int, count: int = 1024, words: str = "") -> str:
        return f"beta-dpo generate {model} {out} --seed {seed} --count {count} {words}{self.sampling}"

    def sampled(self, run: Run) -> tuple[int, ...]:
        """Return the checkpoints of a run that are sampled: to choose settings the last is enough."""
        return self.steps[-1:] if run.phase == TUNING else self.steps

    def commands(self, run: Run) -> list[str]:
        """Return all commands from the SFT model to the samples of a run."""
        made, words = self.train(run), f"--reference {self.folder(run.seed)}/model "
        for step in self.sampled(run):
            model, count = f"{run.folder}/model-{step}", 1024 if step == self.steps[-1] else 512
            made.append(f"beta-dpo export {run.folder}/checkpoints/step={step}.ckpt {model}")
            made.append(self.sample(model, f"{run.folder}/samples-{step}.jsonl", run.seed, count, words))
        return made

    def figures(self, run: Run, audit: pd.DataFrame) -> dict[str, float]:
        """Return what the samples and the audit of a finished run say."""
        sft = self.score(self.folder(run.seed) / "samples.jsonl")
        found = {"sft_reward": sft["reward"], "sft_malformed": sft["malformed"]}
        for step in self.sampled(run):
            end = "" if step == self.steps[-1] else f"_{step}"
            told = self.score(run.folder / f"samples-{step}.jsonl")
            found |= {f"{name}{end}": value for name, value in told.items()}
        return found | dropped(audit)


def dropped(audit: pd.DataFrame) -> dict[str, float]:
    """Return the shares of flipped and of clean pairs that the filter dropped, NaN without such pairs."""
    flipped = audit.flipped.to_numpy(bool)
    masks = {"flipped": flipped, "clean": ~flipped}
    return {f"dropped_{name}": float(1 - audit.kept[mask].mean()) for name, mask in masks.items()}


class Controlled(Task):
    """The controlled task (datamodules/controlled_task), whose reward, from 0 to 4.5, is exact."""

    name, margin, budget, collapsed = "controlled", 0.1, 1.0, 0.25
    steps: tuple[int, ...] = (16, 32, 48, 64)
    minutes = (0.85, 0.35, 0.45)
    sampling = "--max_new_tokens 32"  # more than an answer needs

    def sft(self, seed: int) -> list[str]:
        folder = self.folder(seed)
        return [
            f"beta-dpo fit --config configs/quickstart_sft.yaml --seed_everything {seed} {logged(folder)}",
            f"beta-dpo export {folder}/checkpoints/last.ckpt {folder}/model",
            self.sample(f"{folder}/model", f"{folder}/samples.jsonl", seed),
        ]

    def train(self, run: Run) -> list[str]:
        gap, share = GAPS[run.data]
        # 64 steps of 64 pairs, each seen once; the reference is scored once for all runs on the same pairs
        words = (
            f"--data.pairs 4096 {self.reference(run)} --checkpoint.every_n_steps 16 --checkpoint.keep_all true "
            f"--data.gap {gap} --data.high_gap_share {share:g} --data.flip_rate {run.flip_rate:g} "
            "--data.broken_share 0.25"
        )
        return [run.fit("configs/quickstart.yaml", words)]

    def score(self, samples: Path) -> dict[str, float]:
        names = {"mean true reward": "reward", "malformed share": "malformed", "KL to the reference": "kl"}
        return {names[name]: found.mean for name, found in summary(rows_of(samples)).items() if name in names}

    def figures(self, run: Run, audit: pd.DataFrame) -> dict[str, float]:
        files = (run.folder / f"samples-{self.steps[-1]}.jsonl", self.folder(run.seed) / "samples.jsonl")
        return super().figures(run, audit) | {"win_rate": win_rate(*map(rows_of, files)).mean}


class Quickstart(Controlled):
    """What `make quickstart` does, by the settings in its files, sampled at the end of training."""

    name = "quickstart"
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    steps = (settings["data"]["init_args"]["pairs"] // settings["data"]["init_args"]["batch_size"],)

    def train(self, run: Run) -> list[str]:
        return [run.fit("configs/quickstart.yaml", f"--model.name {self.folder(run.seed)}/model")]


class Reviews(Task):
    """Film reviews (benchmarks/study/sentiment.py); the reward is the gold probability that a sentence praises."""

    name, margin, budget, collapsed, steps = "sentiment", 0.02, 3.0, 0.5, (16, 32, 48)
    minutes = (10.5, 0.9, 1.3)
    data = FOLDER / "sentiment" / "data"
    lengths = "--max_new_tokens 64 --max_prompt_length 48"
    sampling = f"--prompts {data}/evaluation.jsonl {lengths}"
    reward = "benchmarks.study.sentiment.praise"

    def folder(self, seed: int) -> Path:
        """Return the folder of an SFT model, which all tuning seeds share, because it takes minutes."""
        return super().folder(TUNING_SEEDS[0] if seed in TUNING_SEEDS else seed)

    def prepare(self) -> None:
        sentiment.main(["data", str(self.data)])

    def sft(self, seed: int) -> list[str]:
        folder, own = self.folder(seed), "python -m benchmarks.study.sentiment"
        return [
            f"{own} data {self.data}",
            f"beta-dpo fit --config benchmarks/study/sentiment_sft.yaml --seed_everything {seed} "
            f"--data.path {self.data}/sentences.jsonl --data.tokenizer {self.data}/tokenizer {logged(folder)}",
            # the logits over .7: sampled as they are, these models write word salad
            f"beta-dpo export {folder}/checkpoints/last.ckpt {folder}/model --temperature 0.7",
            f"{own} prompts {self.data} {folder}/prompts.jsonl --seed {seed}",
            f"beta-dpo generate {folder}/model {folder}/drawn.jsonl --seed {seed} --count {sentiment.PROMPTS} "
            f"--samples 4 --prompts {folder}/prompts.jsonl {self.lengths}",
            self.sample(f"{folder}/model", f"{folder}/samples.jsonl", seed),
        ]

    def train(self, run: Run) -> list[str]:
        pairs, proxy = f"{run.folder}.jsonl", json.dumps({"path": str(self.data / "proxy.json")})
        return [
            f"beta-dpo pairs {self.folder(run.seed)}/drawn.jsonl {pairs} --ranks {quote(RANKS[run.data])} "
            f"--reward {self.reward} --reward_args {quote(proxy)} --flip_rate {run.flip_rate:g} --seed {run.seed}",
            run.fit("benchmarks/study/sentiment.yaml", f"--data.path {pairs} {self.reference(run)}"),
        ]

    def score(self, samples: Path) -> dict[str, float]:
        told = figures(rows_of(samples), OwnReward(self.reward, {"path": str(self.data / "gold.json")}))
        ended, kl = (told[name].mean if name in told else other for name, other in (("finished", 1.0), ("KL", 0.0)))
        return {"reward": told["reward"].mean, "malformed": 1 - ended, "kl": kl}


class RealPairs(Task):
    """SmolLM2-135M-Instruct on pairs of people, some of their labels flipped (benchmarks/study/real_pairs.py)."""

    name, margin, budget, collapsed, steps = "real", 0.1, 1.0, 1.0, ()
    minutes = (0.0, 0.0, 4.5)

    def source(self, data: str) -> Path:
        """Return the file of pairs, in the folder that the environment variable PAIRS names."""
        return Path(os.environ.get("PAIRS", "PAIRS"), PAIR_FILES[data][0])

    def prepare(self) -> None:
        lost = [str(each) for each in (Path("models/smollm2"), *map(self.source, PAIR_FILES)) if not each.exists()]
        if lost:
            raise SystemExit(
                f"real pairs need {', '.join(lost)}: make the model by `make smollm2`, and name the folder of the "
                "pairs by PAIRS=FOLDER"
            )

    def train(self, run: Run) -> list[str]:
        folder = f"{run.folder}-pairs"
        words = (
            f"--data.path {folder}/train.jsonl --data.validation_path {folder}/held_out.jsonl "
            "--data.validation_share 0 --data.batch_size 16 --data.micro_batch_tokens 2048 "
            "--model.reference cached --trainer.accelerator cpu --trainer.max_epochs 2 "
            "--trainer.check_val_every_n_epoch 2 --checkpoint null --dashboard null"
        )
        return [
            f"python -m benchmarks.study.real_pairs {quote(str(self.source(run.data)))} {folder} "
            f"--seed {run.seed} --flip_rate {run.flip_rate:g} --longest {PAIR_FILES[run.data][1]}",
            run.fit("configs/own_pairs.yaml", words),
        ]

    def figures(self, run: Run, audit: pd.DataFrame) -> dict[str, float]:
        return dropped(audit) | real_pairs.found(audit, Path(f"{run.folder}-pairs", "train.jsonl"))


TASKS: dict[str, Task] = {task.name: task for task in (Controlled(), Quickstart(), Reviews(), RealPairs())}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_samples(str(path))]
