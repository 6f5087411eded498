"""The study's task of film reviews: text and rewards, on made-up reviews."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from app.judges.rewards import OwnReward
from benchmarks.study import sentiment
from benchmarks.study.plan import PILOT, TASKS


def test_sentences_are_plain_and_in_two_halves() -> None:
    review = 'I saw it.<br /><br />"What a film!" said Ann &amp; Bob. It cost $4.50, e.g. nothing.'
    found = list(sentiment.sentences(review))
    assert found == ["i saw it.", "what a film! said ann bob.", "it cost 4.50, e.g. nothing."]
    long = " ".join(f"w{number}" for number in range(16))
    assert list(sentiment.halves([long, "too short"])) == [
        ("w0 w1 w2 w3 w4 w5 w6 w7", " w8 w9 w10 w11 w12 w13 w14 w15")
    ]


def test_a_reward_learns_which_words_praise() -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["good", "bad", "film", "plot"], 6)) for _ in range(300)]
    labels = [int(text.count("good") > text.count("bad")) for text in texts]
    reward = sentiment.Sentiment.fit(texts, labels)
    assert reward.score("a good film") > 0.8
    assert reward.score("a bad film") < 0.2
    assert reward.score("words never seen") == pytest.approx(reward.score(""))
    heavier = sentiment.Sentiment.fit(texts, labels, l2=100.0)
    assert abs(heavier.weights["good"]) < abs(reward.weights["good"])


def test_the_rewards_are_functions_for_judge_and_pairs(tmp_path: Path) -> None:
    (tmp_path / "gold.json").write_text(json.dumps({"weights": {"fine": 2.0}, "bias": 0.0}))
    found = OwnReward(TASKS["sentiment"].reward, {"path": str(tmp_path / "gold.json")}).rewards(
        [{"prompt_id": text, "prompt": "p", "response": text} for text in (" fine", " dull film")]
    )
    assert found == pytest.approx([1 / (1 + np.exp(-2.0)), 0.5])


def test_the_commands_of_a_run_start_from_the_pairs_of_its_seed() -> None:
    commands = [command.split() for command in PILOT[0].commands()]
    assert commands[1][commands[1].index("--data.path") + 1] == commands[0][3]
    assert [words[:2] for words in commands] == [
        ["beta-dpo", command] for command in ("pairs", "fit", *["export", "generate"] * 3)
    ]
