"""Rewards in batches are those of one plain forward pass each; what is no reward model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import save_reward_model, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.core.errors import UserError
from datamodules.controlled_task import preference_pairs
from datamodules.records import Message
from datamodules.rewards import RewardModel

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'Human : ' or 'Assistant : ' }}"
    "{{ m['content'] }} {% endfor %}"
)


@torch.no_grad()
def plain_reward(folder: str, ids: list[int]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return float(model.score(hidden))


def test_rewards_in_batches_are_those_of_one_text_each(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "rm")
    model, tokenizer = RewardModel(folder, batch_size=3), AutoTokenizer.from_pretrained(folder)
    pairs = preference_pairs(7, seed=0)
    responses = [pair.chosen[: 10 + 9 * number] for number, pair in enumerate(pairs)]  # of all lengths
    found = list(model.rewards([pair.prompt for pair in pairs], responses))
    wanted = [
        plain_reward(folder, tokenizer(p.prompt, r)["input_ids"]) for p, r in zip(pairs, responses, strict=True)
    ]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 3) for value in found}) == 7
    assert model.truncated == 0


def test_a_dialogue_goes_through_the_chat_template(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "rm", template=TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dialogue = (Message("user", "the cat is red"), Message("assistant", "yes"), Message("user", "the dog"))
    transcript = "\n\nHuman: the cat is red\n\nAssistant: yes\n\nHuman: the dog\n\nAssistant:"
    text = "Human : the cat is red Assistant : yes Human : the dog Assistant : no "
    wanted = plain_reward(folder, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert list(RewardModel(folder).rewards([dialogue, transcript], [" no", "no"])) == pytest.approx(
        [wanted] * 2, abs=1e-5
    )
    with pytest.raises(UserError, match="not user, user"):
        list(RewardModel(folder).rewards(["\n\nHuman: a\n\nHuman: b\n\nAssistant:"], ["c"]))
    with pytest.raises(UserError, match="no chat template"):
        list(RewardModel(save_reward_model(tmp_path / "plain")).rewards([dialogue], ["no"]))


def test_a_text_beyond_the_limit_loses_its_front_and_is_counted(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "rm")
    model, tokenizer = RewardModel(folder), AutoTokenizer.from_pretrained(folder)
    long, answer = "Human : " + "the cat is red " * 30, "yes the dog"
    (found,) = model.rewards([long], [answer])
    assert model.truncated == 1
    whole = tokenizer(long, answer)["input_ids"]
    assert found == pytest.approx(plain_reward(folder, whole[-64:]), abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    for folder in (
        save_reward_model(tmp_path / "two", outputs=2),
        save_tiny_model("llama", tmp_path / "causal"),  # would get a random classifier
        str(tmp_path / "nowhere"),
    ):
        with pytest.raises(UserError, match="reward model"):
            RewardModel(folder)


def test_adapters_of_a_reward_model_are_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds adapters: merge them into their model"):
        RewardModel(str(tmp_path))
