"""Supervised fine-tuning: the mean over the response tokens of the whole batch, however it is cut."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    controlled,
    plain_logps,
    preference,
    quiet_trainer,
    relative_difference,
    same_bits,
    save_tiny_model,
    weights,
)
from transformers import AutoModelForCausalLM

from app.core.errors import UserError
from callbacks import ExplicitRewardGap, PairFilter
from datamodules import PreferenceData
from datamodules.controlled_task import build_tokenizer
from lightning_modules import SupervisedFineTuning

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 116,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def sft(name: str | None, **settings: Any) -> SupervisedFineTuning:
    optimizer = partial(torch.optim.SGD, lr=0.05)
    return SupervisedFineTuning(name, **({"optimizer": optimizer, "max_grad_norm": None} | settings))


@pytest.mark.parametrize("tokens", [8192, 115])
@pytest.mark.parametrize("layout", ["packed", "separate"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_textbook(
    tokens: int, layout: Any, checkpointing: bool, tiny_llama: str, tmp_path: Path
) -> None:
    module = sft(tiny_llama, layout=layout, gradient_checkpointing=checkpointing)
    data = controlled(13, stage="demonstrations", micro_batch_tokens=tokens)
    trainer = quiet_trainer(tmp_path, limit_val_batches=1.0)
    trainer.fit(module, data)
    assert trainer.global_step == 2

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    again = controlled(13, stage="demonstrations")
    again.trainer = trainer
    again.setup("fit")
    loss = torch.zeros(())
    for batch in again.train_dataloader():
        loss = -torch.cat([plain_logps(model, pair.prompt, pair.chosen) for pair in batch.share]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    expected = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    assert relative_difference(expected, weights(module)) < 1e-5
    with torch.no_grad():
        held_out = [plain_logps(model, p.prompt, p.chosen) for b in again.val_dataloader() for p in b.share]
    mean = -torch.cat(held_out).mean().item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(mean, rel=1e-5)


def test_rejected_responses_shorten_no_prompt_and_drop_no_pair(tiny_llama: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "tell me " * 15, "chosen": "the fox", "rejected": "the owl " * 20},
        {"prompt": "tell me", "chosen": "the fox " * 30, "rejected": "the fox " * 31},  # equal once they are cut
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), max_length=50, max_prompt_length=20)
    data.tokenizer, lengths = build_tokenizer(), []
    for module in (None, sft(tiny_llama)):
        data.used_by = module
        opened = data.open_table("train")
        assert opened is not None
        lengths.append(opened[0].side_lengths.T.tolist())
    assert lengths == [[[20, 3, 30]], [[31, 3, 0], [2, 48, 0]]]


def test_slots_of_the_method_are_said_to_have_no_effect(
    tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainer = quiet_trainer(tmp_path, [ExplicitRewardGap("nowhere"), PairFilter()], max_steps=1)
        trainer.fit(sft(tiny_llama), controlled(8))
    for name in ("ExplicitRewardGap", "PairFilter"):
        assert f"{name} has no effect on a stage without a preference loss" in caplog.text


def test_a_new_model_is_drawn_from_the_global_seed(tmp_path: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        module = sft(None, architecture=dict(ARCHITECTURE))
        quiet_trainer(tmp_path, max_steps=1).fit(module, controlled(4, stage="demonstrations"))
        drawn.append(weights(module))
    assert same_bits(drawn[0], drawn[1])
    assert not same_bits(drawn[0], drawn[2])


@pytest.mark.parametrize(("name", "architecture"), [(None, None), ("somewhere", dict(ARCHITECTURE))])
def test_one_source_of_the_model(name: str | None, architecture: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"either model\.name .* or model\.architecture"):
        quiet_trainer(tmp_path).fit(sft(name, architecture=architecture), controlled(4, stage="demonstrations"))


def test_demonstrations_are_no_preferences(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs rejected responses"):
        quiet_trainer(tmp_path).fit(preference(tiny_llama), controlled(4, stage="demonstrations"))


def test_gradient_checkpointing_is_at_work(tiny_llama: str, tmp_path: Path) -> None:
    # from_pretrained returns eval mode, in which transformers would silently skip it
    seen = []
    for checkpointing in (False, True):
        module = sft(tiny_llama, gradient_checkpointing=checkpointing, layout="separate")
        calls = [0]

        def count(*_: object, calls: list[int] = calls) -> None:
            calls[0] += 1

        class Counting(SupervisedFineTuning):
            def configure_model(self, count: Any = count) -> None:
                super().configure_model()
                self.policy.model.model.layers[0].self_attn.register_forward_hook(count)

        module.__class__ = Counting
        quiet_trainer(tmp_path, max_steps=1).fit(module, controlled(4, stage="demonstrations"))
        seen.append(calls[0])
    assert seen[1] == seen[0] + 1  # one micro-batch, whose layer ran once more in the backward pass


def test_a_bad_row_spoils_no_other_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))
    name = save_tiny_model("llama", tmp_path / "m")
    model: Any = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[build_tokenizer().convert_tokens_to_ids(" wolf")] = torch.nan
    model.save_pretrained(name)
    rows = [{"prompt": " tell me" + " the" * n, "completion": " red fox ."} for n in range(5)]
    rows[2]["completion"] = " red wolf ."
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(file), validation_path=str(file))
    (figures,) = quiet_trainer(tmp_path, limit_val_batches=1.0).validate(sft(name), data, verbose=False)
    assert figures["val/nonfinite_pairs"] == 1
    assert figures["val/loss"] > 0
