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

# arms composed of several files, so that α and ρ can be set; each other arm is one file
PARTS = ("beta_dpo",)
DROPPED = ("flip_weights_tail",)  # arms that were tried and not kept: files of configs/study, not configs/method


@dataclass(frozen=True, order=True)
class StudyRun:
    """A cell of the design at one seed; `alpha` and `keep_ratio` vary only for β-DPO."""

    seed: int
    data: str  # a key of GAPS
    flip_rate: float
    arm: str  # one of PARTS, or a file of configs/method or (DROPPED) configs/study
    beta0: float
    learning_rate: float
    loss: str = "sigmoid"  # a file of configs/loss
    alpha: float = 0.6
    keep_ratio: float = 0.8

    @property
    def name(self) -> str:
        """Return a name for rows and folders that is unique among the runs of a seed."""
        own = [f"{self.data}-{self.flip_rate:g}", self.loss, self.arm, f"beta0={self.beta0:g}"]
        own += [f"lr={self.learning_rate:g}"]
        own += [f"alpha={self.alpha:g}", f"keep={self.keep_ratio:g}"] if self.arm in PARTS else []
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
            *("fit", "--config", "configs/study/preference.yaml", *self.arm_options()),
            *("--config", f"configs/loss/{self.loss}.yaml", "--model.beta0", f"{self.beta0:g}"),
            *("--model.optimizer.init_args.lr", f"{self.learning_rate:g}", "--model.name", str(self.sft_model)),
            *(("--model.reference", "frozen") if self.arm == "epsilon_dpo" else ()),  # it compares distributions
            *("--data.gap", gap, "--data.high_gap_share", f"{share:g}", "--data.flip_rate", f"{self.flip_rate:g}"),
            *("--trainer.logger.init_args.save_dir", str(self.folder.parent)),
            *("--trainer.logger.init_args.name", self.folder.name, "--seed_everything", str(self.seed)),
        ]

    def arm_options(self) -> Command:
        saved = ["--trainer.callbacks.every_n_steps", str(STEPS[0]), "--trainer.callbacks.keep_all", "true"]
        if self.arm not in PARTS:
            folder = "study" if self.arm in DROPPED else "method"
            return ["--config", f"configs/{folder}/{self.arm}.yaml", *saved]  # RunCheckpoint is its last callback
        return [
            *("--config", "configs/reward/implicit.yaml", *saved),
            *("--config", "configs/filter/gaussian.yaml", "--trainer.callbacks.keep_ratio", f"{self.keep_ratio:g}"),
            *("--config", "configs/schedule/batch_level.yaml", "--trainer.callbacks.alpha", f"{self.alpha:g}"),
        ]

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
            *("fit", "--config", "configs/quickstart/sft.yaml", "--seed_everything", str(seed)),
            *("--trainer.logger.init_args.save_dir", str(folder.parent)),
            *("--trainer.logger.init_args.name", folder.name),
        ],
        ["export", str(folder / "checkpoints" / "last.ckpt"), str(folder / "model")],
        ["generate", str(folder / "model"), str(folder / "samples.jsonl"), "--seed", str(seed), *LENGTH],
    ]
