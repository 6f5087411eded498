"""Models for which places in a row, or its length, matter: exact, or in rows of their own, or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import FAMILIES, plain_logps, preference, quiet_trainer, save_tiny_model

from app.core.errors import UserError
from datamodules import PreferenceData
from datamodules.batches import short, stretched_pair
from datamodules.records import TokenisedPair
from lightning_modules.scorer import response_logps

WORDS = ("owl", "wolf", "tiger", "goat", "eagle", "fish", "otter", "barn", "cave", "rice", "meat", "nuts", "food")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 3.0, 9.0, 27.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}


def data_with_one_long_pair(folder: Path, longest: int = 70) -> PreferenceData:
    """Twenty pairs of eight words and one of `longest` or so, which the first batch does not hold."""
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " " + " ".join(rng.choice(WORDS, words))

    sizes = [(3, 2, 3)] * 20 + [(longest // 2, longest // 4, longest // 4)]
    rows = [{"prompt": text(p), "chosen": text(c), "rejected": text(r)} for p, c, r in sizes]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PreferenceData(str(folder / "pairs.jsonl"), tokenizer=str(folder / "model"), batch_size=4, seed=0)


def start(folder: Path, family: str, longest: int = 70, stage: dict[str, Any] | None = None, **config: Any) -> Any:
    """One step of a run that meets the long pair later; returns module and data."""
    module = preference(save_tiny_model(family, folder / "model", **config), **(stage or {}))
    data = data_with_one_long_pair(folder, longest)
    quiet_trainer(folder, max_steps=1).fit(module, data)
    return module, data


def assert_exact(module: Any, data: PreferenceData) -> None:
    """Every pair of the data in micro-batches as training makes them, against rows by themselves."""
    data.batch_size = 21
    loader = data.train_dataloader()
    loader.epoch = 7
    (batch,) = list(loader)
    assert max(len(pair.prompt) for pair in batch.share) > 30
    policy = module.policy.eval()
    with torch.no_grad():
        seen = response_logps(policy, module.micro_batches(batch), len(batch.share), 2, "cpu")
    with torch.no_grad(), policy.as_loaded():
        for pair, sides in zip(batch.share, seen.tolist(), strict=True):
            for side, score in zip((pair.chosen, pair.rejected), sides, strict=True):
                assert score == pytest.approx(float(plain_logps(policy.model, pair.prompt, side).sum()), abs=1e-3)


@pytest.mark.parametrize("family", ["mistral_window", "gemma2"])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_windows_that_follow_the_pair_stay_packed(family: str, attention: str, tmp_path: Path) -> None:
    attention = "eager" if family == "gemma2" and attention == "sdpa" else attention
    module, data = start(tmp_path, family, stage={"attention": attention})
    assert module.policy.layout == "packed"
    assert_exact(module, data)


def test_a_window_that_counts_places_in_the_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt_neo", {"model_type": "gpt_neo"})  # no other test shall meet it
    local: dict[str, Any] = {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 8,
    }
    with caplog.at_level(logging.WARNING, logger="lightning_modules"):
        module, data = start(tmp_path, "gpt_neo", **local)
    assert module.policy.layout == "separate"
    assert "changes this model's log-probabilities by" in caplog.text
    assert_exact(module, data)
    with pytest.raises(UserError, match=r"model.layout: .* set it to auto or separate"):
        start(tmp_path, "gpt_neo", stage={"layout": "packed"}, **local)
    # where no pair is longer than the window, rows hold several
    local["window_size"] = 200
    assert start(tmp_path, "gpt_neo", **local)[0].policy.layout == "packed"


def test_a_window_that_acts_through_the_mask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that tells its attention nothing of the window, as one that comes with code of its own may."""
    from transformers.models.mistral import modeling_mistral

    class Untold(modeling_mistral.MistralAttention):
        def forward(self, *args: Any, **options: Any) -> Any:
            interface = modeling_mistral.ALL_ATTENTION_FUNCTIONS.get_interface

            def without_window(*named: Any) -> Any:
                attend = interface(*named)
                return lambda *a, sliding_window=None, **k: attend(*a, **k)

            with monkeypatch.context() as patch:
                patch.setattr(modeling_mistral.ALL_ATTENTION_FUNCTIONS, "get_interface", without_window)
                return super().forward(*args, **options)

    monkeypatch.setattr(modeling_mistral, "MistralAttention", Untold)
    module, data = start(tmp_path, "mistral_window", sliding_window=12)
    assert (module.policy.attention, module.policy.layout) == ("sdpa", "packed")
    assert_exact(module, data)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    ],
)
def test_rotary_positions_scaled_by_the_longest_row(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"depend on the other rows .* lower data.max_length to"):
        start(tmp_path, family, **config)
    # where no response ends beyond the 32 positions, nothing is scaled
    module, data = start(tmp_path, family, longest=24, **config)
    assert module.policy.layout == "packed"
    assert max(data.longest) > 25


def test_the_stretched_pair_has_the_longest_sizes() -> None:
    share = [TokenisedPair(np.array([5, 6]), np.array([7]), np.array([8, 2]))]
    # pairs as the data may hold them: prompt, chosen, rejected
    for p, c, r in [(1, 1, 1), (100, 900, 900), (500, 500, 10), (990, 10, 10), (3, 1, 40), (7, 9, 0)]:
        tokens, row = p + c + r, p + max(c, r)
        pair = stretched_pair(share, tokens, row)
        parts = [0 if part is None else len(part) for part in pair]
        assert sum(parts) == tokens
        assert parts[0] + max(parts[1:]) == row
        assert min(parts[:2]) > 0
        assert (pair.rejected is None) == (r == 0)
        assert set(pair.prompt.tolist()) <= {2, 5, 6, 7, 8}
        beside = short(tokens, row)
        assert beside[0] <= tokens
        stretched_pair(share, *beside)
