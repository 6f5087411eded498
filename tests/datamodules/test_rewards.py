"""Rewards of a real (random) sequence classifier: scored once, in parts, and carried to M by label columns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import Recorder, controlled, preference, quiet_trainer, table_of
from transformers import AutoConfig, AutoModelForSequenceClassification

from app.core.cache import cache_root
from app.core.errors import UserError
from callbacks import BetaScheduler, ExplicitRewardGap, PairFilter, RewardGapStatistics
from datamodules import rewards as scoring_module
from datamodules.controlled_task import build_tokenizer, preference_pairs
from datamodules.describe import describe
from datamodules.preference_data import PreferenceData
from datamodules.rewards import RewardModel, RewardScoring, reward_scores
from datamodules.sources.pairs import PairStream

PAIRS = 11
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scoring_module, "_PAIRS_PER_PART", 4)


@pytest.fixture
def rewarder(tmp_path: Path) -> str:
    return save(tmp_path / "rewarder")


def save(folder: Path, seed: int = 0, template: str | None = None) -> str:
    """A random Llama with one output, over the tokens of the controlled task."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=116,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.3,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def stream(seed: int = 1) -> PairStream:
    return PairStream("pairs", lambda: {"seed": seed}, lambda _: preference_pairs(PAIRS, seed=seed))


def test_rewards_are_those_of_the_model_and_scored_once(rewarder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = reward_scores(stream(), RewardScoring(rewarder), CPU)
    pairs = preference_pairs(PAIRS, seed=1)
    assert table.column("pair_id").to_pylist() == [pair.pair_id for pair in pairs]
    alone = RewardModel(rewarder, batch_size=1, device="cpu")
    for name in ("chosen", "rejected"):
        wanted = list(alone.rewards([pair.prompt for pair in pairs], [getattr(pair, name) for pair in pairs]))
        assert table.column(f"{name}_reward").to_pylist() == pytest.approx(wanted, abs=1e-5)
    monkeypatch.setattr(scoring_module, "RewardModel", lambda *_: pytest.fail("scored again"))
    assert reward_scores(stream(), RewardScoring(rewarder), CPU).equals(table)


def test_any_change_scores_anew(rewarder: str, tmp_path: Path) -> None:
    def entries() -> int:
        return sum(path.is_dir() for path in cache_root("rewards").iterdir())

    changes = [
        (stream(), RewardScoring(rewarder)),
        (stream(2), RewardScoring(rewarder)),
        (stream(), RewardScoring(rewarder, max_length=20)),
        (stream(), RewardScoring(save(tmp_path / "other", seed=1))),
        (stream(), RewardScoring(save(tmp_path / "template", template="{{ messages[-1]['content'] }}"))),
    ]
    for number, (pairs, scoring) in enumerate(changes, 1):
        reward_scores(pairs, scoring, CPU)
        assert entries() == number
    reward_scores(stream(), RewardScoring(rewarder, batch_size=2), CPU)  # decides nothing but the speed
    assert entries() == len(changes)


def test_an_interrupted_scoring_goes_on_to_the_same_rewards(
    rewarder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = reward_scores(stream(), RewardScoring(rewarder), CPU)
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "second"))
    scored: list[str] = []
    real = scoring_module._rewards

    def interrupted(model: RewardModel, pairs: list) -> list:
        if len(scored) == 8:
            raise KeyboardInterrupt
        scored.extend(pair.pair_id for pair in pairs)
        return real(model, pairs)

    monkeypatch.setattr(scoring_module, "_rewards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reward_scores(stream(), RewardScoring(rewarder), CPU)
    assert [path.suffix for path in cache_root("rewards").iterdir() if path.is_dir()] == [".parts"]
    scored = []
    assert reward_scores(stream(), RewardScoring(rewarder), CPU).equals(whole)
    assert len(scored) == PAIRS - 8
    assert [path.suffix for path in cache_root("rewards").iterdir() if path.is_dir()] == [""]


@pytest.mark.parametrize("words", [3, 9, 10, 40])
def test_a_response_longer_than_the_limit_is_cut_as_well_and_counted(rewarder: str, words: int) -> None:
    model = RewardModel(rewarder, max_length=10)
    assert len(list(model.rewards([" red" * 8], [" fox" * words]))) == model.truncated == 1


def test_damaged_rewards_are_scored_anew(rewarder: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = reward_scores(stream(), RewardScoring(rewarder), CPU).combine_chunks().to_pydict()
    (folder,) = (path for path in cache_root("rewards").iterdir() if path.is_dir())
    file = folder / "rewards.arrow"
    file.write_bytes(file.read_bytes()[:-20])
    assert reward_scores(stream(), RewardScoring(rewarder), CPU).to_pydict() == whole
    assert "damaged entry of the cache of rewards is rebuilt" in caplog.text


def test_a_prompt_that_the_template_refuses_is_left_out_and_told(tmp_path: Path) -> None:
    refusal = "{% if messages|length > 2 %}{{ raise_exception('short ones only') }}{% endif %}"
    name = save(tmp_path / "rewarder", template=refusal + "{{ messages[0]['content'] }}")
    start, end = "\n\nHuman: the cat\n\nAssistant:", "\n\nHuman: the dog\n\nAssistant:"
    turns = [start, f"{start} yes{end}", f"{start} yes\n\nHuman: no{end}"]  # the last does not alternate
    rows = [{"chosen": f"{turn} yes .", "rejected": f"{turn} no ."} for turn in turns]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), tokenizer=name, reward_model=RewardScoring(name))
    table, chosen = table_of(data)
    assert table.pair_ids(chosen) == ["pairs.jsonl:1"]
    assert describe(table, chosen)[0].startswith("1 of 3 pairs; ")
    assert data.notes["train"][0].startswith("data.reward_model: 2 of 3 pairs are left out: its chat template")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match="refuses the prompts of all pairs"):
        data.open_table("train")


