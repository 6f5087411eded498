"""Hugging Face datasets as a source of rows: a Hub id, or a local folder that `datasets` can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from app.errors import UserError
from datamodules.sources.files import ROWS_PER_BATCH, LocalFiles, arrow_rows, log, readable

# files of a dataset that hold no rows
_NO_ROWS = {"README.md", "LICENSE", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class HubDataset:
    """One split of a dataset that `datasets` can load without running the dataset's code."""

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
        except Exception as error:  # errors of `datasets` have no common class: network, access, split, format
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"The dataset {path!r}, {chosen}, cannot be loaded ({type(error).__name__}: {reason}): "
                "check data.path, data.subset and the split, or give a local file."
            ) from error

    def fingerprint(self) -> str:
        """Return the fingerprint of the loaded split by `datasets`; it changes with the files or the revision."""
        return str(self._dataset._fingerprint)

    def rows(self) -> Iterator[tuple[str, object]]:
        """Yield (name and row number from 1, fields of the row)."""
        for number, row in arrow_rows(self._batches()):
            yield f"{self.name}:{number}", row

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for table in self._dataset.with_format("arrow").iter(ROWS_PER_BATCH):
            yield from table.to_batches()


def folder_source(folder: Path, split: str, subset: str | None) -> HubDataset | LocalFiles:
    """Return one split of a local folder as a source.

    `datasets` loads a folder that `save_to_disk` wrote, one with a data card (a README.md with front matter), a
    subset, and a folder without a file of a known kind. Otherwise our own readers read the files one by one. Raises
    UserError.
    """
    if subset is not None or _is_saved(folder) or _has_card(folder):
        return HubDataset(str(folder), split, subset)
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = str(folder.absolute())
    try:  # `datasets` decides by the names which file belongs to which split
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
    """Return a split of a folder by `save_to_disk`; a single dataset is `train` or the split it names itself."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    if not isinstance(found, datasets.DatasetDict):
        found = {"train": found, str(found.split): found}
    if split not in found:
        raise UserError(f"The dataset in {folder} has no split {split!r}, only {', '.join(found)}.")
    return found[split]


def _loaded(path: str, split: str, subset: str | None, revision: str | None) -> Any:
    import datasets  # takes two seconds, which a local file does not need

    part = {} if subset is None else _subset(path, subset, revision)
    return datasets.load_dataset(path, split=split, revision=revision, **part)


def _subset(path: str, subset: str, revision: str | None) -> dict[str, str]:
    """Return the argument of `load_dataset` for a subset: `name` if the dataset declares it, else its folder.

    Some preference datasets declare configurations (PKU-SafeRLHF), others only have folders
    (Anthropic/hh-rlhf, SHP, the parquet branch of summarize_from_feedback).
    """
    import datasets

    declared = datasets.get_dataset_config_names(path, revision=revision)
    return {"name": subset} if subset in declared else {"data_dir": subset}
