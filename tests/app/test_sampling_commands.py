"""generate → judge → report on a tiny model, and what they say to wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import plain_logps
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.commands.generate import generate
from app.commands.judge import aligned, judge, summary, win_rate
from app.commands.report import report
from app.core.errors import UserError
from app.core.intervals import bootstrap_mean, wilson
from datamodules.controlled_task import preference_pairs


@pytest.fixture(scope="module")
def samples(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    generate(tiny_llama, str(folder / "a.jsonl"), count=12, batch_size=5, reference=tiny_llama)
    return folder / "a.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_carry_their_exact_logp(samples: Path, tiny_llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rows = read(samples)
    assert len(rows) == 12
    assert len({row["prompt_id"] for row in rows}) == 12
    for row in rows:
        prompt, response = np.array(row["prompt_ids"]), np.array(row["response_ids"])
        assert prompt.tolist() == tokenizer(row["prompt"])["input_ids"]
        assert row["response"] == tokenizer.decode(
            response[: -1 if row["finished"] else None], skip_special_tokens=True
        )
        assert row["finished"] == (response[-1] == tokenizer.eos_token_id)
        assert len(response) == row["tokens"]
        assert row["logp"] == pytest.approx(plain_logps(model, prompt, response).double().sum().item(), abs=1e-4)
        assert row["reference_logp"] == pytest.approx(row["logp"], abs=1e-6)


def test_samples_depend_on_the_seed_alone(
    samples: Path, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tiny_llama, str(tmp_path / "again.jsonl"), count=12, batch_size=5, reference=tiny_llama)
    assert read(tmp_path / "again.jsonl") == read(samples)
    assert re.search(r"mean of logp − reference_logp: \S+ ± \S+ \(standard", capsys.readouterr().out)
    generate(tiny_llama, str(tmp_path / "other.jsonl"), count=12, batch_size=5, seed=1)
    assert "reference" not in capsys.readouterr().out
    assert [row["prompt"] for row in read(tmp_path / "other.jsonl")] != [row["prompt"] for row in read(samples)]


def test_judge_scores_a_file_against_itself_as_even(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, rivals = aligned(str(samples), str(samples))
    assert win_rate(rows, rivals).mean == 0.5
    assert summary(rows)["KL to the reference"].mean == pytest.approx(0, abs=1e-6)
    judge([str(samples), str(samples)])
    assert "0.500 [0.500, 0.500]" in capsys.readouterr().out


def test_judge_sees_the_better_answers() -> None:
    pairs = preference_pairs(20, seed=0, flip_rate=0.0)
    better, worse = (
        [{"prompt_id": pair.pair_id, "prompt": pair.prompt, "response": getattr(pair, side)} for pair in pairs]
        for side in ("chosen", "rejected")
    )
    assert win_rate(better, worse).mean == 1.0
    assert win_rate(worse, better).mean == 0.0
    with pytest.raises(UserError, match=r"default judge: `report` has no other, leave --baseline out\.$"):
        summary([row | {"prompt": "hi"} for row in better])


def test_files_for_other_prompts_are_refused(samples: Path, tiny_llama: str, tmp_path: Path) -> None:
    generate(tiny_llama, str(tmp_path / "b.jsonl"), count=5, seed=3)
    with pytest.raises(UserError, match="different prompts"):
        aligned(str(samples), str(tmp_path / "b.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"prompt_id": 1}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:1"):
        aligned(str(tmp_path / "broken.jsonl"), str(samples))


def test_wrong_settings_are_refused(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jsonl"):
        generate(tiny_llama, str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="temperature"):
        generate(tiny_llama, str(tmp_path / "a.jsonl"), temperature=-1.0)
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        generate(tiny_llama, str(tmp_path / "a.jsonl"), prompts="nowhere.jsonl")
    assert not list(tmp_path.iterdir())


def test_report_draws_and_tells_the_drop_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "audit").mkdir(parents=True)
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar("beta/base", 0.1, 1)
        writer.add_scalar("val/reward_accuracy", 0.75, 1)
    rows = [
        {
            "step": step,
            "pair_id": f"p{step}-{pair}",
            "gap": step * 0.1 + pair - 2,
            "log_weight": 0.0,
            "kept": pair != 0,
            "beta": 0.1,
            "running_mean": step * 0.1,
            "running_std": 1.0,
            "flipped": pair == 0,
        }
        for step in range(6)
        for pair in range(5)
    ]
    pd.DataFrame(rows).to_parquet(run / "audit" / "steps.parquet")
    report([str(run)], out=str(tmp_path / "figure.png"))
    shown = capsys.readouterr().out
    assert "1.000 [0.610, 1.000]" in shown  # each of the six flipped pairs was dropped
    assert "0.750" in shown
    assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match="PairAudit"):
        report([str(tmp_path)], out=str(tmp_path / "figure.png"))
    with pytest.raises(UserError, match=r"\.png"):
        report([str(run)], out=str(tmp_path / "figure.pdf"))


def test_bootstrap_interval_covers_the_mean_and_shrinks() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 4000)
    few, many = bootstrap_mean(values[:100]), bootstrap_mean(values)
    assert many.low < 2.0 < many.high
    assert many.high - many.low < few.high - few.low
    # the normal approximation of the interval's width, within a tenth
    assert many.high - many.low == pytest.approx(2 * 1.96 / np.sqrt(4000), rel=0.1)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean(np.array([]))


def test_prompts_that_are_left_out_are_counted(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = preference_pairs(1, seed=0)[0].prompt
    good = json.dumps({"prompt": question, "chosen": " yes .", "rejected": " no ."})
    (tmp_path / "pairs.jsonl").write_text(f"{good}\nnot json\n")
    generate(tiny_llama, str(tmp_path / "out.jsonl"), prompts=str(tmp_path / "pairs.jsonl"), count=3)
    shown = capsys.readouterr().out
    assert "1 prompts of the 3 asked for" in shown
    assert "pairs.jsonl:2" in shown
    assert len(read(tmp_path / "out.jsonl")) == 1


def test_resampling_in_parts_changes_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=501)
    whole = bootstrap_mean(values)
    monkeypatch.setattr("app.core.intervals.MOST_DRAWS", 7 * 501 + 5)
    assert bootstrap_mean(values) == whole


def test_the_interval_of_a_share() -> None:
    # Wilson's interval for 8 of 10, by hand: (0.8 + z²/20 ± z·√(0.016 + z²/400)) / (1 + z²/10), z = 1.96
    assert wilson(0.8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 5).high == 1.0
    with pytest.raises(ValueError, match="no values"):
        wilson(0.5, 0)
