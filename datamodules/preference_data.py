"""The LightningDataModule for preference pairs from files and the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from app.core.errors import UserError
from app.method.ranges import FactorFromOne, PositiveInt, ShareBelowOne, checked
from datamodules.base import PairDataModule, Split
from datamodules.sources.files import LocalFiles
from datamodules.sources.formats import PreferredBy
from datamodules.sources.pairs import OnBadRow, PairStream, read_pairs
from datamodules.sources.source import RowFormat, Source
from datamodules.table import PairTable
from datamodules.tokenisation import Tokenisation, read_tokenizer


@checked
class PreferenceData(PairDataModule):
    """A DataModule with pairs from files (.jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow), folders, or a Hub id.

    Args:
        path: the training pairs; `predict` scores all of them. A pattern (`data/*.csv`) takes all matching files. A
            list mixes several sources: paths, which use the options here, or entries with the fields of
            `Source`; options that such entries have (splits, subset, format, …) are then not set here.
        validation_path: pairs for validation; none takes `validation_split` or `validation_share` of `path`.
        test_path: pairs for `test`; none takes `test_split` of `path`.
        split, validation_split, test_split: splits of a Hub id.
        subset: part of the Hub id `path`: a configuration (`alpaca-7b` of PKU-SafeRLHF) or a folder
            (`harmless-base` of Anthropic/hh-rlhf).
        revision: branch, tag or commit of the Hub id `path`.
        validation_share: share of the prompts of `path` to hold out, with all their pairs.
        tokenizer: folder or Hub id; none takes the model's (`model.name`).
        format: a name in the table of docs/data.md; `auto` detects the format of each row.
        columns: the data's name of each field: `{prompt: question, chosen: good, rejected: bad}`.
        min_score_ratio: leave out (and count) pairs of SHP whose preferred comment scores less than this many times
            the other's.
        preferred_by: the id of PKU-SafeRLHF that decides: `better` is the more helpful, `safer` the less harmful.
        on_bad_row: `error` stops at the first malformed row and names file and line; `skip` counts it.
        max_length, max_prompt_length: in tokens; a prompt is cut only if the longer response does not fit.
        prompt_truncation: the end of a cut text that is kept; whole old turns of a dialogue are cut first.
        chat_template: `auto` formats chat messages with the tokenizer's chat template and leaves text unchanged;
            true formats text and HH transcripts too.
        chat_template_kwargs: options of the template, such as `enable_thinking: false`; a row's field of this name
            overrides them.

    The other arguments are those of `PairDataModule`.
    """

    def __init__(
        self,
        path: str | Path | list[str | Source],
        validation_path: str | None = None,
        test_path: str | None = None,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        validation_share: ShareBelowOne = 0.0,
        tokenizer: str | None = None,
        format: RowFormat = "auto",
        min_score_ratio: FactorFromOne = 1.0,
        preferred_by: PreferredBy = "better",
        columns: dict[str, str] | None = None,
        on_bad_row: OnBadRow = "error",
        max_length: PositiveInt = 512,
        max_prompt_length: PositiveInt = 256,
        prompt_truncation: Literal["keep_end", "keep_start"] = "keep_end",
        chat_template: bool | Literal["auto"] = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ):
        super().__init__(**settings)
        self.validation_share = validation_share
        # of every path that is not an entry with fields of its own
        options = Source("", None, None, split, validation_split, test_split, subset, revision, format)
        self.options = replace(options, min_score_ratio=min_score_ratio, preferred_by=preferred_by, columns=columns)
        # the type of `path` includes `Path` for jsonargparse, which otherwise would read the file and take its
        # content as the value of the option, as for any option that may be an object
        self.mixed = isinstance(path, list)
        entries = path if isinstance(path, list) else [str(path)]
        self.sources = [replace(self.options, path=each) if isinstance(each, str) else each for each in entries]
        if any(isinstance(entry, Source) for entry in entries):
            for option in fields(Source)[1:]:
                if (value := getattr(self.options, option.name)) != option.default:
                    raise UserError(
                        f"data.{option.name} is {value!r}, but data.path lists several sources: give each its own, "
                        f"and set data.{option.name}: {json.dumps(option.default)}."
                    )
        else:  # paths that share a label are named whole
            labels = [source.label for source in self.sources]
            self.sources = [
                replace(source, name=source.path) if labels.count(source.label) > 1 else source
                for source in self.sources
            ]
        check_sources(self.sources)
        self.paths: dict[Split, str | None] = {"validation": validation_path, "test": test_path}
        self.tokenizer_name = tokenizer
        self.on_bad_row: OnBadRow = on_bad_row
        self.tokenisation = Tokenisation(
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            prompt_truncation=prompt_truncation,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs or {},
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        name = self.tokenizer_name or getattr(self.module, "name", None)
        if name is None:
            raise UserError("data.tokenizer is missing: give the folder or Hub id of a tokenizer.")
        # an explicit value, because transformers otherwise asks on the standard input
        trusted = self.tokenizer_name is None and getattr(self.module, "trust_remote_code", False)
        return read_tokenizer(name, "data.tokenizer" if self.tokenizer_name else "model.name", trusted)

    @property
    def held_out(self) -> bool:
        """Return whether the validation pairs are a share of the prompts of the training sources."""
        named = self.paths["validation"] or any(source.validation_split for source in self.sources)
        return self.validation_share > 0 and not named

    def sources_of(self, split: Split) -> list[Source]:
        """Return the sources of the pairs of a split."""
        if split in ("train", "predict") or (split == "validation" and self.held_out):
            return self.sources
        path, option = self.paths[split], f"{split}_split"
        if path is not None:
            named = getattr(self.options, option) or "train"
            return [replace(self.options, path=path, split=named, subset=None, revision=None)]
        return [replace(one, split=name) for one in self.sources if (name := getattr(one, option)) is not None]

    @property
    def files(self) -> list[Path]:
        """Return the files of the training pairs, which no command may replace."""
        opened = [source.open() for source in self.sources]
        return [path for one in opened if isinstance(one, LocalFiles) for path in one.places]

    def streams(self, split: Split) -> list[PairStream] | None:
        sources = self.sources_of(split)
        if not sources and split == "test":
            raise UserError("There are no test pairs: give data.test_path, or data.test_split of a Hub id.")
        if not sources and self.trainer is not None and self.trainer.state.fn == "validate":
            raise UserError("There are no validation pairs: give data.validation_path, _split or _share.")
        return [read_pairs(one, self.on_bad_row, need_rejected=self.need_rejected) for one in sources] or None

    def rows_of(self, table: PairTable, split: Split) -> np.ndarray:
        rows = np.arange(len(table))
        if self.held_out and split in ("train", "validation"):
            sides = split_by_prompt(table.keys("prompt"), self.validation_share)
            rows = sides[split == "validation"]
            self.notes[split].append(f"data.validation_share: {len(sides[1])} of {len(table)} pairs are held out")
        if split == "predict" or not self.mixed:
            return rows
        weights = {source.label: source.weight for source in self.sources if source.weight is not None}
        names = [part.source for part in table.parts]
        if not weights.keys() >= set(names):  # every source gives all its pairs
            return rows
        drawn = drawn_rows(table.part_of(rows), rows, [weights[name] for name in names], names)
        self.notes[split].append(f"data.path: the weights leave out {len(rows) - len(drawn)} of {len(rows)} pairs")
        return drawn


def check_sources(sources: Sequence[Source]) -> None:
    """Raise UserError for an empty list, a repeated label, weights for only some, or a source's own settings."""
    if not sources:
        raise UserError("data.path is an empty list: name at least one source.")
    labels = sorted(source.label for source in sources)
    if twice := [one for one, other in pairwise(labels) if one == other]:
        raise UserError(f"data.path has two sources called {twice[0]!r}: give each a name of its own.")
    if len({source.weight is None for source in sources}) > 1:
        raise UserError("data.path: give every source a weight, or none of them.")
    for source in sources:
        source.check()  # before a download


