"""The study's task of film reviews: text and rewards, on made-up reviews."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.setting import save_llama
from benchmarks.study import sentiment
from benchmarks.study.questions import pilot
from benchmarks.study.runs import TASKS, spoken
from datamodules.controlled_task import build_tokenizer


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


def test_sharpening_divides_the_logits(tmp_path: Path) -> None:
    save_llama(
        tmp_path / "model", build_tokenizer(), 5.0, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    sentiment.sharpen(tmp_path / "model", tmp_path / "sharp")
    ids = torch.arange(4, 12)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("model", "sharp")
    )
    torch.testing.assert_close(after, before / sentiment.TEMPERATURE)


def test_pairs_are_ranked_by_the_proxy_and_use_no_sample_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, weight in (("proxy", 1.0), ("gold", -1.0)):
        told = {"weights": {f"w{number}": weight * number / 40 for number in range(40)}, "bias": 0.0}
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    rows = [
        {"prompt": f"prompt {prompt}", "response": f" w{4 * prompt + copy}", "finished": (prompt, copy) != (0, 0)}
        for prompt in range(10)
        for copy in (2, 0, 3, 1)
    ]
    sentiment.write(tmp_path / "samples.jsonl", rows)
    out = tmp_path / "pairs.jsonl"
    sentiment.make_pairs(tmp_path, tmp_path / "samples.jsonl", out, "mixed", 0.5, 1)
    pairs = sentiment.read(out)
    assert "18 pairs of 10 prompts; 1 with a sample that did not end" in capsys.readouterr().out
    for high, low in zip(pairs[::2], pairs[1::2], strict=True):
        numbers = [[int(pair[side][2:]) % 4 for side in ("chosen", "rejected")] for pair in (high, low)]
        assert numbers[0] == ([0, 3] if high["flipped"] else [3, 0])
        assert numbers[1] == ([1, 2] if low["flipped"] else [2, 1])
    assert 0 < sum(pair["flipped"] for pair in pairs) < 18
    assert not any(pair["gold_agrees"] for pair in pairs)


def test_figures_of_samples(tmp_path: Path) -> None:
    for name in ("proxy", "gold"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"weights": {"fine": 2.0}, "bias": 0.0}))
    rows = [
        {"prompt": "p", "response": text, "finished": ended, "logp": -1.0, "reference_logp": -1.5}
        for text, ended in ((" fine", True), (" dull film", False))
    ]
    sentiment.write(tmp_path / "samples.jsonl", rows)
    found = sentiment.figures(tmp_path, tmp_path / "samples.jsonl")
    gold = (1 / (1 + np.exp(-2.0)) + 0.5) / 2
    assert found == pytest.approx({"gold": gold, "proxy": gold, "KL": 0.5, "finished": 0.5, "words": 1.5})


def test_the_commands_of_a_run_start_from_the_pairs_of_its_seed() -> None:
    run = next(pilot())
    commands = TASKS["sentiment"].commands(run)
    assert spoken(commands[0]).startswith("python -m benchmarks.study.sentiment pairs ")
    assert commands[1][commands[1].index("--data.path") + 1] == commands[0][4]
    assert [words[0] for words in commands[2:]] == ["export", "generate"] * 3
