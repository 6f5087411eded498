"""The recipes of docs/pipeline.md as commands, for every test that has something to say about each of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "pipeline.md"
ROW = re.compile(r"^\| (?P<name>[^|]+) \| (?P<cells>`.*`) \|$", re.MULTILINE)
SIZES = {"410M": " --data.batch_size 128", "1.4B": "", "2.8B": ""}  # of Pythia → what the page adds for it
BATCH_SCRIPT = "configs/slurm/train.sbatch"


@dataclass(frozen=True)
class Recipe:
    """One row of *what* on one row of *where*: `arguments` are those of `beta-dpo`, `fit` the first of them."""

    what: str
    where: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.what}, {self.where} GPU"


def recipes() -> list[Recipe]:
    """Return all of them, in the order of the page."""
    what, where = {}, {}
    _, heading, text = PAGE.read_text(encoding="utf-8").partition("\n## Recipes\n")
    assert heading, f"{PAGE} has no section Recipes"
    for row in ROW.finditer(text.partition("\n## ")[0]):
        cells = re.findall(r"`([^`]*)`", row["cells"])
        if len(cells) == 1:
            for size, more in SIZES.items() if "SIZE" in row["name"] else [("", "")]:
                what[row["name"].replace("SIZE", size)] = cells[0].replace("SIZE", size.lower()) + more
        else:
            where[row["name"]] = cells
    found = []
    for name, options in what.items():
        for place, (command, pythia, large) in where.items():
            end = pythia if name.startswith("Pythia") else large
            words = shlex.split(f"{command} {options} {end}")
            found.append(Recipe(name, place, ("fit", *words[2:]) if words[0] == "beta-dpo" else submitted(words)))
    return found


def submitted(words: list[str]) -> tuple[str, ...]:
    """What the batch script makes of `sbatch WORDS`."""
    script = words.index(BATCH_SCRIPT)
    asked = dict(word.removeprefix("--").split("=") for word in words[1:script])
    layout = ("--trainer.num_nodes", asked["nodes"], "--trainer.devices", asked["ntasks-per-node"])
    return ("fit", *words[script + 1 :], *layout)
