"""The base class of all sources of pairs, with a table per split, rank-aware loaders, and the tokenizer."""

from __future__ import annotations

import json
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial, partialmethod
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers import PreTrainedTokenizerBase

from app.core.errors import UserError
from app.method.ranges import PositiveInt, Seed, checked
from datamodules.batches import Exchange, OptimizerBatchLoader
from datamodules.describe import describe, pairs_seen, remarks, shared_prompts
from datamodules.gap_mixture import GapMixedTable, GapMixture, replaced_stream
from datamodules.ranking import Ranking, Selection
from datamodules.rewards import RewardScoring, reward_scores, rows_with_reward, with_rewards
from datamodules.sources.messages import is_transcript_prompt
from datamodules.sources.pairs import PairStream
from datamodules.table import PairTable, cached_table, joined
from datamodules.tokenisation import Tokenisation, stop_ids, tokenizer_files

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test", "predict"]
# the splits that each Lightning stage reads
SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


@checked
class PairDataModule(LightningDataModule):
    """A DataModule with loaders of optimizer batches over tables of tokenised pairs.

    Args:
        batch_size: pairs per optimizer step, over all ranks.
        micro_batch_tokens: limit of tokens, padding included, in one forward pass of a rank.
        seed: seed of the order of the pairs; none takes the run's `seed_everything`.
        gap_mixture: replaces a share of the rejected responses of the training pairs by samples.
        reward_model: scores the training pairs; the rewards become labels, for `ExplicitRewardGap`.
        select: the share of the training pairs to keep, by a score.
        order: the order of the training pairs, by a score; none shuffles every epoch.
    """

    tokenisation = Tokenisation()
    mixed = False  # whether the pairs are named by their sources

    def __init__(
        self,
        batch_size: PositiveInt = 64,
        micro_batch_tokens: PositiveInt = 8192,
        seed: Seed | None = None,
        gap_mixture: GapMixture | None = None,
        reward_model: RewardScoring | None = None,
        select: Selection | None = None,
        order: Ranking | None = None,
    ):
        super().__init__()
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.gap_mixture = gap_mixture
        self.reward_model = reward_model
        self.select, self.order = select, order
        self.notes: dict[Split, list[str]] = {}  # what left out or ordered the pairs of a split
        self._tables: dict[Split, tuple[PairTable, np.ndarray]] = {}
        self._prepared: dict[Split, tuple[PairTable, np.ndarray] | None] = {}
        self.used_by: LightningModule | None = None  # the stage, where there is no trainer

    @property
    def module(self) -> LightningModule | None:
        """Return the stage that uses the pairs."""
        return self.trainer.lightning_module if self.trainer else self.used_by

    @cached_property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of this data."""

    @abstractmethod
    def streams(self, split: Split) -> Sequence[PairStream] | None:
        """Return the pairs from which a split is taken, one stream per source; None if the split does not exist."""

    def rows_of(self, table: PairTable, split: Split) -> np.ndarray:
        """Return the rows of the table of all streams that belong to the split."""
        return np.arange(len(table))

    def open_table(self, split: Split) -> tuple[PairTable, np.ndarray] | None:
        """Return the table of a split (from the cache if it is built) and its rows that belong to the split."""
        streams = self.streams(split)
        if streams is None:
            return None
        trained_on = split == "train" and self.need_rejected
        table = self.open_streams(streams, trained_on)
        notes = self.notes[split] = []
        rows = self.rows_of(table, split)
        if self.reward_model is not None and trained_on:
            rows, told = rows_with_reward(table, rows)
            notes += told
        if split == "train":
            for ranking in filter(None, (self.select, self.order)):
                rows, note = ranking.apply(table, rows)
                notes.append(note)
            if not self.need_rejected:
                unused = (name for name in ("gap_mixture", "reward_model") if getattr(self, name))
                notes += [f"data.{name} has no effect on supervised fine-tuning" for name in unused]
        if self.gap_mixture is None or not self.need_rejected or split not in ("train", "predict"):
            return table, rows
        samples = [replaced_stream(stream, self.gap_mixture.samples) for stream in streams]
        replaced = self.open_streams(samples, trained_on)
        return GapMixedTable(table, replaced, self.gap_mixture, rows), rows

    def open_streams(self, streams: Sequence[PairStream], trained_on: bool) -> PairTable:
        """Return the pairs of all streams, with rewards if `trained_on` and a reward model is set."""
        tables = []
        for stream in streams if self.need_rejected else [stream.demonstrations() for stream in streams]:
            table = cached_table(stream, self.tokenizer, self.tokenisation)
            if self.reward_model is not None and trained_on:
                device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
                table = with_rewards(table, reward_scores(stream, self.reward_model, device))
            tables.append(table.named(stream.name) if self.mixed else table)
        return joined(tables)

    @property
    def stop_ids(self) -> list[int]:
        """Return the ids that end a response: the end-of-turn of the chat template and the tokenizer's EOS."""
        return stop_ids(self.tokenizer, self.tokenisation)

    @property
    def need_rejected(self) -> bool:
        """Return whether the stage trains on both sides of a pair, so that a single response is a bad row."""
        return "rejected" in getattr(self.module, "responses", ("rejected",))

    def shown(self, table: PairTable, row: int) -> list[str]:
        """Return a pair as the stage trains on it, in lines with quoted texts, which show line breaks and ends."""
        if isinstance(table, GapMixedTable):
            (row,) = table.exchange(np.array([row]), epoch=0, number=0).tolist()
        (pair_id,) = table.pair_ids([row])
        lines = [f"pair {pair_id}"]
        for side, ids in table[row]._asdict().items():
            if ids is None:
                continue
            text, last = (json.dumps(self.tokenizer.decode(some), ensure_ascii=False) for some in (ids, ids[-1:]))
            lines.append(f"  {side:<9}{len(ids):>5} tokens  {text}")
            if side != "prompt":
                ended = int(ids[-1]) in self.stop_ids
                lines[-1] += f"  trained up to {last}" + ("" if ended else ": it has no end, for it was cut")
        return lines

    def prepare_data(self) -> None:
        # once per node, so that one rank tokenises and the others open the cache; its `setup` reads nothing again
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        self._prepared = {split: self.open_table(split) for split in SPLITS[self.trainer.state.fn.value]}

    @property
    def run_seed(self) -> int:
        """Return `seed`, or the run's `seed_everything` if it is None."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def setup(self, stage: str) -> None:
        for split in SPLITS[stage]:
            if (opened := self._prepared.pop(split, None) or self.open_table(split)) is None:
                continue
            self._tables[split] = opened
            table, rows = opened
            for line in describe(table, rows) + self.notes[split]:
                rank_zero_info(f"{split}: {line}")
            if split == "train":
                rank_zero_info("\n".join(["the first pair as it is trained:", *self.shown(table, int(rows[0]))]))
            # in separate rows a pair takes twice its longer row, which is at most twice its packed length
            if 2 * (longest := table.longest(rows)[0]) > self.micro_batch_tokens:
                raise UserError(
                    f"data.micro_batch_tokens is {self.micro_batch_tokens}, but the longest pair needs up to "
                    f"{2 * longest}: raise it, or lower data.max_length."
                )
            self._tell(split)

    @rank_zero_only
    def _tell(self, split: Split) -> None:
        """Log anomalies in the pairs of a split."""
        found = remarks(*self._tables[split], self.tokenisation.max_length, split == "train")
        if split != "train" and "train" in self._tables:
            shared = shared_prompts(self._tables["train"], self._tables[split])
            found += [(logging.WARNING, shared)] if shared else []
        for level, said in found:
            log.log(level, "%s: %s", split, said)

    @rank_zero_only
    def tell_pairs_seen(self) -> None:
        """Log how many training pairs a new run will see; of a resumed one the loader says where it resumes."""
        assert self.trainer is not None
        seen, all_of_them = pairs_seen(len(self._tables["train"][1]), self.batch_size, self.trainer)
        log.log(logging.INFO if all_of_them else logging.WARNING, "train: %s", seen)

    def loader(self, split: Split) -> OptimizerBatchLoader | list:
        if split not in self._tables:
            return []  # Lightning takes an empty list as no validation data
        table, rows = self._tables[split]
        exchange = table.exchange if isinstance(table, GapMixedTable) else None
        return self._loader(table, rows, split == "train", exchange)

    def _loader(
        self, table: PairTable, rows: np.ndarray, shuffle: bool, exchange: Exchange | None = None
    ) -> OptimizerBatchLoader:
        assert self.trainer is not None
        # only the strategy knows which ranks get the same share: those of one tensor-parallel group
        place = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return OptimizerBatchLoader(
            table,
            rows,
            batch_size=self.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            shuffle=shuffle,
            keep_order=self.order is not None,
            endless=shuffle and (isinstance(limit := self.trainer.limit_train_batches, int) or limit != 1.0),
            seed=self.run_seed,
            rank=place["rank"],
            world_size=place["num_replicas"],
            exchange=exchange,
            longest=self.longest,
        )

    @property
    def longest(self) -> tuple[int, int]:
        """Return the tokens of the stage's longest pair, and of its longest prompt with one response."""
        pairs, responses = zip(*(table.longest(rows) for table, rows in self._tables.values()), strict=True)
        return max(pairs), max(responses)

    @property
    def largest_id(self) -> int:
        """Return the largest token id in all splits of this stage."""
        return max(table.largest_id for table, _ in self._tables.values())

    def batches_of(
        self, wanted: Callable[[np.ndarray], np.ndarray], most: int | None = None
    ) -> list[OptimizerBatchLoader]:
        """Return loaders, in file order, of at most `most` pairs of the stage whose keys [n] are `wanted` [n] bool.

        Each pair comes once. Every rank forms the same batches and gets its share.
        """
        loaders: list[OptimizerBatchLoader] = []
        seen = np.zeros(0, np.int64)
        for table, served in self._tables.values():
            rows = table.reachable(served)
            keys, first = np.unique(table.keys("pair", rows), return_index=True)
            new = wanted(keys) & ~np.isin(keys, seen)
            chosen = np.sort(rows[first[new]])[: None if most is None else max(0, most - len(seen))]
            loaders.append(self._loader(table, chosen, shuffle=False))
            seen = np.concatenate([seen, keys[new]])
        return loaders

    def content(self, split: Split) -> str:
        """Return a hash of the tokens of the pairs that a split may serve, in their order."""
        return self._tables[split][0].content(self._tables[split][1])

    def pair_texts(self, pair_ids: list[str]) -> dict[str, dict[str, str]]:
        """Return prompt, chosen and rejected text of training pairs by pair id, without special tokens."""
        table, texts = self._tables["train"][0], dict[str, dict[str, str]]()
        plain = partial(self.tokenizer.decode, skip_special_tokens=True)
        rows = pc.index_in(pa.array(pair_ids, pa.string()), value_set=table.columns.column("pair_id")).to_pylist()
        for pair_id, row in zip(pair_ids, rows, strict=True):
            sides = table[row]._asdict()
            texts[pair_id] = {side: str(plain(ids)).strip() for side, ids in sides.items() if ids is not None}
        return texts

    train_dataloader = partialmethod(loader, "train")
    val_dataloader = partialmethod(loader, "validation")
    test_dataloader = partialmethod(loader, "test")
    predict_dataloader = partialmethod(loader, "predict")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # the stage moves one micro-batch at a time

    def state_dict(self) -> dict[str, Any]:
        """Return the tokenizer files, so that a checkpoint can be exported without the folder of its run."""
        return {"tokenizer_files": tokenizer_files(self.tokenizer), "plain_dialogue": self.plain_dialogue}

    @cached_property
    def plain_dialogue(self) -> bool:
        """Return whether the first hundred training prompts are HH transcripts that bypassed the chat template."""
        if self.tokenisation.chat_template is True or "train" not in self._tables:
            return False
        table, rows = self._tables["train"]
        prompts = [str(self.tokenizer.decode(table[int(row)].prompt)) for row in rows[:100]]
        return all(is_transcript_prompt(prompt) for prompt in prompts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["tokenizer_files"] != tokenizer_files(self.tokenizer):
            raise UserError("The checkpoint was trained with another tokenizer: check data.tokenizer.")
