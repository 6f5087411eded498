"""Layers that `torch.compile` has fused take the same steps as those that it has not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer, relative_difference, save_tiny_model, weights

# one process compiles for a minute; every family and option is a compilation of its own
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"reference": "cached", "gradient_checkpointing": True}),
        ("mistral_window", {"layout": "separate"}),
        ("gpt_neox", {}),
    ],
)
def test_the_same_steps(family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))
    name = save_tiny_model(family, tmp_path / "model")
    trained = {}
    for compiled in (False, True):
        module = preference(name, compile_layers=compiled, **settings)
        data = controlled(40, micro_batch_tokens=256)
        quiet_trainer(tmp_path, beta_dpo()).fit(module, data)
        blocks = module.policy.model.base_model.layers
        assert (blocks[0]._compiled_call_impl is not None) == compiled
        trained[compiled] = weights(module)
    assert relative_difference(trained[False], trained[True]) < 1e-5