def test_an_answer_that_calls_a_tool_has_no_reward_of_its_text_alone(rewarder: str) -> None:
    text, other = preference_pairs(2, seed=1)
    calls = replace(other, chosen="", chosen_fields={"tool_calls": [{"function": {"name": "f"}}]})
    found = reward_scores(PairStream("p", lambda: {}, lambda _: [text, calls]), RewardScoring(rewarder), CPU)
    assert [one is None for one in found.column("chosen_reward").to_pylist()] == [False, True]


def test_the_rewards_reach_m_and_beta(rewarder: str, tiny_llama: str, tmp_path: Path) -> None:
    recorder = Recorder()
    hooks = [ExplicitRewardGap(), RewardGapStatistics(), PairFilter(0.6), BetaScheduler(0.6), recorder]
    data = controlled(20, reward_model=RewardScoring(rewarder))
    quiet_trainer(tmp_path, hooks, max_steps=2).fit(preference(tiny_llama, lr=0.01), data)
    pairs = {pair.pair_id: pair for pair in preference_pairs(20, seed=9, flip_rate=0.2)}
    model = RewardModel(rewarder, device="cpu")
    for decision in recorder.decisions:
        drawn = [pairs[pair_id] for pair_id in decision.pair_ids]
        prompts = [pair.prompt for pair in drawn]
        wanted = np.subtract(
            list(model.rewards(prompts, [pair.chosen for pair in drawn])),
            list(model.rewards(prompts, [pair.rejected or "" for pair in drawn])),
        )
        assert decision.discrepancy.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
        assert decision.labels["chosen_reward_in_data"] == [pair.labels["chosen_reward"] for pair in drawn]
        kept = decision.discrepancy[decision.kept].mean()
        assert decision.moments is not None
        beta = 0.1 * (1 + 0.6 * (kept - decision.moments.mean))
        assert decision.beta_used == pytest.approx(float(beta), abs=1e-9)
    validation, _ = table_of(data, "validation")
    assert "chosen_reward_in_data" not in validation.label_names  # only what is trained on is scored


def test_fine_tuning_says_that_it_needs_no_rewards() -> None:
    data = controlled(10, reward_model=RewardScoring("nowhere"))
    data.used_by = SimpleNamespace(responses=("chosen",))  # type: ignore[assignment]
    table_of(data)
    assert data.notes["train"] == ["data.reward_model has no effect on supervised fine-tuning"]
