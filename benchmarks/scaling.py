"""Measure the bytes that ranks exchange per step, and the start of a run, with DDP on gloo on one machine.

    python -m benchmarks.scaling steps --ranks 1 2 --pairs 64 256 1024
    python -m benchmarks.scaling startup --ranks 1 2 --data hh_harmless_base_test.jsonl.gz

`steps` trains a small random model with β-DPO on the controlled task. It counts the bytes that the process writes
to its TCP connections (Linux's TCP_INFO), including gloo's framing and all barriers, and the exchange of the gaps
separately. `startup` repeats the lines of a file up to `--rows`, and times `prepare_data` and `setup` on every
rank, first with an empty cache, then with the table in the cache.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoTokenizer

from app.cli.trainer import be_quiet
from benchmarks.setting import save_llama
from benchmarks.tables import markdown
from callbacks import BetaScheduler, PairFilter, RewardGapStatistics
from datamodules import ControlledTask, PreferenceData
from datamodules.controlled_task import build_tokenizer
from lightning_modules import PreferenceOptimization

WARM_UP = 3  # steps that are not counted
# offsets in Linux's struct tcp_info: u32 not yet sent; u64 sent, then u64 sent again
NOT_SENT, SENT = 144, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["steps", "startup"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256, 1024], help="per step, over all ranks")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--data", help="of startup: .jsonl or .jsonl.gz")
    parser.add_argument("--tokenizer", default="models/smollm2", help="of startup (make smollm2)")
    parser.add_argument("--rows", type=int, default=160_000, help="of startup")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # internal: the ranks of one run write figures there
    options = parser.parse_args()
    if options.folder:
        train(options)
        return
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as folder:
        (compare_steps if options.what == "steps" else compare_starts)(options, Path(folder))


def compare_steps(options: argparse.Namespace, folder: Path) -> None:
    save_model(folder, build_tokenizer(), options)
    rows = []
    for pairs, ranks in itertools.product(options.pairs, options.ranks):
        figures = run(options, folder, ranks, pairs)
        seconds, sent, gaps = (max(rank[name] for rank in figures) for name in ("seconds", "sent", "gaps"))
        rows.append(
            [f"{ranks}", f"{pairs}", f"{seconds:.3f}", f"{sent:,.0f}", f"{gaps:,.0f}", f"{gaps / pairs:.1f}"]
        )
    print(markdown(["ranks", "pairs", "s/step", "sent per rank", "gaps", "gaps per pair"], rows, aligned=True))
    print(f"{figures[0]['parameters']:,} parameters: {4 * figures[0]['parameters']:,} bytes of float32 gradients")


def compare_starts(options: argparse.Namespace, folder: Path) -> None:
    if not options.data:
        sys.exit("startup needs --data")
    save_model(folder, AutoTokenizer.from_pretrained(options.tokenizer), options)
    with (gzip.open if options.data.endswith(".gz") else open)(options.data, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    options.data = str(folder / "pairs.jsonl")
    Path(options.data).write_text("\n".join(itertools.islice(itertools.cycle(lines), options.rows)), "utf-8")
    print(f"{options.rows:,} rows, {os.path.getsize(options.data) / 1e6:.0f} MB")
    measured = ("prepare_data", "setup", "first_step", "peak")
    rows = []
    for ranks, cache in itertools.product(options.ranks, ("empty", "full")):
        for rank, figures in enumerate(run(options, folder, ranks, 64, str(folder / f"cache-{ranks}"))):
            rows.append([f"{ranks}", cache, f"{rank}", *(str(figures.get(name, "-")) for name in measured)])
    header = ["ranks", "cache", "rank", "prepare, s", "setup, s", "step 1, s", "GB"]
    print(markdown(header, rows, aligned=True))


def save_model(folder: Path, tokenizer: Any, options: argparse.Namespace) -> None:
    save_llama(folder / "model", tokenizer, hidden_size=options.hidden, num_hidden_layers=2, num_attention_heads=4)


def run(options: argparse.Namespace, folder: Path, ranks: int, pairs: int, cache: str = "") -> list[dict]:
    """Start one run in a process of its own and return the figures of each rank."""
    words = ["--ranks", ranks, "--pairs", pairs, "--steps", options.steps if options.what == "steps" else 1]
    words += ["--data", options.data] if options.data else []
    command = [sys.executable, "-m", "benchmarks.scaling", options.what, *map(str, words), "--folder", str(folder)]
    variables = {
        "OMP_NUM_THREADS": "1",
        "BETA_DPO_CACHE": cache or str(folder / "cache"),
        "BEGAN": str(time.time()),
    }
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        sys.exit(f"{ranks} ranks failed:\n{done.stderr[-3000:]}")
    return [json.loads((folder / f"rank-{rank}.json").read_text("utf-8")) for rank in range(ranks)]


# --- one rank of one run ------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    be_quiet()
    ranks, pairs = options.ranks[0], options.pairs[0]
    steps = options.steps + WARM_UP if options.what == "steps" else 1
    module = CountedGather(f"{options.folder}/model", optimizer=partial(torch.optim.SGD, lr=0.1))
    if options.what == "steps":
        data: Any = ControlledTask(pairs=pairs * steps, batch_size=pairs, seed=1)
    else:
        data = TimedData(options.data, on_bad_row="skip", batch_size=pairs, seed=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[RewardGapStatistics(), PairFilter(seed=1), BetaScheduler(), Meter()],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, data)
    figures = module.figures | getattr(data, "figures", {})
    Path(options.folder, f"rank-{trainer.global_rank}.json").write_text(json.dumps(figures), "utf-8")


def sent_bytes() -> int:
    """Return the bytes that this process has written to its TCP connections, without retransmissions.

    Bytes that are not sent yet count too, because an exchange may end before the last bytes leave.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("QQ", info, SENT)
                total += sent - again + struct.unpack_from("I", info, NOT_SENT)[0]
        except OSError:  # closed in the meantime, or no TCP connection
            continue
    return total


class CountedGather(PreferenceOptimization):
    """A stage that counts the bytes sent to gather the gaps of all pairs."""

    gathered = 0

    def on_train_start(self) -> None:
        super().on_train_start()
        gather = self.measurer.gather

        def counted(*share: Any) -> Any:
            before = sent_bytes()
            global_logps = gather(*share)
            self.gathered += sent_bytes() - before
            return global_logps

        self.measurer.gather = counted  # type: ignore[method-assign]


class Meter(Callback):
    """A callback that writes time and bytes per step, after the warm-up, to `module.figures`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.seconds.clear()
            self.sent, module.gathered = sent_bytes(), 0
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        if trainer.global_step == 1:
            module.figures = {
                "first_step": round(time.time() - float(os.environ["BEGAN"]), 1),
                "peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            }

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_step > WARM_UP:
            module.figures |= {
                "seconds": statistics.median(self.seconds),
                "sent": (sent_bytes() - self.sent) / len(self.seconds),
                "gaps": module.gathered / len(self.seconds),
                "parameters": sum(parameter.numel() for parameter in module.policy.parameters()),
            }


class TimedData(PreferenceData):
    """A data module that times `prepare_data` and `setup`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.figures: dict[str, float] = {}

    def prepare_data(self) -> None:
        self.timed("prepare_data", super().prepare_data)

    def setup(self, stage: str) -> None:
        self.timed("setup", super().setup, stage)

    def timed(self, name: str, method: Callable[..., None], *arguments: str) -> None:
        began = time.perf_counter()
        method(*arguments)
        self.figures[name] = round(time.perf_counter() - began, 1)


if __name__ == "__main__":
    main()
