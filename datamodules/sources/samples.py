"""Lookup of the samples of `beta-dpo generate` by prompt."""

from __future__ import annotations

import json
from typing import NamedTuple

from app.samples import read_samples
from datamodules.records import Prompt, read_prompt
from datamodules.sources.prompts import prompt_key


class Sample(NamedTuple):
    """A sampled response; `finished` says whether it ended before its length limit."""

    response: str
    finished: bool


class SampleFile:
    """The samples of a file, of which memory holds only the positions."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._places: dict[int, list[int]] = {}  # byte offsets of the samples of each prompt, by its key
        for place, row in read_samples(path):
            self._places.setdefault(prompt_key(read_prompt(row["prompt"])), []).append(place)

    def of_prompt(self, prompt: Prompt, turn: int) -> Sample | None:
        """Return the sample for the pair with number `turn` (from 0) of this prompt; None if there is none.

        If a prompt has fewer samples than pairs, they are used again from the first.
        """
        places = self._places.get(prompt_key(prompt))
        if places is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(places[turn % len(places)])
            row = json.loads(file.readline())
        return Sample(row["response"], row.get("finished", True))
