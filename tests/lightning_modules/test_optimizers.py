"""Every optimizer that docs/pipeline.md names trains, and a resumed run is the uninterrupted one to the bit."""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml
from command_runs import ROOT
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer, save_tiny_model, weights
from torch import nn

from app.core.errors import UserError
from callbacks import RunCheckpoint
from lightning_modules.lora import Lora
from lightning_modules.start_checks import stepped, try_state

LINES = re.findall(r"`(optimizer: \{.*\})` \|$", (ROOT / "docs/pipeline.md").read_text(encoding="utf-8"), re.M)
OPTIMIZERS = {
    part["class_path"]: part["init_args"] for line in LINES for part in [yaml.safe_load(line)["optimizer"]]
}


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough that adapters have 4096 numbers, below which bitsandbytes keeps 32 bits."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    return save_tiny_model("llama", folder, hidden_size=256, num_hidden_layers=1)


def run(folder: Path, model: str, kind: str, steps: int, resume: Path | None = None) -> Any:
    def optimizer(parameters: Any) -> Any:
        return resolve_name(kind)(parameters, **OPTIMIZERS[kind] | {"lr": 2e-3})

    torch.manual_seed(0)
    module = preference(model, optimizer=optimizer, lora=Lora(r=16, target_modules=["q_proj", "v_proj"]))
    saved = RunCheckpoint(every_n_steps=1, dirpath=str(folder))
    trainer = quiet_trainer(folder, [*beta_dpo(), saved], max_steps=steps, enable_checkpointing=True)
    trainer.fit(module, controlled(40), ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, wide_llama: str, tmp_path: Path) -> None:
    if find_spec(kind.split(".")[0]) is None:
        pytest.skip("the extra quantize is not installed")
    whole = run(tmp_path / "whole", wide_llama, kind, 4)
    run(tmp_path / "part", wide_llama, kind, 2)
    resumed = run(tmp_path / "part", wide_llama, kind, 4, tmp_path / "part" / "last.ckpt")
    if "8bit" in kind:
        states = whole.optimizers().optimizer.state.values()
        assert any(
            value.dtype == torch.uint8 for state in states for value in state.values() if torch.is_tensor(value)
        )
    for (name, one), other in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(one, other), name
        assert "lora_B" not in name or one.abs().max() > 0


def test_state_that_a_checkpoint_lacks_is_refused() -> None:
    adam, sgd = partial(torch.optim.AdamW), partial(torch.optim.SGD)
    restored = stepped(adam, [nn.Parameter(torch.zeros(3))])
    try_state(adam, restored)
    with pytest.raises(UserError, match="needs 'max_exp_avg_sq', which the checkpoint lacks: give its options"):
        try_state(partial(adam, amsgrad=True), restored)
    try_state(partial(sgd, momentum=0.9), stepped(sgd, [nn.Parameter(torch.zeros(3))]))


def test_the_page_names_them() -> None:
    assert len(OPTIMIZERS) == 5
