"""`model.reference_name`: the reference is another model than the one that the policy starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Recorder, beta_dpo, controlled, preference, quiet_trainer, save_tiny_model

from app.commands.generate import generate
from app.core.errors import UserError
from app.method.losses import SimPOLoss
from lightning_modules.lora import Lora


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model") / "gpt2")


def run(folder: Path, name: str, **settings: Any) -> tuple[Any, Any]:
    recorder = Recorder()
    torch.manual_seed(0)
    module = preference(name, **settings)
    trainer = quiet_trainer(folder, [*beta_dpo(), recorder], max_steps=3)
    trainer.fit(module, controlled(40, micro_batch_tokens=300))
    return module, recorder.decisions


@pytest.mark.parametrize("settings", [{}, {"reference": "cached"}, {"lora": Lora(r=4)}], ids=str)
def test_it_scores_every_pair(
    settings: dict, tiny_llama: str, tiny_gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))
    start = run(tmp_path, tiny_llama)[1][0].logps
    other = run(tmp_path, tiny_gpt2)[1][0].logps
    module, decisions = run(tmp_path, tiny_llama, reference_name=tiny_gpt2, **settings)
    first = decisions[0].logps
    for side in ("chosen", "rejected"):
        ours, fixed = (getattr(first, f"{model}_{side}") for model in ("policy", "reference"))
        torch.testing.assert_close(ours, getattr(start, f"policy_{side}"), rtol=0, atol=2e-4)
        torch.testing.assert_close(fixed, getattr(other, f"policy_{side}"), rtol=0, atol=2e-4)
    assert decisions[0].gaps.abs().max() > 1
    assert len(module.measurer.scorers) == 1 + (settings.get("reference") != "cached")


def test_a_model_with_other_tokens_is_refused(tiny_llama: str, tiny_gpt2: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_gpt2, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"model\.reference_name: .* has other tokens than data\.tokenizer"):
        run(tmp_path, tiny_llama, reference_name=str(other))
    with pytest.raises(UserError, match=rf"reference: '{other}' has other tokens than model \("):
        generate(tiny_llama, str(tmp_path / "out.jsonl"), count=1, reference=str(other))
    with pytest.warns(UserWarning, match=r"model\.name: .* has other tokens than data\.tokenizer .* 2 of 116\)"):
        run(tmp_path, str(other))
    with pytest.raises(UserError, match=r"model\.reference_name: no model at 'nowhere/model'"):
        run(tmp_path, tiny_llama, reference_name="nowhere/model")


def test_a_loss_without_a_reference_refuses_one() -> None:
    with pytest.raises(UserError, match=r"model\.reference_name has no effect with SimPOLoss"):
        preference("policy", reference_name="reference", loss=SimPOLoss())
