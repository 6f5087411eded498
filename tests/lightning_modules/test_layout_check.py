"""The start-up check: packed rows where they hold, plain rows with a word about it where they do not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Recorder, controlled, plain_logps, preference, quiet_trainer, save_tiny_model
from transformers import AutoModelForCausalLM

from app.core.errors import UserError
from lightning_modules.scorer import LogitRule, response_logps


def one_step(folder: Path, name: str, layout: str) -> tuple[Any, Any]:
    module = preference(name, layout=layout)
    data = controlled(4, batch_size=4)
    quiet_trainer(folder, max_steps=1).fit(module, data)
    return module, data


@pytest.mark.parametrize("family", ["llama", "gptj", "mistral_window", "gemma2"])
def test_packs_where_it_holds(family: str, tmp_path: Path) -> None:
    assert one_step(tmp_path, save_tiny_model(family, tmp_path / "m"), "auto")[0].policy.layout == "packed"


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_positions_inside_the_attention_need_rows_of_their_own(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # ALiBi counts places in the row, where the rejected response stands behind the chosen one
    name = save_tiny_model(family, tmp_path / "m")
    with caplog.at_level(logging.WARNING, logger="lightning_modules"):
        module, data = one_step(tmp_path, name, "auto")
    assert module.policy.layout == "separate"
    assert "with a row of its own for every response (slower)" in caplog.text
    with pytest.raises(UserError, match=r"model.layout: .*set it to auto or separate"):
        one_step(tmp_path, name, "packed")

    # and what it falls back to is right
    (batch,) = list(data.train_dataloader())
    policy = module.policy.eval()
    with torch.no_grad():
        seen = response_logps(policy, module.micro_batches(batch), 4, 2, "cpu")
        for pair, (chosen, rejected) in zip(batch.share, seen.tolist(), strict=True):
            assert chosen == pytest.approx(
                float(plain_logps(policy.model, pair.prompt, pair.chosen).sum()), abs=1e-3
            )
            assert rejected == pytest.approx(
                float(plain_logps(policy.model, pair.prompt, pair.rejected).sum()), abs=1e-3
            )


@pytest.mark.parametrize("kind", ["bert", "bert-generation", "rembert"])
def test_tokens_that_attend_to_later_ones_are_refused(kind: str, tmp_path: Path) -> None:
    name = save_tiny_model("llama", tmp_path / "m", model_type=kind)
    for layout in ("auto", "separate"):
        with pytest.raises(UserError, match=f"is a {kind}, whose tokens attend to later ones"):
            one_step(tmp_path, name, layout)


HEADS: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 4.0},  # divides
    "hyperclovax": {"logits_scaling": 0.25},  # multiplies
    "cohere": {"logit_scale": 0.25},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "num_hidden_layers": 3, "lru_width": 32},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.2, "input_jitter_noise": 0.1},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_first_step_scores_as_the_model_in_the_files(kind: str, tmp_path: Path) -> None:
    name = save_tiny_model("llama", tmp_path / "m", model_type=kind, **HEADS[kind])
    data, recorder = controlled(4, batch_size=4), Recorder()
    quiet_trainer(tmp_path, [recorder], max_steps=1).fit(preference(name), data)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    (batch,) = list(data.train_dataloader())
    assert recorder.decisions[0].gaps.tolist() == [0.0] * 4
    for pair, seen in zip(batch.share, recorder.decisions[0].logps.policy_chosen.tolist(), strict=True):
        assert seen == pytest.approx(float(plain_logps(model, pair.prompt, pair.chosen).sum()), abs=1e-3)


def test_separate_rows_on_request(tiny_llama: str, tmp_path: Path) -> None:
    assert one_step(tmp_path, tiny_llama, "separate")[0].policy.layout == "separate"


def test_a_head_that_the_project_does_not_know_is_refused(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogitRule, "candidates", lambda config: [LogitRule(scale=1.01)])
    for layout in ("auto", "packed", "separate"):
        with pytest.raises(UserError, match=r"output head .* is not supported"):
            one_step(tmp_path, tiny_llama, layout)


@pytest.mark.parametrize(
    ("attention", "said"), [("varlen", "runs on CUDA alone"), ("flex", "has no backward pass but on CUDA")]
)
def test_attentions_of_cuda_are_refused_before_a_cpu_trains(
    attention: Any, said: str, tiny_llama: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"model.attention: attention {attention} .*{said}; set it to auto"):
        quiet_trainer(tmp_path, max_steps=1).fit(preference(tiny_llama, attention=attention), controlled(4))
