"""Measure pairs per second and peak memory of a DPO step for this project, a plain transformers step, and TRL.

    python -m benchmarks.throughput --data hh_harmless_base_test.jsonl.gz --name hh-33M --out docs/benchmarks.json

Every contestant trains the same random model on the same pairs in the same order with the same optimizer, in a
process of its own, so that the peak memory is its own. They take turns. Medians and ratios over the turns are
printed and, with `--out`, saved for the tables of README and docs (`python -m benchmarks.tables`).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import CONTESTANTS
from benchmarks.setting import Setting, prepare, unavoidable_operations
from benchmarks.tables import ROOT, comparison, processor, save, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in vars(Setting()).items():
        if name != "model":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--profile", choices=list(CONTESTANTS), help="one by torch operation, and no turns")
    parser.add_argument("--name", default="benchmark", help="of this entry in --out")
    parser.add_argument("--out", type=Path, help="JSON file that the entry is added to")
    options = parser.parse_args()
    contestants = options.contestants
    setting = Setting(**{name: value for name, value in vars(options).items() if name in vars(Setting())})
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(setting, folder)
        if options.profile:
            print(output_of(options.profile, prepared, "--profile"))
            return
        if "trl" in contestants and importlib.util.find_spec("trl") is None:
            contestants.remove("trl")
            print("trl is not installed here and is left out")
        cores = f"{torch.get_num_threads()} cores of {processor()}"
        entry: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": torch.cuda.get_device_name() if setting.device == "cuda" else cores,
            # torch says more of itself than its package: the build for CPU or CUDA
            "versions": versions("torch", "transformers", "trl") | {"torch": torch.__version__},
            "setting": vars(setting) | {"data": Path(setting.data).name},
            "unavoidable_operations": unavoidable_operations(prepared),
            "turns": {},
            "failed": {},
        }
        for turn, name in itertools.product(range(1, options.repeats + 1), contestants):
            if name not in entry["failed"]:
                print(f"turn {turn}: {name} {take_turn(entry, name, prepared)}", flush=True)
                if options.out:
                    save(entry, options.name, options.out)
    print(comparison(entry))
    sys.exit(1 if entry["failed"] else 0)


def take_turn(entry: dict[str, Any], name: str, prepared: Setting) -> str:
    """Add a contestant's result to `entry`, or its error, after which it takes part in no turn; return either."""
    try:
        result = json.loads(output_of(name, prepared).splitlines()[-1])
    except subprocess.CalledProcessError as error:
        entry["failed"][name] = error.stderr[-3000:]
        entry["turns"].pop(name, None)
        return f"failed:\n{entry['failed'][name]}"
    entry["turns"].setdefault(name, []).append(result)
    return str(result)


def output_of(name: str, prepared: Setting, *options: str) -> str:
    """Return the output of a contestant in a process of its own; all runs of one model share its cache."""
    command = [sys.executable, "-m", "benchmarks.contestants", name, json.dumps(vars(prepared)), *options]
    environment = {**os.environ, "BETA_DPO_CACHE": f"{prepared.model}/cache"}
    errors = None if options else subprocess.PIPE  # a profile has no turns, which would print them
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
