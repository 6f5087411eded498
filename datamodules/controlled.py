"""The controlled preference task as a LightningDataModule: generated, tokenised and cached on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from app.method.ranges import PositiveInt, Share, checked
from datamodules.base import PairDataModule, Split
from datamodules.controlled_task import Gap, build_tokenizer, demonstrations, preference_pairs
from datamodules.records import PreferencePair
from datamodules.sources.pairs import PairStream

# raise when the generator's output changes, so that no older cached table is used
GENERATOR_VERSION = 1


@checked
class ControlledTask(PairDataModule):
    """A data module of dialogues whose responses have a known true reward (see `datamodules.controlled_task`).

    Validation and test pairs have prompts that training never sees, and their labels are not flipped.

    Args:
        stage: `demonstrations` of mixed quality for SFT, or `preferences`.
        pairs: training items to generate.
        validation_pairs, test_pairs: held-out items.
        flip_rate: share of training pairs whose label is swapped.
        broken_share: share of pairs of a well-formed and a broken response.
        gap: distance between the two grades of the other pairs.
        high_gap_share: with gap `mixed`, the share at least two grades apart.

    The other arguments are those of `PairDataModule`.
    """

    def __init__(
        self,
        stage: Literal["demonstrations", "preferences"] = "preferences",
        pairs: PositiveInt = 6400,
        validation_pairs: PositiveInt = 512,
        test_pairs: PositiveInt = 1024,
        flip_rate: Share = 0.15,
        broken_share: Share = 0.2,
        gap: Gap = "extreme",
        high_gap_share: Share = 0.5,
        **settings: Any,
    ):
        super().__init__(**settings)
        self.stage = stage
        self.counts = {"train": pairs, "validation": validation_pairs, "test": test_pairs}
        self.flip_rate = flip_rate
        self.settings = {"broken_share": broken_share, "gap": gap, "high_gap_share": high_gap_share}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return build_tokenizer()

    def streams(self, split: Split) -> list[PairStream]:
        split = "train" if split == "predict" else split
        training = split == "train"
        settings: dict[str, object] = {
            "count": self.counts[split],
            # each split has its own seed, so that validation and test draw different held-out prompts
            "seed": self.run_seed * 3 + list(self.counts).index(split),
            "split": "train" if training else "held_out",
        }
        generate: Callable[..., list[PreferencePair]] = demonstrations
        if self.stage == "preferences":
            settings |= {"flip_rate": self.flip_rate if training else 0.0, **self.settings}
            generate = preference_pairs
        source = {"generator": f"controlled task {GENERATOR_VERSION}", "stage": self.stage, **settings}
        return [PairStream("controlled task", lambda: source, lambda _: generate(**settings))]
