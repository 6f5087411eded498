"""One rank of tensor-parallel runs on gloo, started by test_tensor_parallel: `python … RANKS MODELS FOLDER`.

MODELS holds one model a family. Of every variant FOLDER/<variant> holds audit and checkpoint, FOLDER/<variant>.pt
the whole final weights; two ranks also leave evaluation, fine-tuning and scores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from distributed_run import SCENARIOS, fine_tune, train  # noqa: E402
from sharded_run import train as train_and_save  # noqa: E402
from tiny_runs import controlled, preference, quiet_trainer  # noqa: E402

from callbacks import ScoreWriter  # noqa: E402
from lightning_modules import ShardedStrategy  # noqa: E402

# by number of ranks: family, settings of the strategy, settings of the module
VARIANTS: dict[int, dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    2: {
        "llama": ("llama", {}, {}),
        "qwen3": ("qwen3", {"meta_init_above": 0}, {"gradient_checkpointing": True}),  # norms between split layers
        "gpt_neox": ("gpt_neox", {"accumulate_whole_gradients": True}, {}),  # biases
    },
    4: {
        "sharded": ("llama", {"meta_init_above": 0}, {}),
        "replicas": ("llama", {"replicas": 2}, {"gradient_checkpointing": True}),
        "gemma2": ("gemma2", {"reshard_after_forward": False}, {}),  # tied, with windows and capped scores
        "phi3": ("phi3", {"meta_init_above": 0}, {}),  # query, key and value in one matrix
    },
}


def place(ranks: int, **settings: Any) -> dict[str, Any]:
    strategy = ShardedStrategy(process_group_backend="gloo", tensor_parallel_size=2, **settings)
    return {"devices": ranks, "strategy": strategy}


def score(model: str, path: Path, **trainer: Any) -> None:
    """Scores of 21 pairs by the untrained model, of which the last batch has one."""
    run = quiet_trainer(path.parent, [ScoreWriter(str(path))], **trainer)
    run.predict(preference(model), controlled(21), return_predictions=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks, models, folder = int(sys.argv[1]), *map(Path, sys.argv[2:])
    results: dict[str, Any] = {}
    for name, (family, strategy, settings) in VARIANTS[ranks].items():
        results[name] = train_and_save(str(models / family), folder / name, settings, **place(ranks, **strategy))
    if ranks == 2:
        llama = str(models / "llama")
        results["cached"] = train(llama, folder / "cached", *SCENARIOS["many_passes"], "cached", **place(2))
        results["sft"] = fine_tune(llama, folder, **place(2))
        score(llama, folder / "scores.parquet", **place(2))
    if torch.distributed.get_rank() == 0:
        for name, result in results.items():
            torch.save(result, folder / f"{name}.pt")
