"""Measure the cost of a pair by length, prompt share and batch size, for this project and a plain step.

    python -m benchmarks.cost --out docs/benchmarks.json

One property at a time varies around pairs of 256 unique tokens, half of them prompt, eight pairs per step. Both
contestants take turns at every point. `python -m benchmarks.tables` turns the saved entry into a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.setting import Setting, prepare
from benchmarks.tables import save, speed_ups
from benchmarks.throughput import conditions, take_turns

MIDDLE = Setting(layers=4, vocabulary=8192, prompt_tokens=128, chosen_tokens=64, rejected_tokens=64, spread=0.0)
LENGTHS = ((32, 16), (64, 32), (128, 64), (256, 128))  # prompt, each response; the third is the middle
PROMPTS = ((16, 120), (240, 8))
BATCHES = (2, 4, 16)


def points(middle: Setting) -> dict[str, Setting]:
    """Return the setting of every point by its label, with one property varied at a time."""

    def pair(prompt: int, response: int) -> Setting:
        return replace(middle, prompt_tokens=prompt, chosen_tokens=response, rejected_tokens=response)

    lengths = {
        f"{prompt + 2 * response} tokens a pair, half prompt": pair(prompt, response)
        for prompt, response in LENGTHS
    }
    prompts = {
        f"256 tokens a pair, {prompt / 256:.0%} prompt": pair(prompt, response) for prompt, response in PROMPTS
    }
    return lengths | prompts | {f"{batch} pairs a step": replace(middle, batch_size=batch) for batch in BATCHES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file that the entry `cost` is added to")
    options = parser.parse_args()
    middle = replace(MIDDLE, steps=options.steps, device=options.device)
    measured = {name: measure(setting, options.repeats) for name, setting in points(middle).items()}
    print(json.dumps(measured, indent=1))
    if options.out:
        told = conditions(middle, "torch", "transformers")
        save({**told, "repeats": options.repeats, "points": measured}, "cost", options.out)


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Return each contestant's median ms per pair and highest peak GB, and the spread of the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        *_, last = take_turns(prepare(setting, folder), ("ours", "plain"), repeats)
    if last["failed"]:
        sys.exit("a cost needs both contestants")
    rates = speed_ups(last["turns"], "ours", "plain")
    found: dict[str, Any] = {
        name: {
            "ms_per_pair": statistics.median(1e3 / turn["pairs_per_second"] for turn in turns),
            "peak_gb": max(turn["peak_gb"] for turn in turns),
        }
        for name, turns in last["turns"].items()
    }
    return found | {"ratio": [statistics.median(rates), min(rates), max(rates)]}


if __name__ == "__main__":
    main()
