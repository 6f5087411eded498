"""A model of images and text keeps the decoder's settings in a configuration of their own; its text is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import _COMMON, Recorder, beta_dpo, controlled, plain_logps, preference, quiet_trainer, table_of
from transformers import AutoConfig, AutoModelForCausalLM

from app.commands.export import export
from datamodules.controlled_task import build_tokenizer
from lightning_modules.lora import Lora
from lightning_modules.memory import activations

TEXT = _COMMON | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # transformers ignores its cap on logits
    "gemma3": ({"attention_dropout": 0.3, "final_logit_softcapping": 3.0}, {"mm_tokens_per_image": 4}),
    "gemma4": (
        {
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 116,
            "final_logit_softcapping": 3.0,
        },
        {"audio_config": None},
    ),
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma3", {}),
        ("gemma3", {"attention": "sdpa"}),
        ("gemma3", {"lora": Lora(r=2)}),
        ("gemma4", {}),
        ("gemma4", {"attention": "eager"}),
    ],
    ids=str,
)
def test_its_text_is_trained_and_exported(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    text, more = KINDS[kind]
    config = AutoConfig.for_model(kind, text_config=TEXT | text, vision_config=VISION, **more)
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in start.parameters():
            weight *= 5 if weight.ndim > 1 else 1
    start.save_pretrained(tmp_path / "m")
    build_tokenizer().save_pretrained(tmp_path / "m")
    module, data, recorder = preference(str(tmp_path / "m"), **settings), controlled(10), Recorder()
    trainer = quiet_trainer(tmp_path, [*beta_dpo(), recorder], max_steps=1)
    reached: set[str] = set()

    def note(name: str, weight: torch.Tensor) -> None:
        weight.register_post_accumulate_grad_hook(lambda _: reached.add(name))

    made = module.configure_optimizers

    def hooked() -> Any:
        for name, weight in module.policy.named_parameters():
            if weight.requires_grad:
                note(name, weight)
        return made()

    module.configure_optimizers = hooked  # type: ignore[method-assign]
    trainer.fit(module, data)
    trained = {id(weight) for group in trainer.optimizers[0].param_groups for weight in group["params"]}
    wanted = {name for name, weight in module.policy.named_parameters() if id(weight) in trained}
    assert reached == wanted  # DDP would wait for the gradients of others
    assert not any("vision" in name for name in wanted)

    (decision,) = recorder.decisions
    assert decision.gaps.tolist() == [0.0] * 10
    assert module.policy.layout == "packed"
    table, rows = table_of(data)
    for row in rows[:4]:
        place = decision.pair_ids.index(table.pair_ids([row])[0])
        with torch.no_grad():
            expected = plain_logps(start, table[int(row)].prompt, table[int(row)].chosen).double().sum()
        assert decision.logps.policy_chosen[place] == pytest.approx(float(expected), abs=1e-4)

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "out"))  # which reads it again and compares
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_planned(kind: str) -> None:
    text, more = KINDS[kind]
    config = AutoConfig.for_model(kind, text_config=TEXT | text, vision_config=VISION, **more)
    planned = dataclasses.asdict(activations(config, torch.float32, autocast=False))
    assert planned == dataclasses.asdict(activations(config.get_text_config(), torch.float32, autocast=False))
