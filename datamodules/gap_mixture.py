"""Gap mixtures: samples replace a share of the rejected responses, for a wider gap to the chosen one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.core.errors import UserError
from app.core.files import file_hash
from app.core.samples import read_samples
from app.method.ranges import Seed, Share, checked
from datamodules.records import PreferencePair, RowReport, blank, read_prompt
from datamodules.sources.messages import prompt_key
from datamodules.sources.pairs import PairStream
from datamodules.table import PairTable, joined


@checked
@dataclass(frozen=True)
class GapMixture:
    """The settings of a gap mixture (`data.gap_mixture`): samples, say of the SFT model, as rejected responses.

    The draw depends on `seed`, not on the run's seed, and is nested: share 0.2 replaces every pair that share 0.1
    replaces. The label `replaced` marks the replaced pairs.

    Args:
        samples: the file that `beta-dpo generate` wrote for the prompts of the training pairs.
        share: share of the pairs (or batches) whose rejected response is replaced by a sample.
        unit: `pair` draws each pair by itself, once for all epochs; `batch` draws whole optimizer batches.
        on_missing: for a drawn pair without a usable sample: `error` stops the run, `keep` keeps its own
            response and counts it.
        seed: seed of the draw.
    """

    samples: str
    share: Share
    unit: Literal["pair", "batch"] = "pair"
    on_missing: Literal["error", "keep"] = "error"
    seed: Seed = 0

    def draws_pair(self, pair_id: str) -> bool:
        """Return whether this pair is replaced, if the unit is the pair."""
        digest = hashlib.blake2b(f"{self.seed}:{pair_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.share * 2**64


def replaced_stream(stream: PairStream, path: str) -> PairStream:
    """Return the pairs that have a usable sample in the file `path`, with it as their rejected response.

    If a prompt has fewer samples than pairs, they are used again from the first. Labels with "rejected" in their
    name (`rejected_reward`, `score_rejected`) are no longer true and become None.
    """
    try:
        content = file_hash(path)
    except OSError as error:
        raise UserError(
            f"data.gap_mixture.samples: {path} cannot be read ({error.strerror}): `beta-dpo generate` writes it."
        ) from error

    def read(report: RowReport) -> Iterator[PreferencePair]:
        samples: defaultdict[int, list[tuple[str, bool]]] = defaultdict(list)  # by the key of the prompt
        for sample in read_samples(path):
            found = (sample["response"], sample["finished"])
            samples[prompt_key(read_prompt(sample["prompt"]))].append(found)
        turns = {key: cycle(found) for key, found in samples.items()}
        for pair in stream:
            report.counts["rows"] += 1
            key = prompt_key(pair.prompt)
            if key not in turns:
                report.note("skipped: no sample for the prompt", pair.pair_id)
                continue
            response, ends = next(turns[key])
            if blank(response):
                report.note("skipped: the sample is empty", pair.pair_id)
            elif response.strip() == pair.chosen.strip():
                report.note("skipped: the sample is the chosen response", pair.pair_id)
            else:
                report.counts["pairs"] += 1
                labels = {name: None if "rejected" in name else value for name, value in pair.labels.items()}
                yield replace(pair, rejected=response, labels=labels, rejected_ends=ends)
        if not report.counts["pairs"]:
            raise UserError(
                f"data.gap_mixture: {path} has no usable sample for any training pair ({report.summary()}): run "
                "`beta-dpo generate` on the prompts of these pairs."
            )

    return PairStream(stream.name, lambda: {"pairs": stream.description(), "rejected": content}, read, stream.rows)


class GapMixedTable(PairTable):
    """A table of N pairs with their own rejected responses, followed by the replaced copies of those with a sample.

    A loader serves rows of the first N, of which `rows` are trained on; `exchange` puts the replaced rows in their
    place, batch by batch. Raises UserError if a sample is missing.
    """

    def __init__(self, own: PairTable, replaced: PairTable, mixture: GapMixture, rows: np.ndarray) -> None:
        marked = [table.with_labels(replaced=pa.repeat(table is replaced, len(table))) for table in (own, replaced)]
        both = joined(marked)
        super().__init__(both.columns, own.parts)
        self.kinds = both.kinds
        self.samples = replaced
        self.mixture = mixture
        ids = replaced.columns.column("pair_id").combine_chunks()
        places = pc.index_in(own.columns.column("pair_id"), value_set=ids).fill_null(-1).to_numpy().astype(np.int64)
        drawn = np.ones(len(own), dtype=bool)
        if mixture.unit == "pair":
            drawn[rows] = [mixture.draws_pair(id) for id in own.pair_ids(rows)]
        missing = rows[drawn[rows] & (places[rows] < 0)] if mixture.share else rows[:0]
        if len(missing) and mixture.on_missing == "error":
            raise UserError(
                f"data.gap_mixture: {len(missing)} pairs that are to be replaced have no usable sample in "
                f"{mixture.samples} (first: {', '.join(own.pair_ids(missing[:3]))}): sample for their prompts, or "
                "set data.gap_mixture.on_missing: keep."
            )
        # [N], the row that replaces each row; the row itself if nothing does
        self._partner = np.where(drawn & (places >= 0), len(own) + places, np.arange(len(own)))
        told = f"in a share {mixture.share:g} of the batches, all"
        if mixture.unit == "pair":
            told = f"{int((self._partner[rows] != rows).sum())} of {len(rows)}"
        self.note = f"gap mixture: {told} rejected responses replaced by samples of {mixture.samples}"
        if len(missing):
            self.note += f"; {len(missing)} without a usable sample kept theirs"

    def exchange(self, rows: np.ndarray, epoch: int, number: int) -> np.ndarray:
        """Return the rows of batch `number` of `epoch`, given its rows before the replacement."""
        draw = np.random.default_rng([self.mixture.seed, epoch, number]).random()
        if self.mixture.unit == "batch" and draw >= self.mixture.share:
            return rows
        return self._partner[rows]

    def reachable(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, np.setdiff1d(self._partner[rows], rows)])
