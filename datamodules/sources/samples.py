"""Lookup by prompt of the samples that `beta-dpo generate` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import UserError
from datamodules.records import Prompt, read_prompt
from datamodules.sources.prompts import prompt_key


class Sample(NamedTuple):
    """A sampled response; `finished` says whether it ended before its length limit."""

    response: str
    finished: bool


class SampleFile:
    """The samples of a file. Memory holds only the position of each, little more than 8 bytes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._places: dict[int, list[int]] = {}  # the samples of a prompt, by its key, as places in the file
        for place, row in sample_lines(path):
            self._places.setdefault(prompt_key(row["prompt"]), []).append(place)

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


def sample_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place in the file in bytes, row) of every sample, its prompt as text or messages.

    Raises UserError, naming the line, for anything that `beta-dpo generate` does not write.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}: write it with `beta-dpo generate`.")
    place = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                prompt, response = row["prompt"], row["response"]
                if not isinstance(response, str):
                    raise TypeError
                row["prompt"] = read_prompt(prompt)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number} is not a sample as `beta-dpo generate` writes it; sample anew."
                ) from error
            yield place, row
            place += len(line)
