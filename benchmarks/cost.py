"""Measure the cost of a pair by length, prompt share and batch size, for this project and a plain step.

    python -m benchmarks.cost --out docs/benchmarks.json

One property at a time varies around pairs of 256 unique tokens, half of them prompt, eight pairs per step. Both
contestants take turns at every point. `python -m benchmarks.tables` turns the saved entry into a table.
`benchmarks.scaling` measures how the start of a run grows with the number of pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from app.files import atomic_file
from benchmarks.setting import Setting, prepare
from benchmarks.throughput import machine, run

MIDDLE = Setting(layers=4, vocabulary=8192, prompt_tokens=128, chosen_tokens=64, rejected_tokens=64, spread=0.0)
LENGTHS = ((32, 16), (64, 32), (128, 64), (256, 128))  # prompt, each response
# LENGTHS already has the middle point
PROMPTS = ((16, 120), (240, 8))
BATCHES = (2, 4, 16)
CONTESTANTS = ("ours", "plain")


def points(middle: Setting) -> list[tuple[str, Setting]]:
    """Return (label, setting) for every point, with one property varied at a time."""

    def pair(prompt: int, response: int) -> Setting:
        return replace(middle, prompt_tokens=prompt, chosen_tokens=response, rejected_tokens=response)

    return [
        *(
            (f"{prompt + 2 * response} tokens a pair, half prompt", pair(prompt, response))
            for prompt, response in LENGTHS
        ),
        *(
            (f"256 tokens a pair, {prompt / 256:.0%} prompt", pair(prompt, response))
            for prompt, response in PROMPTS
        ),
        *((f"{batch} pairs a step", replace(middle, batch_size=batch)) for batch in BATCHES),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="JSON file that the entry `cost` is added to")
    options = parser.parse_args()
    middle = replace(MIDDLE, steps=options.steps, device=options.device)
    entry = {
        "date": date.today().isoformat(),
        "machine": machine(options.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "setting": vars(middle),
        "repeats": options.repeats,
        "points": {name: measure(setting, options.repeats) for name, setting in points(middle)},
    }
    print(json.dumps(entry["points"], indent=1))
    if options.out:
        before = json.loads(Path(options.out).read_text(encoding="utf-8")) if Path(options.out).exists() else {}
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(before | {"cost": entry}, indent=1, ensure_ascii=False) + "\n")


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Return each contestant's median ms per pair and highest peak GB over interleaved turns, and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(setting, folder)
        turns = [{name: run(name, prepared, folder) for name in CONTESTANTS} for _ in range(repeats)]
    found: dict[str, Any] = {
        name: {
            "ms_per_pair": statistics.median(1e3 / turn[name]["pairs_per_second"] for turn in turns),
            "peak_gb": max(turn[name]["peak_gb"] for turn in turns),
        }
        for name in CONTESTANTS
    }
    rates = [turn["ours"]["pairs_per_second"] / turn["plain"]["pairs_per_second"] for turn in turns]
    return found | {"ratio": [statistics.median(rates), min(rates), max(rates)]}


if __name__ == "__main__":
    main()
