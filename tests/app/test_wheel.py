"""The wheel holds all that the commands read: the whole way works outside the clone, from the wheel alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "lightning_modules", "datamodules", "callbacks", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(pip, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder beside an installation of the wheel; the clone is not on the path."""
    folder = tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "installed")]
    subprocess.run([*pip, str(wheel)], check=True)
    (folder / "work").mkdir()
    return folder


def beta_dpo(elsewhere: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(elsewhere / "installed"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "app.main", *words],
        cwd=elsewhere / "work",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    names = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(names.stdout.splitlines()) <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_recipes_and_shapes_are_found_by_name(elsewhere: Path) -> None:
    where = beta_dpo(elsewhere, "fit", "--config", "quickstart", "--config=method/dpo", "--print_config")
    assert "class_path: lightning_modules.PreferenceOptimization" in where
    shape = ("--shape", "EleutherAI/pythia-410m")
    plan = beta_dpo(elsewhere, "plan", "--config", "configs/hh_pythia.yaml", "--devices_per_node", "1", *shape)
    assert "micro_batch_tokens" in plan


@pytest.mark.slow
def test_the_quickstart_runs_in_an_empty_folder(elsewhere: Path) -> None:
    told = beta_dpo(elsewhere, "quickstart", "--out", "here")
    assert "samples: win rate over" in told
    work = elsewhere / "work"
    assert sorted(path.name for path in work.iterdir()) == ["here"]
    assert (work / "here" / "report.html").stat().st_size > 50_000
    assert (work / "here" / "dpo" / "samples.jsonl").exists()