def drawn_rows(
    part_of_row: np.ndarray, rows: np.ndarray, weights: Sequence[float], names: Sequence[str]
) -> np.ndarray:
    """Return, sorted, the rows of the largest mixture with these weights that uses no pair twice.

    `part_of_row` [rows] is the source number of each row. The source with the fewest pairs for its weight gives all
    of them; a larger draw from another contains every smaller one. Raises UserError if a source would give none.
    """
    shares = np.array(weights) / sum(weights)
    counts = np.bincount(part_of_row, minlength=len(weights))
    total = float((counts / shares).min())
    wanted = np.minimum(np.round(shares * total).astype(int), counts)
    if not wanted.all():
        empty = names[int(np.argmin(wanted))]
        raise UserError(
            f"data.path: with these weights the source {empty!r} gives no pair ({total:.1f} in all): change its "
            "weight, or take it out."
        )
    chosen = []
    for number, (name, count) in enumerate(zip(names, wanted.tolist(), strict=True)):
        draws = np.random.default_rng(list(name.encode()))
        chosen.append(draws.permutation(rows[part_of_row == number])[:count])
    return np.sort(np.concatenate(chosen))


def split_by_prompt(prompt_keys: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (training, held-out) indices of N pairs, both sorted int64, with all pairs of a prompt on one side.

    Whole prompts are drawn until the held-out side has at least `share` of the pairs, the same in every run. Raises
    UserError if nothing is left to train on.
    """
    keys, prompt_of_pair, sizes = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    order = np.random.default_rng(0).permutation(len(keys))
    before = np.cumsum(sizes[order]) - sizes[order]  # pairs held out before each prompt is drawn
    held_out_prompt = np.zeros(len(keys), dtype=bool)
    held_out_prompt[order] = before < share * len(prompt_keys)
    held_out = held_out_prompt[prompt_of_pair]
    if len(prompt_keys) and held_out.all():
        raise UserError(
            f"data.validation_share: {share} takes all {len(keys)} prompts: lower it, or give more data."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
