"""The attentions for CUDA, by their contracts on the CPU: the numbers, the graphs, and the steps down."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_runs import cuda_stand_in, cuda_trainer
from test_packed_forward import random_pairs, score
from tiny_runs import FAMILIES, controlled, preference, tiny_model
from torch._dynamo.utils import counters
from varlen_reference import varlen_reference

from app.core.errors import UserError
from app.method.batch import Layout, PackedRows
from lightning_modules import attention as attentions
from lightning_modules import flex
from lightning_modules.attention import lacking
from lightning_modules.scorer import ResponseScorer


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral_window", "qwen3"])
def test_varlen_is_pairwise(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentions, "varlen_attn", varlen_reference)
    found = {}
    for attention in ("pairwise", "varlen"):
        model, pairs = tiny_model(family), random_pairs()
        scorer = ResponseScorer(model)
        scorer.use_attention(attention)
        sums = torch.stack(
            [score(scorer, pairs, *how) for how in (("packed", 1000), ("packed", 80), ("separate", 100))]
        )
        (sums * torch.linspace(-1, 1, sums.numel()).view_as(sums)).sum().backward()
        found[attention] = sums.detach(), [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found["varlen"][0], found["pairwise"][0], rtol=0, atol=1e-4)
    for ours, theirs in zip(found["varlen"][1], found["pairwise"][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_varlen_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, gemma = (tiny_model(family).config for family in ("llama", "gemma2"))
    assert lacking(llama, torch.bfloat16) is None
    assert "float32" in str(lacking(llama, torch.float32))
    assert "softcap" in str(lacking(gemma, torch.bfloat16))
    assert "heads of 12" in str(lacking(tiny_model("llama", hidden_size=48).config, torch.bfloat16))
    monkeypatch.setattr("lightning_modules.attention.varlen_attn", lambda query, key, value, cu_seq_q: None)
    assert "does not offer it" in str(lacking(llama, torch.bfloat16))  # as in torch 2.10


GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}


# the quick ones have windows, capped scores, shared keys and none: the others ask of FlexAttention what these do
QUICK = ["llama", "gemma2"]
SLOW = [
    pytest.param(family, marks=pytest.mark.slow) for family in ("gpt_neox", "gemma3", "mistral_window", "qwen3")
]


@pytest.mark.parametrize("family", [*QUICK, *SLOW])
def test_flex_takes_one_graph_with_gradient_and_one_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short, long, several and empty rows, every window, training and validation; and the right numbers."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "compiled_flex", torch.compile(flex.packed_flex, fullgraph=True, backend="aot_eager"))
    monkeypatch.setitem(FAMILIES, "gemma3", GEMMA3)  # no other test shall meet it
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(family)
    scorer, pairs = ResponseScorer(model), random_pairs()
    many = [pair for seed in range(5) for pair in random_pairs(seed)]
    with torch.no_grad():
        expected = score(scorer, pairs, "packed", 1000)
    scorer.use_attention("flex")
    sizes: list[tuple[Layout, int]] = [("packed", 1000), ("packed", 80), ("separate", 100)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        for layout, budget in sizes:
            seen = score(scorer, pairs, layout, budget)
            torch.testing.assert_close(seen.detach(), expected, rtol=0, atol=1e-4)
            seen.sum().backward()
            with torch.no_grad():
                score(scorer, many, layout, budget)
        scorer(PackedRows.empty()).sum().backward()
        score(scorer, many, "packed", 900).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel for this device\nand a trace")


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.70 GiB")


def started(folder: Path, name: str, **settings: Any) -> Any:
    module = preference(name, **settings)
    cuda_trainer(folder, max_steps=1, precision="bf16-mixed").fit(module, controlled(4, batch_size=4))
    return module


def test_steps_down_with_a_word(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning_modules")
    with cuda_stand_in() as device:
        module = started(tmp_path, tiny_llama)
        assert (module.policy.attention, module.policy.layout, module.policy.compiled) == ("varlen", "packed", True)
        assert "attention varlen, packed rows, layers compiled" in caplog.text
        assert "forward and backward" in caplog.text
        assert not [record for record in caplog.records if record.levelno > logging.INFO]
        order = ["varlen", "flex", "pairwise", "sdpa"]
        for place, (where, attribute) in enumerate(
            [(attentions, "varlen_attn"), (flex, "compiled_flex"), (attentions, "piece_mask")]
        ):
            caplog.clear()
            if attribute == "varlen_attn":
                monkeypatch.setattr("lightning_modules.attention.lacking", lambda *_: None)
            monkeypatch.setattr(where, attribute, broken)
            assert started(tmp_path, tiny_llama).policy.attention == order[place + 1]
            (said,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
            assert f"attention {order[place]} in packed rows: RuntimeError: no kernel for this device" in said
            assert said.endswith(f"so attention is {order[place + 1]}, with packed rows")
            with pytest.raises(UserError, match=rf"model.attention: attention {order[place]} .*set it to auto"):
                started(tmp_path, tiny_llama, attention=order[place], layout="separate")
    assert device.violations == []


def test_layers_that_do_not_compile_run_as_they_are(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with cuda_stand_in():
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda block, **_: setattr(block, "_compiled_call_impl", broken)
        )
        module = started(tmp_path, tiny_llama)
        assert not module.policy.compiled
        assert "compiled layers: RuntimeError: no kernel for this device" in caplog.text
        with pytest.raises(UserError, match=r"model.compile_layers: .*set it to auto or false"):
            started(tmp_path, tiny_llama, compile_layers=True)


def test_out_of_memory_is_told_and_not_worked_around(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_modules.attention.lacking", lambda *_: None)
    with cuda_stand_in():
        monkeypatch.setattr(attentions, "varlen_attn", no_memory)
        with pytest.raises(UserError, match=r"Out of memory .*24.70 GiB.*lower data.micro_batch_tokens"):
            started(tmp_path, tiny_llama)
