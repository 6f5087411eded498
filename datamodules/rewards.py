"""Rewards of an external reward model: scored once per machine, in parts that a killed run resumes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from app.core.cache import cached, fingerprint
from app.core.errors import UserError
from app.core.files import Parts, atomic_file, folder_hash
from app.method.ranges import PositiveInt, checked
from datamodules.records import PreferencePair
from datamodules.reward_model import RewardModel
from datamodules.sources.reader import PairStream
from datamodules.table import PairTable
from datamodules.table_writer import read_rows, write_rows

log = logging.getLogger(__name__)

REWARDS_VERSION = 2  # raise when scoring or the layout below changes
COLUMNS = ("chosen_reward", "rejected_reward")
_FILES = ("rewards.arrow", "rewards.json")
_PAIRS_PER_PART = 256
_SCHEMA = pa.schema([("pair_id", pa.string()), *((name, pa.float64()) for name in COLUMNS)])
Rewards = tuple[float | None, float | None]  # of the chosen and the rejected response


@checked
@dataclass(frozen=True)
class RewardScoring:
    """The reward model that scores the pairs that are trained on (`data.reward_model`).

    Args:
        name: folder or Hub id of a sequence classifier with one output. It reads prompt and response in its
            tokenizer's chat template, or as a pair of texts if there is none.
        batch_size: texts per forward pass.
        max_length: most tokens of a text; longer ones are cut at the front and counted. Default: the model's limit.
    """

    name: str
    batch_size: PositiveInt = 32
    max_length: PositiveInt | None = None

    def fingerprint(self) -> dict[str, object]:
        """Return the model's part of the cache key: a folder's content hash or a Hub commit, and `max_length`."""
        if Path(self.name).is_dir():
            return {"model": folder_hash(self.name), "max_length": self.max_length}
        try:
            commit = AutoConfig.from_pretrained(self.name, trust_remote_code=False)._commit_hash
        except (OSError, ValueError) as error:
            raise UserError(f"There is no reward model at {self.name!r}: {str(error).splitlines()[0]}") from error
        return {"model": [self.name, commit], "max_length": self.max_length}


def reward_scores(stream: PairStream, scoring: RewardScoring, device: torch.device) -> pa.Table:
    """Return the rewards of all pairs of `stream`: `pair_id, chosen_reward, rejected_reward`, mapped into memory.

    A pair whose prompt the model's chat template refuses has null rewards. If the cache has no entry, or a damaged
    one, one process scores the pairs while the others wait. Raises UserError for faults of the model or the data.
    """
    job = {"version": REWARDS_VERSION, "data": dict(stream.description), **scoring.fingerprint()}

    def build(folder: Path) -> None:
        parts = Parts(folder.with_suffix(".parts"), job)
        _score_parts(stream, scoring, device, parts)
        batches = (json.loads(path.read_text(encoding="utf-8")) for path in parts)
        write_rows(folder, _FILES, _SCHEMA, batches, {})
        parts.remove()

    return cached("rewards", fingerprint(job), lambda folder: read_rows(folder, _FILES, _SCHEMA)[0], build)


def _score_parts(stream: PairStream, scoring: RewardScoring, device: torch.device, parts: Parts) -> None:
    """Score the pairs that no finished part contains."""
    done = len(parts)
    log.info("scoring %s with %s%s", stream.name, scoring.name, f", from part {done} on" if done else "")
    model = RewardModel(scoring.name, scoring.batch_size, str(device), scoring.max_length)
    pairs = iter(stream.read())
    scored = sum(1 for _ in islice(pairs, done * _PAIRS_PER_PART))
    with tqdm(desc="scoring", unit=" pairs", initial=scored, disable=None) as progress:
        while batch := list(islice(pairs, _PAIRS_PER_PART)):
            rows = [(pair.pair_id, *both) for pair, both in zip(batch, _rewards(model, batch), strict=True)]
            with atomic_file(parts.path(done)) as temporary:
                temporary.write_text(json.dumps(rows), encoding="utf-8")
            done += 1
            progress.update(len(batch))
    if model.truncated:
        log.warning("%s: %d texts cut to their last %d tokens", model.name, model.truncated, model.limit)


def _rewards(model: RewardModel, pairs: Sequence[PreferencePair]) -> list[Rewards]:
    """Return the rewards of each pair. Raises UserError for a reward that is not finite."""
    taken = [pair for pair in pairs if model.takes(pair.prompt)]
    texts = [(pair.prompt, response or "") for pair in taken for response in (pair.chosen, pair.rejected)]
    found = [0.0] * len(texts)
    # texts of similar length need little padding
    order = sorted(range(len(texts)), key=lambda index: (len(str(texts[index])), index))
    for start in range(0, len(order), model.batch_size):
        batch = order[start : start + model.batch_size]
        for index, reward in zip(batch, model.batch_rewards([texts[i] for i in batch]), strict=True):
            if not math.isfinite(reward):
                raise UserError(
                    f"{model.name} gives pair {taken[index // 2].pair_id} the reward {reward}: leave it out."
                )
            found[index] = reward
    both: Iterator[Rewards] = iter(zip(found[::2], found[1::2], strict=True))
    ids = {pair.pair_id for pair in taken}
    return [next(both) if pair.pair_id in ids else (None, None) for pair in pairs]


def with_rewards(table: PairTable, rewards: pa.Table) -> PairTable:
    """Return the table of one source with the labels `chosen_reward` and `rejected_reward`, null without a score.

    `rewards` has the columns `pair_id` and these two for every pair of the table, in any order.
    """
    places = pc.index_in(table.columns.column("pair_id"), value_set=rewards.column("pair_id").combine_chunks())
    if places.null_count:
        raise ValueError(f"{places.null_count} pairs were not scored")
    found = table.with_labels(**{name: rewards.column(name).take(places) for name in COLUMNS})
    unscored = found.columns.column(COLUMNS[0]).null_count
    return PairTable(found.columns, found.kinds, [part._replace(unscored=unscored) for part in found.parts])


def rows_with_reward(table: PairTable, rows: np.ndarray) -> np.ndarray:
    """Return those `rows` that have rewards, or all if none was to be scored. Raises UserError if none remains."""
    if COLUMNS[0] not in table.columns.column_names:
        return rows
    kept = rows[table.columns.column(COLUMNS[0]).is_valid().to_numpy()[rows]]
    if len(rows) and not len(kept):
        raise UserError(
            "data.reward_model: its chat template refuses the prompts of all pairs: take another reward model."
        )
    return kept
