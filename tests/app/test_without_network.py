"""What a cluster without network does: prepare, train from the caches alone, torchrun, curves on the disk."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import ROOT, audit_of, command, environment, write_config
from tiny_runs import save_tiny_model

pytestmark = pytest.mark.slow
PACKAGES = os.environ.get("LOGGERS", "")  # a folder with wandb and mlflow, which no default environment has


def hub_of(folder: Path, name: str) -> dict[str, str]:
    """A cache of the Hub with one tiny model in it, and the variables of a job that sees no network."""
    model = folder / "hf" / "hub" / f"models--{name.replace('/', '--')}"
    save_tiny_model("llama", model / "snapshots" / "0123456789abcdef")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123456789abcdef")
    return {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "BETA_DPO_CACHE": str(folder / "cache")}


def test_what_show_prepares_is_all_that_fit_needs(tmp_path: Path) -> None:
    variables = hub_of(tmp_path, "tiny/llama")
    rows = [
        {"prompt": f"colour of cat {n} ?", "chosen": f"blue {n} .", "rejected": f"the cat {n} ."} for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--config", "own_pairs", "--data.path", "pairs.jsonl", "--data.chat_template", "false"]
    options += ["--data.validation_share", "0.2", "--data.batch_size", "8", "--trainer.accelerator", "cpu"]
    shown = command(tmp_path, "show", *options, "--model.name", "tiny/llama", "--prepare", "true", **variables)
    assert shown.returncode == 0, shown.stderr
    for line in ("prepared: 32 train pairs", "prepared: 8 validation pairs", "prepared: tiny/llama in "):
        assert line in shown.stdout
    tables = sorted((tmp_path / "cache" / "tables").glob("*/pairs.arrow"))
    written = [path.stat().st_mtime_ns for path in tables]
    done = command(tmp_path, "fit", *options, "--model.name", "tiny/llama", "--trainer.max_steps", "2", **variables)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in tables] == written
    for name in ("show", "fit"):
        more = ("--prepare", "true") if name == "show" else ()
        refused = command(tmp_path, name, *options, "--model.name", "tiny/other", *more, **variables)
        assert refused.returncode == 2, refused.stderr
        assert "tiny/other" in refused.stderr.splitlines()[-1]


def test_torchrun_starts_the_ranks(tmp_path: Path, tiny_llama: str) -> None:
    write_config(tmp_path, tiny_llama)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    strategy = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.max_steps", "4")
    for name, launcher, options in (("one", [sys.executable], ()), ("two", torchrun, strategy)):
        line = [*launcher, "-m", "app.main", "fit", "--config", "config.yaml", "--trainer.max_steps", "4", *options]
        line += ["--trainer.logger.version", name]
        done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (audit_of(tmp_path / "runs" / "run" / name) for name in ("one", "two"))
    assert one["pair_id"].equals(two["pair_id"])
    assert one["kept"].equals(two["kept"])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_curves_are_written_without_network(name: str, tmp_path: Path, tiny_llama: str) -> None:
    if not PACKAGES and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    write_config(tmp_path, tiny_llama)
    places = os.pathsep.join([environment()["PYTHONPATH"], PACKAGES])
    settings = ["--config", "config.yaml", "--config", str(ROOT / f"configs/logger/{name}.yaml")]
    settings += ["--ckpt_path", "last", "--trainer.max_steps"]
    for steps in ("4", "8"):  # the second goes on from the first
        more = {"PYTHONPATH": places, "MLFLOW_ALLOW_FILE_STORE": "true"}
        done = command(tmp_path, "fit", *settings, steps, **more)
        assert done.returncode == 0, done.stderr
    (folder,) = {path.parent for path in tmp_path.rglob("audit")}
    assert sorted(set(audit_of(folder)["step"].to_pylist())) == list(range(1, 9))
    curves = {"wandb": "runs/wandb/wandb/offline-run-*/*.wandb", "mlflow": "runs/mlflow/*/*/metrics/train/loss"}[
        name
    ]
    assert list(tmp_path.glob(curves))
