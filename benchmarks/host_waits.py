"""Count the host waits, forward passes, operations and converted bytes of a training step.

python -m benchmarks.host_waits [--places]

Counts are from the stand-in for a CUDA device (tests/support), for a tiny Llama and the third step of a run. No GPU
is needed and no time is measured. An operation is one for which PyTorch starts one or more kernels. Bytes are those
that dtype conversions of weights and logits read and write, and those of the reference's parameters. Attention is
FlexAttention, because the stand-in replaces `varlen` by a loop.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("BETA_DPO_CACHE", tempfile.mkdtemp())
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from cuda_runs import Window, cuda_stand_in, cuda_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_runs import VOCABULARY, beta_dpo, controlled, preference, save_tiny_model

import callbacks
from app.core.errors import first_line
from benchmarks.tables import markdown
from lightning_modules.scorer import ResponseScorer

SEVERAL = {"micro_batch_tokens": 130}


def every_callback() -> list[Any]:
    dashboard = callbacks.BetaDashboard(kl_every_n_steps=1)
    return [*beta_dpo(), callbacks.PairAudit(), dashboard, callbacks.HealthMonitor()]


RUNS: dict[str, tuple[Any, dict[str, int], dict[str, Any]]] = {
    "β-DPO, one micro-batch": (beta_dpo, {}, {}),
    "β-DPO, several": (beta_dpo, SEVERAL, {}),
    "β-DPO, several, cached reference": (beta_dpo, SEVERAL, {"reference": "cached"}),
    "plain DPO, several": (list, SEVERAL, {}),
    "ε-DPO, several": (lambda: [callbacks.EpsilonBeta()], SEVERAL, {}),
    "every callback, several, KL each step": (every_callback, SEVERAL, {}),
}


COLUMNS = (
    *("step", "host waits", "passes with gradient", "passes without", "operations"),
    *("bytes: weights converted", "logits converted", "reference"),
)


def measure(model: str, folder: str, made: Any, data: dict[str, int], settings: dict[str, Any]) -> tuple[int, ...]:
    """Return the counts of `COLUMNS` (without the label) for the last step."""
    passes: Counter[bool] = Counter()  # by whether there is a gradient
    forward = ResponseScorer.forward

    def counted(scorer: ResponseScorer, *args: Any, **settings: Any) -> Any:
        passes[torch.is_grad_enabled()] += 1
        return forward(scorer, *args, **settings)

    with cuda_stand_in() as device:

        class Cleared(Window):
            def on_train_batch_start(self, *args: object) -> None:
                super().on_train_batch_start(*args)
                passes.clear()
                device.converted.clear()

        window = Cleared(device)
        logger = TensorBoardLogger(folder, version="")
        trainer = cuda_trainer(Path(folder), [*made(), window], "bf16-mixed", max_steps=3, logger=logger)
        with mock.patch.object(ResponseScorer, "forward", counted):
            module = preference(model, attention="flex", **settings)
            trainer.fit(module, controlled(40, **data))
    for event, number in sorted(Counter(window.waits).items()) if "--places" in sys.argv else ():
        print(f"{number:4}  {event.kind:9}  {event.operation:20}  {event.where}", file=sys.stderr)
    moved: Counter[str] = Counter()
    for (of_parameter, width), number in device.converted.items():
        if of_parameter:
            moved["weights"] += number
        elif width == VOCABULARY:
            moved["logits"] += number
    reference = sum(p.nbytes for scorer in module.scorers[1:] for p in scorer.parameters())
    counts = len(window.waits), passes[True], passes[False], window.operations
    return *counts, moved["weights"], moved["logits"], reference


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as models:
        model = save_tiny_model("llama", Path(models))
        for name, run in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = [f"{number}" for number in measure(model, folder, *run)]
                except RuntimeError as error:
                    found = [f"fails: {first_line(error)}"] + [""] * (len(COLUMNS) - 2)
            rows.append([name, *found])
    print(markdown(COLUMNS, rows, aligned=True))


if __name__ == "__main__":
    main()
