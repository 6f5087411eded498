"""One run of the study: the settings that vary, and the commands that carry it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

STEPS = (16, 32, 48, 64)  # checkpoints that are sampled; the last is the end of training
FOLDER = Path("runs/study")
PROMPTS = {step: 1024 if step == STEPS[-1] else 512 for step in STEPS}

LENGTH = ("--max_new_tokens", "32")  # more than an answer of the controlled task needs

Command = list[str]

# data of the study: name → (gap, share of high-gap pairs)
GAPS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "low": ("adjacent", 0.0),
        **{f"high{percent}": ("mixed", percent / 100) for percent in (10, 20, 40)},
        "mixed": ("mixed", 0.5),
        "high": ("extreme", 1.0),
    }
)

# what the study sets otherwise than configs/quickstart.yaml: short runs, many of them
BASE = (
    *("--model.reference", "cached"),  # scored once for all runs on the same pairs from the same SFT model
    *("--data.pairs", "4096"),  # 64 steps of 64, each pair seen once
    *("--checkpoint.every_n_steps", str(STEPS[0]), "--checkpoint.keep_all", "true"),
)
# arms that are another file of configs/method with one option more
OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "head_filter": ("filter_only", "--filter.by", "head"),
        "tail_filter": ("filter_only", "--filter.by", "tail"),
        "constant_m0": ("beta_dpo", "--schedule.m0", "0.0"),
    }
)
GONE = ("flip_weights", "flip_weights_tail")  # tried and not kept: rows, but no longer a part of the package
LOSSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"sigmoid": (), "ipo": ("--model.loss", "IPOLoss"), "simpo": ("--config", "configs/loss/simpo.yaml")}
)


@dataclass(frozen=True, order=True)
class StudyRun:
    """A cell of the design at one seed; `alpha` and `keep_ratio` vary only for β-DPO."""

    seed: int
    data: str  # a key of GAPS
    flip_rate: float
    arm: str  # a file of configs/method, or a key of OPTIONS
    beta0: float
    learning_rate: float
    loss: str = "sigmoid"  # a key of LOSSES
    alpha: float = 0.6
    keep_ratio: float = 0.8

    @property
    def name(self) -> str:
        """Return a name for rows and folders that is unique among the runs of a seed."""
        own = [f"{self.data}-{self.flip_rate:g}", self.loss, self.arm, f"beta0={self.beta0:g}"]
        own += [f"lr={self.learning_rate:g}"]
        own += [f"alpha={self.alpha:g}", f"keep={self.keep_ratio:g}"] if self.arm == "beta_dpo" else []
        return ",".join(own)

    @property
    def id(self) -> str:
        return f"{self.seed}/{self.name}"

    @property
    def folder(self) -> Path:
        """Return the log folder."""
        return FOLDER / f"seed-{self.seed}" / self.name

    @property
    def sft_model(self) -> Path:
        return sft_folder(self.seed) / "model"

    def settings(self) -> dict[str, object]:
        """Return the columns of the table that identify the run of a row."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def fit(self) -> Command:
        """Return the command that trains."""
        gap, share = GAPS[self.data]
        return [
            *("fit", "--config", "configs/quickstart.yaml", *self.arm_options(), *LOSSES[self.loss], *BASE),
            *("--model.beta0", f"{self.beta0:g}"),
            *("--model.optimizer.init_args.lr", f"{self.learning_rate:g}", "--model.name", str(self.sft_model)),
            *(("--model.reference", "frozen") if self.arm == "epsilon_dpo" else ()),  # it compares distributions
            *("--data.gap", gap, "--data.high_gap_share", f"{share:g}", "--data.flip_rate", f"{self.flip_rate:g}"),
            *("--trainer.logger.init_args.save_dir", str(self.folder.parent)),
            *("--trainer.logger.init_args.name", self.folder.name, "--seed_everything", str(self.seed)),
        ]

    def arm_options(self) -> Command:
        """Return the words that choose the arm. Raises LookupError where the package no longer has it."""
        if self.arm in GONE:
            raise LookupError(f"{self.arm} is no longer a part of the package: version 0.1 has it")
        file, *options = OPTIONS.get(self.arm, (self.arm,))
        if self.arm == "beta_dpo":
            options = ["--filter.keep_ratio", f"{self.keep_ratio:g}", "--schedule.alpha", f"{self.alpha:g}"]
        return ["--config", f"configs/method/{file}.yaml", *options]

    def samples(self, step: int) -> Path:
        """Return the file of the answers that are sampled after `step`."""
        return self.folder / f"samples-{step}.jsonl"

    def model(self, step: int) -> Path:
        return self.folder / f"model-{step}"

    def commands(self) -> list[Command]:
        """Return the arguments of all `beta-dpo` commands from the SFT model to the run's row."""
        made = [self.fit()]
        for step in STEPS:
            made += [
                ["export", str(self.folder / "checkpoints" / f"step={step}.ckpt"), str(self.model(step))],
                [
                    *("generate", str(self.model(step)), str(self.samples(step))),
                    *("--reference", str(self.sft_model), "--seed", str(self.seed), "--count", str(PROMPTS[step])),
                    *LENGTH,
                ],
            ]
        return made


def sft_folder(seed: int) -> Path:
    return FOLDER / f"seed-{seed}" / "sft"


def sft_commands(seed: int) -> list[Command]:
    """Return the commands for the SFT model of a seed and its samples, which are the rivals of every arm."""
    folder = sft_folder(seed)
    return [
        [
            *("fit", "--config", "configs/quickstart_sft.yaml", "--seed_everything", str(seed)),
            *("--trainer.logger.init_args.save_dir", str(folder.parent)),
            *("--trainer.logger.init_args.name", folder.name),
        ],
        ["export", str(folder / "checkpoints" / "last.ckpt"), str(folder / "model")],
        ["generate", str(folder / "model"), str(folder / "samples.jsonl"), "--seed", str(seed), *LENGTH],
    ]
