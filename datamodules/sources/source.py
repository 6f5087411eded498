"""A source of pairs: where its rows are, how they are read, and opening it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob, has_magic
from pathlib import Path

from app.errors import UserError
from app.method.ranges import FactorFromOne, PositiveFloat, checked
from datamodules.sources.files import LocalFiles, readable
from datamodules.sources.hub import HubDataset, folder_source
from datamodules.sources.messages import TEMPLATE_FIELDS
from datamodules.sources.published import PreferredBy
from datamodules.sources.registry import FIELDS, NAMES

_COLUMNS = {*FIELDS, *TEMPLATE_FIELDS, "pair_id", "chosen_reward", "rejected_reward"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
RowFormat = str  # "auto", or a name in the registry


@checked
@dataclass(frozen=True)
class Source:
    """A source of pairs, and one of several: an entry of the list `data.path`.

    Args:
        path: file, pattern of files, folder or Hub id.
        weight: its share of the training pairs is this over the sum of all weights; give one to all sources or
            to none (then every pair of every source is used).
        name: label `source` and id prefix of its pairs; default: the last part of `path`, and the subset.

    The other arguments are those of `PreferenceData`, for this source alone.
    """

    path: str
    weight: PositiveFloat | None = None
    name: str | None = None
    split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    subset: str | None = None
    revision: str | None = None
    format: RowFormat = "auto"
    min_score_ratio: FactorFromOne = 1.0
    preferred_by: PreferredBy = "better"
    columns: dict[str, str] | None = None

    def check(self) -> None:
        """Raise UserError for settings that do not go together, and for unknown names."""
        if self.format not in ("auto", *NAMES):
            raise UserError(
                f"data.format: there is no {self.format!r}{close(self.format, NAMES)}; "
                f"known are auto, {', '.join(NAMES)}."
            )
        for name, its_format in {"min_score_ratio": "shp", "preferred_by": "pku_saferlhf"}.items():
            if getattr(self, name) != getattr(Source, name) and self.format not in ("auto", its_format):
                raise UserError(
                    f"data.{name} belongs to data.format {its_format}, not to {self.format}: leave it out."
                )
        columns = self.columns or {}
        for name in columns:
            if name not in _COLUMNS:
                raise UserError(
                    f"data.columns: there is no field {name!r}{close(name, _COLUMNS)}; a column is given as "
                    "`field: name in the data`, as in data.columns: {prompt: question}."
                )
        if len(set(columns.values())) < len(columns):
            raise UserError("data.columns names one column for two fields: give each field its own.")

    @property
    def label(self) -> str:
        """Return `name`, or else the last part of `path` and the subset."""
        return self.name or self.path.rstrip("/").rpartition("/")[2] + (f"/{self.subset}" if self.subset else "")

    def open(self) -> LocalFiles | HubDataset:
        """Return the rows of `split`. Raises UserError if there are none, also for a split or subset of a file."""
        self.check()
        local = Path(self.path).expanduser()
        several = glob(str(local), recursive=True) if has_magic(self.path) and not local.exists() else None
        if several is None and not local.exists() and not readable(local):
            if _HUB_ID.fullmatch(self.path) and not Path(Path(self.path).parts[0]).is_dir():
                return HubDataset(self.path, self.split, self.subset, self.revision)
            raise UserError(
                f"There is no file or folder {self.path!r}{_near(local)}: check data.path. "
                "A Hub id is `owner/name`."
            )
        if several is not None and not (several := sorted(name for name in several if Path(name).is_file())):
            raise UserError(f"No file is called {self.path}: check the pattern that you gave.")
        if several is None and not local.exists():
            raise UserError(f"There is no file {self.path}{_near(local)}: check the path that you gave.")
        for name, given in {"split": self.split != "train", "subset": self.subset}.items():
            if given and not local.is_dir():
                raise UserError(
                    f"{self.path} is one file without splits or subsets: "
                    f"leave out the {name} {getattr(self, name)!r} or give a Hub id."
                )
        if self.revision is not None:
            raise UserError(f"{self.path} is on this machine and has no revision: leave out data.revision.")
        if local.is_dir():
            return folder_source(local, self.split, self.subset)
        return LocalFiles([local] if several is None else [Path(name) for name in several])


def close(name: str, known: Iterable[object]) -> str:
    """Return " (did you mean …?)" if the name is similar to a known one, else an empty text."""
    near = get_close_matches(name, [str(one) for one in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _near(path: Path) -> str:
    return close(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
