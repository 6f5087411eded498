"""The tasks of the study: the settings of a run, its commands, and the figures of its samples."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
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
OPTIONS: dict[str, tuple[str, ...]] = {
    "re_po": ("dpo", "--confidence", "AnnotatorReliability"),
    **{by: ("dpo", "--weights", "LossWeights", "--weights.by", by) for by in ("dr_dpo", "kldpo")},
    "gamma_po": ("dpo", "--margin", "GammaPOMargin"),
    "amapo": ("dpo", "--margin", "AMaPOMargin"),
    "alpha_dpo": ("dpo",),  # the loss of the same name
}
# pairs of film reviews: ranks of chosen and rejected among the four samples of a prompt
RANKS = {"high": "[[1, 4]]", "low": "[[2, 3]]", "mixed": "[[1, 4], [2, 3]]"}
# pairs of people, and the most characters of one; PandaLM has several pairs a prompt, so fewer are left to hold out
PAIR_FILES = {"hh": ("hh_harmless_base_test.jsonl.gz", 350), "pandalm": ("pandalm_human_pairs.jsonl.gz", 450)}
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
    # of one core of an Intel Xeon without other work: what a seed shares, a run that tunes, a run that is judged
    minutes: tuple[float, float, float]

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
        return found | dropped(read.audit)


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
    minutes = (10.5, 0.9, 1.3)
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

    def pairs(self, run: Run) -> Path:
        return run.folder.with_name(f"{run.folder.name}-pairs")

    def train(self, run: Run) -> list[Command]:
        folder, longest = self.pairs(run), PAIR_FILES[run.data][1]
        words = ("--seed", str(run.seed), "--flip_rate", f"{run.flip_rate:g}", "--longest", f"{longest}")
        return [
            ["real_pairs", str(self.source(run.data)), str(folder), *words],
            run.fit(
                *("configs/own_pairs.yaml", "--data.path", str(folder / "train.jsonl")),
                *("--data.validation_path", str(folder / "held_out.jsonl"), "--data.validation_share", "0"),
                *("--data.batch_size", "16", "--data.micro_batch_tokens", "2048", "--model.reference", "cached"),
                *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
                *("--trainer.check_val_every_n_epoch", "2", "--checkpoint", "null", "--dashboard", "null"),
            ),
        ]

    def figures(self, run: Run, read: Any) -> dict[str, float]:
        return dropped(read.audit) | real_pairs.found(read.audit, self.pairs(run) / "train.jsonl")


TASKS: dict[str, Task] = {task.name: task for task in (Controlled(), Quickstart(), Reviews(), RealPairs())}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_samples(str(path))]
