"""The same command gives the same run to the byte, and a run's record is enough to repeat it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command_runs import assert_same_run, command, fresh_command, write_config

from app.cli.options import settled_seed
from app.core.errors import UserError
from app.method.ranges import LARGEST_SEED

RUN = Path("runs") / "run"
SHORT = ("--trainer.max_steps", "6")


@pytest.fixture(autouse=True, scope="module")
def fresh_environment() -> Iterator[None]:
    """Without what other tests in this process, or the machine, may have set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "WORLD_SIZE", "SLURM_NTASKS"):
            patch.delenv(name, raising=False)
        yield


def fit(folder: Path, model: str, *options: str, config: str = "config.yaml") -> subprocess.CompletedProcess[str]:
    if config == "config.yaml":
        write_config(folder, model)
    done = command(folder, "fit", "--config", config, *SHORT, *options)
    assert done.returncode == 0, done.stderr
    return done


def audit_files(folder: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in (folder / RUN / "audit").iterdir()}
    assert len(files) == 3  # six steps, a checkpoint every two
    return files


def recorded_seed(folder: Path) -> object:
    return yaml.safe_load((folder / RUN / "config.yaml").read_text(encoding="utf-8"))["seed_everything"]


@pytest.fixture(scope="module")
def seeded(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with seed 1."""
    folder = tmp_path_factory.mktemp("seeded")
    done = fit(folder, tiny_llama)
    assert "Seed set to 1" in done.stderr
    assert recorded_seed(folder) == 1
    return folder


def test_the_same_command_twice_gives_the_same_bytes(seeded: Path, tiny_llama: str, tmp_path: Path) -> None:
    fit(tmp_path, tiny_llama)
    assert audit_files(seeded) == audit_files(tmp_path)
    assert_same_run(seeded / RUN, tmp_path / RUN)


@pytest.mark.parametrize(
    "given", ["null", pytest.param("true", marks=pytest.mark.slow), pytest.param("absent", marks=pytest.mark.slow)]
)
def test_a_picked_seed_is_recorded_and_repeats_the_run(
    given: str, seeded: Path, tiny_llama: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    if given == "absent":
        write_config(first, tiny_llama)
        config = yaml.safe_load((first / "config.yaml").read_text(encoding="utf-8"))
        del config["seed_everything"]
        (first / "absent.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        done = fit(first, tiny_llama, config="absent.yaml")
    else:
        done = fit(first, tiny_llama, "--seed_everything", given)
    seed = recorded_seed(first)
    assert type(seed) is int
    assert f"seed_everything: picked {seed}" in done.stderr
    assert f"Seed set to {seed}" in done.stderr
    second.mkdir()
    fit(second, tiny_llama, config=str(first / RUN / "config.yaml"))
    assert audit_files(first) == audit_files(second)
    # and not for want of anything that the seed decides
    assert audit_files(first) != audit_files(seeded)


def test_an_evaluation_leaves_the_record_of_the_training(seeded: Path) -> None:
    before = (seeded / RUN / "config.yaml").read_bytes()
    done = command(seeded, "test", "--config", "config.yaml", "--seed_everything", "8")
    assert done.returncode == 0, done.stderr
    assert (seeded / RUN / "config.yaml").read_bytes() == before
    record = yaml.safe_load((seeded / RUN / "config-test.yaml").read_text(encoding="utf-8"))
    assert record["seed_everything"] == 8
    # the commands stand one below the other, each as it was given
    *_, last = (seeded / RUN / "commands.txt").read_text(encoding="utf-8").splitlines()
    assert last == "beta-dpo test --config config.yaml --seed_everything 8"


@pytest.mark.slow
def test_every_rank_gets_the_seed_that_the_first_one_picked(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    options = ("--seed_everything", "null", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    done = fresh_command(tmp_path, "fit", "--config", "config.yaml", *SHORT, *options)
    assert done.returncode == 0, done.stderr
    seed = recorded_seed(tmp_path)
    assert re.findall(r"\[rank: (\d)\] Seed set to (\d+)", done.stderr + done.stdout)
    assert set(re.findall(r"Seed set to (\d+)", done.stderr + done.stdout)) == {str(seed)}


def test_two_picks_differ() -> None:
    assert settled_seed(None) != settled_seed(True)


def test_a_given_seed_stays() -> None:
    for seed in (0, 1, 42, LARGEST_SEED):
        assert settled_seed(seed, resumes=True, nodes=9) == seed


def test_a_rank_takes_the_seed_that_was_handed_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "123")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settled_seed(None, resumes=True) == 123
    assert settled_seed(7) == 7
    with caplog.at_level("INFO", "app"):
        settled_seed(None)
    assert "seed_everything: 123, from the environment variable PL_GLOBAL_SEED" in caplog.text
    monkeypatch.setenv("PL_GLOBAL_SEED", "none")
    with pytest.raises(UserError, match="PL_GLOBAL_SEED"):
        settled_seed(None)


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, False])
def test_no_seed_and_impossible_seeds_are_refused(seed: int) -> None:
    with pytest.raises(UserError, match="seed_everything"):
        settled_seed(seed)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_started_apart_must_be_given_one(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match="cannot agree"):
        settled_seed(None)
    monkeypatch.setenv(variable, "1")
    settled_seed(None)
    with pytest.raises(UserError, match="cannot agree"):
        settled_seed(None, nodes=2)


def test_a_run_that_may_be_resumed_must_be_given_one(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    options = ("--seed_everything", "null", "--ckpt_path", "last")
    done = command(tmp_path, "fit", "--config", "config.yaml", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("beta-dpo: --ckpt_path needs the seed of the run")
    assert len(done.stderr.splitlines()) == 1
