"""The source files that a pair crosses from its row on the disk to the optimizer step."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from lightning.pytorch import Callback
from tiny_runs import beta_dpo, preference, quiet_trainer

from datamodules import PreferenceData
from datamodules.controlled_task import prompts

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("app", "lightning_modules", "datamodules", "callbacks")
# they serve the whole project and do not look at pairs: files, locks, the cache; the ranges of options
SERVING = ("app/core/", "app/method/ranges.py")
MOST = 25


@contextmanager
def files_called(found: set[str]) -> Iterator[None]:
    """Add to `found` the source files of the project whose functions are called in the block."""

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(PACKAGES) and not name.startswith(SERVING):
                found.add(name)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


class SecondStep(Callback):
    """Trace the second optimizer step: the first checks the layout of the rows as well."""

    def __init__(self, found: set[str]) -> None:
        self.found = found

    def on_train_batch_start(self, *given: object) -> None:
        if given[-1] == 1:
            self.tracing = files_called(self.found)
            self.tracing.__enter__()

    def on_train_batch_end(self, *given: object) -> None:
        if given[-1] == 1:
            self.tracing.__exit__(None, None, None)


def test_a_pair_crosses_few_files(tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))  # so that the table is built here
    rows = [{"prompt": prompt, "chosen": " brown river", "rejected": " its home"} for prompt in prompts(16, 0)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = PreferenceData(path=str(file), batch_size=8, tokenizer=tiny_llama)
    found: set[str] = set()
    with files_called(found):
        data.open_table("train")
    quiet_trainer(tmp_path, [SecondStep(found), *beta_dpo()]).fit(preference(tiny_llama), data)

    print(f"files on the way of a pair {len(found)}, target 25: {', '.join(sorted(found))}")
    assert {"datamodules/batches.py", "lightning_modules/preference.py", "app/method/dynamic_beta.py"} <= found
    assert len(found) <= MOST
