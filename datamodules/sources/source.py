"""A source of pairs: where its rows are, how they are read, and opening it: files, a folder or a Hub id."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any

from app.core.errors import UserError, suggestion
from app.method.ranges import FactorFromOne, PositiveFloat, checked
from datamodules.sources.files import ROWS_PER_BATCH, LocalFiles, arrow_rows, readable
from datamodules.sources.formats import FIELDS, NAMES, PreferredBy
from datamodules.sources.messages import TEMPLATE_FIELDS

log = logging.getLogger(__name__)

_COLUMNS = {*FIELDS, *TEMPLATE_FIELDS, "pair_id", "chosen_reward", "rejected_reward"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# files of a dataset that hold no rows
_NO_ROWS = {"README.md", "LICENSE", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
OF_FORMATS = {"min_score_ratio": "shp", "preferred_by": "pku_saferlhf"}  # option → the format that it is for
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
        if not self.path:
            raise UserError("data.path is empty: give a file, folder or Hub id.")
        if self.format not in ("auto", *NAMES):
            known = f"known are auto, {', '.join(NAMES)}.{suggestion(self.format, NAMES)}"
            raise UserError(f"data.format: there is no {self.format!r}; {known}")
        for name, its in OF_FORMATS.items():
            if getattr(self, name) != getattr(Source, name) and self.format not in ("auto", its):
                raise UserError(f"data.{name} belongs to data.format {its}, not to {self.format}: leave it out.")
        columns = self.columns or {}
        for name in columns:
            if name not in _COLUMNS:
                how = "a column is given as `field: name in the data`, as in data.columns: {prompt: question}."
                raise UserError(
                    f"data.columns: there is no field {name!r}; {how}{suggestion(name, sorted(_COLUMNS))}"
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
        files = [local]
        if has_magic(self.path) and not local.exists():
            files = [Path(name) for name in sorted(glob(str(local), recursive=True))]
            refuse_dead_links(files)
            files = [path for path in files if path.is_file()]
        if not files or not files[0].exists():
            may_be_id = not readable(local) and not Path(self.path).parent.is_dir()
            if may_be_id and _HUB_ID.fullmatch(self.path):
                return HubDataset(self.path, self.split, self.subset, self.revision)
            beside = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
            cure = f"check the path that you gave. A Hub id is `owner/name`.{suggestion(local.name, beside)}"
            raise UserError(f"There is no file or folder {self.path!r}: {cure}")
        if self.revision is not None:
            raise UserError(f"{self.path} is on this machine and has no revision: leave out data.revision.")
        if local.is_dir():
            return folder_source(local, self.split, self.subset)
        for name in ("split", "subset"):
            if (value := getattr(self, name)) != getattr(Source, name):
                raise UserError(
                    f"{self.path} is one file without splits or subsets: leave out the {name} {value!r} or give a "
                    "Hub id."
                )
        return LocalFiles(files)


class HubDataset:
    """One split of a dataset that `datasets` can load without running the dataset's code."""

    def __init__(self, path: str, split: str, subset: str | None = None, revision: str | None = None) -> None:
        self.name = Path(path).name if Path(path).is_dir() else path
        part = f"split {split!r}"
        if subset is not None:
            self.name += f"/{subset}"
            part = f"subset {subset!r}, {part}"
        try:
            self._dataset = _loaded(path, split, subset, revision)
        except UserError:
            raise
        except Exception as error:  # errors of `datasets` have no common class: network, access, split, format
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"The dataset {path!r}, {part}, cannot be loaded ({type(error).__name__}: {reason}): "
                "check data.path, data.subset and the split, or give a local file."
            ) from error

    def fingerprint(self) -> str:
        """Return the fingerprint of the loaded split by `datasets`; it changes with the files or the revision."""
        return str(self._dataset._fingerprint)

    def count(self) -> int:
        return len(self._dataset)

    def rows(self) -> Iterator[tuple[str, object]]:
        """Yield (name and row number from 1, fields of the row)."""
        tables = self._dataset.with_format("arrow").iter(ROWS_PER_BATCH)
        batches = chain.from_iterable(table.to_batches() for table in tables)
        yield from ((f"{self.name}:{number}", row) for number, row in arrow_rows(batches))


def folder_source(folder: Path, split: str, subset: str | None) -> HubDataset | LocalFiles:
    """Return one split of a local folder, whose files our own readers read. Raises UserError.

    `datasets` loads a folder that `save_to_disk` wrote, one with a data card (a README.md with front matter), a
    subset, and a folder without a file of a known kind.
    """
    card = folder / "README.md"
    has_card = card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith("---")
    if subset is not None or _is_saved(folder) or has_card:
        return HubDataset(str(folder), split, subset)
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = folder.absolute()
    try:  # `datasets` decides by the names which file belongs to which split
        found = DataFilesDict.from_patterns(get_data_patterns(str(base)), base_path=str(base))
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise UserError(f"The folder {folder} holds no file: check data.path.") from error
    everything = sorted(base.rglob("*"))
    refuse_dead_links(everything)
    files = {
        str(name): sorted(path for path in set(map(Path, paths)) if readable(path) and path.name not in _NO_ROWS)
        for name, paths in found.items()
    }
    if not any(files.values()):
        return HubDataset(str(folder), split)
    if not files.get(split):
        names = ", ".join(name for name, paths in files.items() if paths)
        raise UserError(f"The folder {folder} has no split {split!r}: its files make {names}.")
    used = {path for paths in files.values() for path in paths}
    present = [path for path in everything if path.is_file() and not path.name.startswith(".")]
    if left_out := [path.name for path in present if path not in used and path.name not in _NO_ROWS]:
        log.warning("%s: left out, of no split or no known kind: %s", folder, ", ".join(left_out))
    return LocalFiles(files[split], base.name)


def refuse_dead_links(paths: Iterable[Path]) -> None:
    """Raise UserError for a link to a file of rows that is not there, which would else be missing from the data."""
    for path in paths:
        if readable(path) and path.is_symlink() and not path.exists():
            target = path.readlink()
            raise UserError(f"{path} is a link to {target}, which is not there: fetch it, or remove the link.")


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _loaded(path: str, split: str, subset: str | None, revision: str | None) -> Any:
    """Return a split of a Hub id or a folder; of a single saved dataset, `train` or the split it names itself."""
    import datasets  # takes two seconds, which a local file does not need

    if _is_saved(Path(path)):
        found = datasets.load_from_disk(path)
        if not isinstance(found, datasets.DatasetDict):
            found = {"train": found, str(found.split): found}
        if split not in found:
            raise UserError(f"The dataset in {path} has no split {split!r}, only {', '.join(found)}.")
        return found[split]
    part = {}
    if subset is not None:  # PKU-SafeRLHF declares its subsets; those of hh-rlhf, SHP and others are mere folders
        declared = datasets.get_dataset_config_names(path, revision=revision)
        part = {"name" if subset in declared else "data_dir": subset}
    return datasets.load_dataset(path, split=split, revision=revision, **part)
