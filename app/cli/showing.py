"""The command `beta-dpo show`, which prints pairs as the run trains on them, without the model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download

from app.cli.trainer import OwnOptions, PartsCLI
from app.core.errors import refused
from app.method.ranges import NonNegativeInt
from datamodules.base import SPLITS, PairDataModule
from datamodules.describe import describe, remarks

# what a model of the Hub is read from; some repositories hold the weights a second time, in other formats
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
OPTIONS: OwnOptions = {
    "pairs": (NonNegativeInt, 3, "number of pairs to show, the first of each source in turn"),
    "prepare": (bool, False, "tokenise the validation pairs and download the model, for a run without network"),
}


def run_show(arguments: list[str]) -> None:
    """Parse the options of `fit` and `--pairs`; print the first pairs and what was cut and left out."""
    options = PartsCLI(arguments, OPTIONS).config_init["fit"]
    data: PairDataModule = options["data"]
    data.used_by = options["model"]
    print("\n".join(lines(data, options["pairs"])))
    if options["prepare"]:
        print("\n".join(prepare(data, getattr(data.module, "name", None))))


def prepare(data: PairDataModule, model: str | None) -> Iterator[str]:
    """Fill the caches of a `fit` as far as they need no device; yield a line about each part. Raises UserError."""
    for split in SPLITS["fit"]:
        if opened := data.open_table(split):
            yield f"prepared: {len(opened[1])} {split} pairs"
    if model is None or Path(model).is_dir():
        return
    with refused(f"model.name: {model!r} cannot be fetched"):  # network, access, name
        folder = snapshot_download(model, allow_patterns=list(FILES), ignore_patterns=["*/*"])
    yield f"prepared: {model} in {folder}"


def lines(data: PairDataModule, count: int) -> Iterator[str]:
    """Yield lines about the training pairs: what was read, cut and left out, then the first pairs."""
    if data.reward_model is not None:
        yield "data.reward_model is not run: the pairs that its chat template refuses are still among these"
        data.reward_model = None
    opened = data.open_table("train")
    assert opened is not None  # every source has training pairs
    table, rows = opened
    yield from (f"train: {line}" for line in (*describe(table, rows), *data.notes["train"]))
    for _, said in remarks(table, rows, data.tokenisation.max_length, trained=True):
        yield f"train: {said}"
    ends = [str(data.tokenizer.decode([end])) for end in data.stop_ids]
    yield f"a response ends, and sampling stops, at {' or '.join(ends)}"
    if data.order is None:  # the first pair of each source, then the second
        parts, turns = table.part_of(rows), np.zeros(len(rows), int)
        for part in range(len(table.parts)):
            turns[parts == part] = np.arange(np.sum(parts == part))
        rows = rows[np.argsort(turns, kind="stable")]
    for row in rows[:count].tolist():
        yield ""
        yield from data.shown(table, row)
