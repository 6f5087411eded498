"""Measure pairs per second and peak memory of a DPO step for this project, a plain transformers step, and TRL.

    python -m benchmarks.throughput --data hh_harmless_base_test.jsonl.gz --name hh-33M --out docs/benchmarks.json

Every contestant trains the same random model on the same pairs in the same order with the same optimizer. Each runs
in a process of its own, so that the peak memory is its own. The contestants take turns. Medians and ratios over the
turns are printed and, with `--out`, saved for the tables of README and docs (`python -m benchmarks.tables`). All
figures are measured here; TRL is left out, with a message, if it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from app.files import atomic_file
from benchmarks.contestants import CONTESTANTS
from benchmarks.setting import Setting, prepare, unavoidable_operations
from benchmarks.tables import comparison

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in vars(Setting()).items():
        if name != "model":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument(
        "--profile", choices=list(CONTESTANTS), help="one contestant by torch operation, and no turns"
    )
    parser.add_argument("--name", default="benchmark", help="of this entry in --out")
    parser.add_argument("--out", help="JSON file that the entry is added to")
    options = vars(parser.parse_args())
    repeats, contestants, name, out = (options.pop(key) for key in ("repeats", "contestants", "name", "out"))
    if profiled := options.pop("profile"):
        with tempfile.TemporaryDirectory() as folder:
            print(output_of(profiled, prepare(Setting(**options), folder), folder, "--profile"))
        return
    entry: dict[str, Any] = {}
    for entry in measure(Setting(**options), contestants, repeats):  # saved after every turn of every contestant
        if out:
            entries = json.loads(Path(out).read_text(encoding="utf-8")) if Path(out).exists() else {}
            with atomic_file(out) as temporary:
                temporary.write_text(json.dumps(entries | {name: entry}, indent=1, ensure_ascii=False) + "\n")
    print(comparison(entry))
    sys.exit(1 if entry["failed"] else 0)


class ContestantFailed(Exception):
    """The error of a contestant that failed, with the end of its error output."""


def measure(setting: Setting, contestants: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Run all contestants in turn, `repeats` times, and yield the entry so far after each, with the machine.

    A contestant that fails takes part in no later turn and is named with its error.
    """
    if "trl" in contestants and importlib.util.find_spec("trl") is None:
        contestants.remove("trl")
        print("trl is not installed here and is left out")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(setting, folder)
        entry: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": machine(setting.device),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "trl": version("trl"),
            },
            "setting": vars(setting) | {"data": Path(setting.data).name},
            "unavoidable_operations": unavoidable_operations(prepared),
            "turns": {},
            "failed": {},
        }
        for turn in range(repeats):
            for name in contestants:
                if name in entry["failed"]:
                    continue
                try:
                    result = run(name, prepared, folder)
                except ContestantFailed as error:
                    entry["failed"][name] = str(error)
                    entry["turns"].pop(name, None)
                    print(f"turn {turn + 1}: {name} failed:\n{error}", flush=True)
                else:
                    entry["turns"].setdefault(name, []).append(result)
                    print(f"turn {turn + 1}: {name} {result}", flush=True)
                yield entry


def run(name: str, setting: Setting, folder: str) -> dict[str, Any]:
    """Return the result of one turn of a contestant."""
    return dict(json.loads(output_of(name, setting, folder).splitlines()[-1]))


def output_of(name: str, setting: Setting, folder: str, *options: str) -> str:
    """Return the output of a contestant in a process of its own; all runs with one `folder` share its cache."""
    command = [sys.executable, "-m", "benchmarks.contestants", name, setting.write(), *options]
    environment = {**os.environ, "BETA_DPO_CACHE": f"{folder}/cache"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise ContestantFailed(done.stderr[-3000:])
    return done.stdout.strip()


def machine(device: str) -> str:
    """Return a description of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    kind = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{torch.get_num_threads()} cores of {kind}"


def version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


if __name__ == "__main__":
    main()
