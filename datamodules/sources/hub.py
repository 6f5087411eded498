"""Rows of a Hugging Face dataset: a Hub id, or a local folder that `datasets` understands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from app.errors import UserError
from datamodules.sources.arrow_files import ROWS_PER_BATCH, arrow_rows
from datamodules.sources.files import LocalFiles, log, readable

# what lies beside the rows of a data set and holds none
_NO_ROWS = {"README.md", "LICENSE", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class HubDataset:
    """One split of a dataset that `datasets` can load without running code of its own."""

    def __init__(self, path: str, split: str, subset: str | None = None, revision: str | None = None) -> None:
        self.name = Path(path).name if Path(path).is_dir() else path
        chosen = f"split {split!r}"
        if subset is not None:
            self.name += f"/{subset}"
            chosen = f"subset {subset!r}, {chosen}"
        try:
            self._dataset = (
                _saved(Path(path), split) if _is_saved(Path(path)) else _loaded(path, split, subset, revision)
            )
        except UserError:
            raise
        except Exception as error:  # its failures have no common class: network, access, split, format
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"The dataset {path!r}, {chosen}, cannot be loaded ({type(error).__name__}: {reason}): "
                "check data.path, data.subset and the split, or give a local file."
            ) from error

    def fingerprint(self) -> str:
        """The fingerprint that `datasets` gives to the loaded split; changes with its files or revision."""
        return str(self._dataset._fingerprint)

    def rows(self) -> Iterator[tuple[str, object]]:
        """Yield (name and row number from 1, the row's fields)."""
        for number, row in arrow_rows(self._batches()):
            yield f"{self.name}:{number}", row

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for table in self._dataset.with_format("arrow").iter(ROWS_PER_BATCH):
            yield from table.to_batches()


def folder_source(folder: Path, split: str, subset: str | None) -> HubDataset | LocalFiles:
    """Return one split of a local folder as a source.

    A folder that `save_to_disk` wrote, one with a data card that names its files, and a subset are left to
    `datasets`; files of rows are read one by one, as any other file is. Raises UserError.
    """
    if subset is not None or _is_saved(folder) or _has_card(folder):
        return HubDataset(str(folder), split, subset)
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = str(folder.absolute())
    try:  # which file is of which split: as `datasets` tells by their names
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise UserError(f"The folder {folder} holds no file: check data.path.") from error
    files = {str(name): sorted({Path(path) for path in paths}) for name, paths in found.items()}
    given = {
        name: [path for path in paths if readable(path) and path.name not in _NO_ROWS]
        for name, paths in files.items()
    }
    if not any(given.values()):
        return HubDataset(str(folder), split)
    if not given.get(split):
        names = ", ".join(name for name, paths in given.items() if paths)
        raise UserError(f"The folder {folder} has no split {split!r}: its files make {names}.")
    used = {path for paths in given.values() for path in paths}
    present = [path for path in sorted(Path(base).rglob("*")) if path.is_file() and not path.name.startswith(".")]
    if left_out := [path.name for path in present if path not in used and path.name not in _NO_ROWS]:
        log.warning("%s: left out, of no split or no known kind: %s", folder, ", ".join(left_out))
    return LocalFiles(given[split], folder.absolute().name)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith("---")


def _saved(folder: Path, split: str) -> Any:
    """Return a split of what `save_to_disk` wrote; a single data set is `train`, or what it calls itself."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    if not isinstance(found, datasets.DatasetDict):
        found = {"train": found, str(found.split): found}
    if split not in found:
        raise UserError(f"The dataset in {folder} has no split {split!r}, only {', '.join(found)}.")
    return found[split]


def _loaded(path: str, split: str, subset: str | None, revision: str | None) -> Any:
    import datasets  # two seconds that a local file need not wait for

    part = {} if subset is None else _subset(path, subset, revision)
    return datasets.load_dataset(path, split=split, revision=revision, **part)


def _subset(path: str, subset: str, revision: str | None) -> dict[str, str]:
    """How `load_dataset` is told of a subset: by `name` where the data set declares it, else by its folder.

    Of the sets that people train on, some declare configurations (PKU-SafeRLHF), others only have folders
    (Anthropic/hh-rlhf, SHP, the parquet branch of summarize_from_feedback).
    """
    import datasets

    declared = datasets.get_dataset_config_names(path, revision=revision)
    return {"name": subset} if subset in declared else {"data_dir": subset}
