"""Samples during training change nothing of it and follow the policy; without a whole policy they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer, same_bits, weights
from transformers import GenerationConfig

from app.core.errors import UserError
from app.core.samples import read_samples
from callbacks import PolicySamples
from lightning_modules.lora import Lora


def fit(folder: Path, model: str, *callbacks: PolicySamples) -> dict:
    settings = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    module = preference(model)
    quiet_trainer(folder, [*beta_dpo(), *callbacks], **settings).fit(module, controlled(43))
    assert module.policy.training
    return weights(module)


def test_samples_follow_the_policy_and_change_nothing(tiny_llama: str, tmp_path: Path) -> None:
    watched = fit(tmp_path, tiny_llama, PolicySamples(prompts=3, max_new_tokens=12))
    assert same_bits(fit(tmp_path / "unwatched", tiny_llama), watched)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["step-00000002.jsonl", "step-00000004.jsonl"]  # not the sanity check
    first, second = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert [row["prompt_id"] for row in read_samples(str(files[0]))] == ["0", "1", "2"]
    assert all(row["prompt"].endswith("Assistant:") for row in first)
    assert [row["response"] for row in first] != [row["response"] for row in second]
    other = shutil.copytree(tiny_llama, tmp_path / "other")  # its settings are not those of the samples
    GenerationConfig(do_sample=True, temperature=0.1, top_p=0.5, repetition_penalty=9.0).save_pretrained(other)
    again = fit(tmp_path / "again", str(other), PolicySamples(prompts=3, max_new_tokens=12))
    assert same_bits(again, watched)
    assert (tmp_path / "again" / "samples" / "step-00000004.jsonl").read_text() == files[1].read_text()


def test_a_failure_leaves_the_policy_as_it_was(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, samples = preference(tiny_llama), PolicySamples(prompts=1)
    quiet_trainer(tmp_path, [samples], max_steps=1, limit_val_batches=1).fit(module, controlled(10))
    own = module.policy.model.generation_config
    monkeypatch.setattr(module.policy.model, "generate", None)
    with pytest.raises(TypeError):
        samples.sample(module, None)
    assert module.policy.training
    assert module.policy.model.generation_config is own


def test_adapters_on_a_base_in_bfloat16_are_sampled_from(tiny_llama: str, tmp_path: Path) -> None:
    samples = PolicySamples(prompts=1, max_new_tokens=4)
    trainer = quiet_trainer(tmp_path, [samples], max_steps=1, limit_val_batches=1, precision="bf16-mixed")
    trainer.fit(preference(tiny_llama, lora=Lora(r=2)), controlled(10))
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_a_sharded_policy_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = quiet_trainer(tmp_path, [PolicySamples()], strategy=strategy)
    with pytest.raises(UserError, match="cannot sample from a sharded policy"):
        PolicySamples().setup(trainer, preference(tiny_llama), "fit")


def test_a_run_without_validation_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [PolicySamples()], max_steps=1, limit_val_batches=0)
    with pytest.raises(UserError, match="this run has none: give data"):
        trainer.fit(preference(tiny_llama), controlled(10))


def test_the_prompts_are_those_of_as_many_batches_as_it_takes() -> None:
    samples: Any = PolicySamples(prompts=3)
    batch = SimpleNamespace(share=[SimpleNamespace(prompt="one"), SimpleNamespace(prompt="two")])
    for number in (0, 1, 0, 1, 2):
        samples.on_validation_batch_end(None, None, None, batch, number)
    assert samples._prompts == ["one", "two", "one"]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts must be a whole number from 1"):
        PolicySamples(prompts=0)
