"""`export --temperature` divides the logits exactly, or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import controlled, preference, quiet_trainer, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from app.commands.export import divide_logits, export
from app.core.errors import UserError

GEMMA = {"final_logit_softcapping": None, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),  # a norm with a bias
        ("gptj", {}),  # a head with a bias
        ("gemma2", GEMMA),  # 1 + weight
    ],
)
def test_logits_are_divided(family: str, settings: dict[str, Any]) -> None:
    model = tiny_model(family, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
        ids = torch.arange(4, 30)[None]
        before = model(input_ids=ids).logits
        divide_logits(model, 0.7)
        torch.testing.assert_close(model(input_ids=ids).logits, before / 0.7, rtol=1e-4, atol=1e-4)


def test_capped_logits_are_refused() -> None:
    with pytest.raises(UserError, match="the logits of a gemma2 are not a multiple of its last norm"):
        divide_logits(tiny_model("gemma2"), 0.7)


def test_the_export_samples_as_the_policy_at_that_temperature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, data = preference(save_tiny_model("llama", tmp_path / "m")), controlled(10, batch_size=5)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    module.policy.model.generation_config.update(do_sample=True, temperature=0.6)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "plain"))
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "warm"), temperature=0.5)
    assert "its logits are divided by 0.5" in capsys.readouterr().out
    assert "divide the logits by 0.5" in (tmp_path / "warm" / "README.md").read_text()
    ids = torch.arange(4, 30)[None]
    recommended = [GenerationConfig.from_pretrained(tmp_path / name).temperature for name in ("plain", "warm")]
    assert recommended[0] == 0.6
    assert recommended[1] in (None, 1.0)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "warm")]
    plain, warm = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(warm, plain / 0.5, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"not trained with model\.lora"):
        export(str(tmp_path / "run.ckpt"), str(tmp_path / "x"), adapter=True, temperature=0.5)
