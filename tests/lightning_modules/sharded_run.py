"""One rank of a run on gloo, started by test_sharding.

`python sharded_run.py RANKS MODEL TIED_MODEL FOLDER [VARIANT …]`: for every variant the audit is left in
FOLDER/<variant> and, beside it, the whole final weights and facts about the run in <variant>.pt.
Every model in FOLDER/families, if there are any, is built without weights, sharded, filled and scored:
FOLDER/scores.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer, table_of, weights  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from app.method.batch import PackedRows  # noqa: E402
from callbacks import PairAudit  # noqa: E402
from datamodules.batches import pack  # noqa: E402
from lightning_modules import ShardedStrategy  # noqa: E402
from lightning_modules.pretrained import load_model  # noqa: E402
from lightning_modules.scorer import ResponseScorer  # noqa: E402
from lightning_modules.sharded_loading import read_weights, weight_files  # noqa: E402
from lightning_modules.sharding import transformer_blocks  # noqa: E402

# strategy settings and module settings; a name with `tied` is trained on the tied model
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replicas": ({"replicas": 2}, {}),
    "whole_gradients": ({"accumulate_whole_gradients": True, "reshard_after_forward": False}, {}),
    "offloaded": ({"offload_reference": True, "prefetch_blocks": 2, "meta_init_above": 0}, {}),
    "meta": ({"meta_init_above": 0, "prefetch_blocks": 0}, {}),
    "checkpointed": ({}, {"gradient_checkpointing": True}),
    "tied": ({}, {}),
    "tied_meta": ({"meta_init_above": 0}, {}),
    "bfloat16": ({"compute_dtype": "bfloat16", "meta_init_above": 0}, {}),
    "bfloat16_eager": ({"compute_dtype": "bfloat16", "offload_reference": True}, {}),
    "compiled": ({}, {"compile_layers": True}),
}
PAIRS, TOKENS = 21, 115  # several micro-batches; of the last batch one rank has no pair


def train(model: str, folder: Path, settings: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    """Train with β-DPO, keeping half; returns the whole final weights, on every rank, and facts about the run."""
    module = preference(model, **settings)
    run = quiet_trainer(folder, [*beta_dpo(keep_ratio=0.5), PairAudit()], **trainer)
    forwards: list[int] = []
    run.fit(module, counted(controlled(PAIRS, micro_batch_tokens=TOKENS), module, forwards))
    run.save_checkpoint(folder / "run.ckpt")
    final = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in weights(module).items()}
    facts: dict[str, Any] = {"block_forwards": len(forwards)}
    reference = module.measurer.reference
    if isinstance(module.policy, FSDPModule):
        assert isinstance(reference, ResponseScorer)
        shards = [p for p in module.policy.parameters() if isinstance(p, DTensor)]
        assert len(shards) == len(list(module.policy.parameters()))
        facts |= {
            "types": [{p.dtype for p in scorer.parameters()} for scorer in (module.policy, reference)],
            "rows": [p.to_local().shape[0] for p in shards if p.shape[0] % 2 == 0],
            "all_rows": [p.shape[0] for p in shards if p.shape[0] % 2 == 0],
            "buffers": {n: b.dtype for n, b in reference.named_buffers()},
        }
    return {"weights": final, **facts}


def counted(data: Any, module: Any, forwards: list[int]) -> Any:
    """`data`, whose first batch starts counting how often the first block of the policy runs."""
    loader = data.train_dataloader

    def counting() -> Any:
        if not hasattr(module, "policy"):  # the check of the steps reads the loader's length
            return loader()
        block = transformer_blocks(module.policy)[0]
        layer = next(one for one in block.modules() if isinstance(one, torch.nn.Linear))
        layer.register_forward_hook(lambda *_: forwards.append(1))
        return loader()

    data.train_dataloader = counting
    return data


def rows() -> PackedRows:
    """Four pairs in plain rows."""
    table, order = table_of(controlled(4))
    share = [table[int(row)] for row in order]
    (plain,) = pack(share, range(4), ("chosen", "rejected"), "separate", 8192, 64.0)
    return plain


def sharded_scores(name: str) -> torch.Tensor:
    """Of a model that is never whole on this rank."""
    model = load_model(name, meta_above=0)
    assert all(parameter.is_meta for parameter in model.parameters())
    scorer, mesh = ResponseScorer(model), init_device_mesh("cpu", (2,))
    assert len(transformer_blocks(scorer)) == model.config.num_hidden_layers
    for part in (*transformer_blocks(scorer), scorer):
        fully_shard(part, mesh=mesh)
    read_weights(model, weight_files(name))
    with torch.no_grad():
        return scorer(rows())


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks, model, tied_model, folder = int(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4])
    for name in sys.argv[5:]:
        strategy, settings = VARIANTS[name]
        source = tied_model if "tied" in name else model
        sharded = ShardedStrategy(process_group_backend="gloo", **strategy)
        final = train(source, folder / name, settings, devices=ranks, strategy=sharded)
        if torch.distributed.get_rank() == 0:
            torch.save(final, folder / f"{name}.pt")
    scores = {family.name: sharded_scores(str(family)) for family in sorted(folder.glob("families/*"))}
    if torch.distributed.get_rank() == 0:
        torch.save(scores, folder / "scores.pt")
