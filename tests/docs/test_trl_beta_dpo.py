"""The example of β-DPO inside TRL takes the steps of `beta-dpo fit`, and goes on from TRL's checkpoints."""

from __future__ import annotations

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.parity_runs import BETA0, Bench, Run, distance, fit, norm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="the extra trl is not installed"),
]
EXAMPLE = Path(__file__).parents[2] / "docs/trl_beta_dpo.py"
STEPS, BATCH_SIZE = 12, 10


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.create(tmp_path_factory.mktemp("trl"), STEPS * BATCH_SIZE)


@pytest.fixture(scope="module")
def ours(bench: Bench) -> Run:
    return fit(bench, "ours", "beta_dpo", STEPS, BATCH_SIZE)


def trainer(bench: Bench, order: Run, folder: Path, **options: Any) -> Any:
    """TRL's trainer as the example changes it, on the pairs in the order in which `fit` saw them."""
    from datasets import Dataset

    from benchmarks.parity_trl import trl_settings

    spec = importlib.util.spec_from_file_location("trl_beta_dpo", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = [bench.rows[pair_id] for step in order.steps for pair_id in step.pair_ids]
    options = {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": STEPS,
        "seed": 5,
        "logging_steps": 1,
    } | options
    return example.BetaDPOTrainer(
        AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32),
        args=trl_settings(folder, beta=BETA0, **options),
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(bench.model),
    )


def history(trl: Any, name: str) -> list[float]:
    return [entry[name] for entry in trl.state.log_history if name in entry]


def test_it_takes_the_steps_of_fit(bench: Bench, ours: Run, tmp_path: Path) -> None:
    trl = trainer(bench, ours, tmp_path)
    trl.train()
    for name, wanted in {
        "beta/used": [step.beta for step in ours.steps],
        "gap/running_mean": [step.mean for step in ours.steps],
        "loss": [step.loss for step in ours.steps],
    }.items():
        assert history(trl, name) == pytest.approx(wanted, abs=2e-4), name
    assert max(step.beta for step in ours.steps) > 1.1 * min(step.beta for step in ours.steps)
    assert all(step.kept.sum() == 8 for step in ours.steps)
    start, end = bench.parameters(), dict(trl.model.named_parameters())
    assert distance(end, ours.parameters) < 0.01 * distance(start, ours.parameters)
    assert distance(start, ours.parameters) > 0.003 * norm(start)


def test_a_checkpoint_holds_m0_and_sigma(bench: Bench, ours: Run, tmp_path: Path) -> None:
    whole = trainer(bench, ours, tmp_path / "whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 5}
    trainer(bench, ours, tmp_path / "parts", max_steps=5, **saving).train()
    checkpoint = tmp_path / "parts" / "checkpoint-5"
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["RewardGapMoments"]
    assert kept["attributes"]["numbers"]["mean_updates"] == 5
    resumed = trainer(bench, ours, tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name in ("beta/used", "gap/running_mean"):
        assert history(resumed, name)[-7:] == pytest.approx(history(whole, name)[-7:], abs=1e-7)
    assert distance(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())) < 1e-6


def test_evaluation_leaves_the_statistics_alone(bench: Bench, ours: Run, tmp_path: Path) -> None:
    trl = trainer(bench, ours, tmp_path, max_steps=2)
    trl.train()
    (moments,) = [c for c in trl.callback_handler.callbacks if type(c).__name__ == "RewardGapMoments"]
    before = moments.state()
    trl.evaluate(trl.train_dataset.select(range(20)))
    assert moments.state() == before


def test_the_example_stays_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80
