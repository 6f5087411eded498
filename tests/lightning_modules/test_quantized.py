"""Adapters on a base in 4 or 8 bits: it is never trained or saved, resume is exact, exports compute the policy."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Recorder, beta_dpo, controlled, preference, quiet_trainer, weights
from transformers import AutoModelForCausalLM

from app.commands.export import export
from app.core.errors import UserError
from callbacks import RunCheckpoint
from lightning_modules.checkpoint import read_checkpoint
from lightning_modules.lora import Lora

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra quantize is not installed")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}


def run(
    folder: Path, model: str, steps: int, quantize: dict, resume: Any = None, **trainer: Any
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    recorder = Recorder()
    saved = RunCheckpoint(every_n_steps=1, dirpath=str(folder / "checkpoints"))
    settings = {
        "max_steps": steps,
        "enable_checkpointing": True,
        "precision": "bf16-mixed" if quantize is INT8 else "32-true",
    } | trainer
    module = preference(model, lora=Lora(r=4, lora_alpha=8.0), quantize=quantize)
    fitted = quiet_trainer(folder, [*beta_dpo(), saved, recorder], **settings)
    fitted.fit(module, controlled(40, micro_batch_tokens=300), ckpt_path=resume, weights_only=True)
    return module, recorder.decisions


def test_a_validation_leaves_the_base_as_it_is(tiny_llama: str, tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", tiny_llama, 4, NF4)
    validated, _ = run(tmp_path / "validated", tiny_llama, 4, NF4, limit_val_batches=1.0, val_check_interval=1)
    assert validated.trainer.callback_metrics["val/gap_mean"] != 0
    for (name, one), other in zip(weights(plain).items(), weights(validated).values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("quantize", [NF4, INT8], ids=["4 bits", "8 bits"])
def test_adapters_are_trained_resumed_and_exported(
    quantize: dict, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, decisions = run(tmp_path / "whole", tiny_llama, 4, quantize)
    assert (decisions[0].gaps == 0).all()
    assert decisions[-1].gaps.abs().max() > 1e-2
    run(tmp_path / "part", tiny_llama, 2, quantize)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed, _ = run(tmp_path / "part", tiny_llama, 4, quantize, last)
    for (name, one), other in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(one, other), name
    assert all("lora_" in name for name in read_checkpoint(last)["state_dict"])
    export(str(last), str(tmp_path / "adapter"), adapter=True)
    export(str(last), str(tmp_path / "merged"))
    assert "merged into the quantised base, dequantised" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(10, 30)[None]
    rounded = torch.autocast("cpu", torch.bfloat16, enabled=quantize is INT8)
    with torch.no_grad(), resumed.policy.as_loaded(), rounded:
        wanted = resumed.policy.model(input_ids=ids).logits.float()
    apart = (merged(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max()
    assert apart < (1e-4 if quantize is NF4 else 0.05)  # 8 bits round the inputs of each layer as well


@pytest.mark.parametrize(
    ("quantize", "trainer", "said"),
    [
        ({"load_in_2bit": True}, {}, "no load_in_2bit in the settings of BitsAndBytesConfig: "),
        ({"bnb_4bit_quant_type": "nf4"}, {}, "neither load_in_4bit nor load_in_8bit is true"),
        (
            NF4 | {"bnb_4bit_compute_dtype": "complex"},
            {},
            r"model\.quantize\.bnb_4bit_compute_dtype must be float32 or",
        ),
        (NF4 | {"bnb_4bit_compute_dtype": "float16"}, {}, "must be float32 or bfloat16, not 'float16'"),
        (NF4 | {"bnb_4bit_quant_type": "nf3"}, {}, r"bnb_4bit_quant_type must be fp4 or nf4, not 'nf3'"),
        (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, {}, "bnb_4bit_quant_storage must be uint8"),
        (NF4 | {"llm_int8_skip_modules": ["q_proj"]}, {}, "keep adapters and quantize off the head"),
        (NF4, {"precision": "64-true"}, "does not go with trainer.precision 64-true"),
        (NF4 | {"llm_int8_skip_modules": ["lm_head", "q_prj"]}, {}, "llm_int8_skip_modules: q_prj names no layer"),
        (INT8, {"precision": "32-true"}, "in 8 bits computes in 16: set trainer.precision bf16-mixed"),
    ],
)
def test_what_cannot_work_is_refused(
    quantize: dict, trainer: dict, said: str, tiny_llama: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        run(tmp_path, tiny_llama, 1, quantize, **trainer)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_float32_on_bases_that_compute_in_16_bits(
    use_dora: bool, tiny_llama: str, tmp_path: Path
) -> None:
    module = preference(tiny_llama, lora=Lora(r=4, use_dora=use_dora), quantize=NF4)
    trainer = quiet_trainer(tmp_path, max_steps=1, precision="bf16-mixed")
    trainer.fit(module, controlled(10))
    assert {weight.dtype for weight in module.parameters() if weight.requires_grad} == {torch.float32}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "out"))  # which compares the model read back
    with pytest.raises(UserError, match=r"in 8 bits does not go with model\.lora\.use_dora"):
        trainer.fit(preference(tiny_llama, lora=Lora(use_dora=True), quantize=INT8), controlled(10))


def test_a_base_without_adapters_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.quantize does not train by itself: add model\.lora"):
        quiet_trainer(tmp_path).fit(preference(tiny_llama, quantize=NF4), controlled(10))
