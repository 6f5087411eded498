"""Pairs of people with flips of our own: what is drawn, and what the signals of an audit find."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.study.real_pairs import found, main


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_share_of_the_labels_is_flipped_and_held_out_prompts_are_others(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n % 30}", "chosen": f"yes {n}", "rejected": "no"} for n in range(40)]
    rows += [
        {"prompt": "q 0", "chosen": "no", "rejected": "yes 0"},
        {"prompt": "q", "chosen": "y" * 99, "rejected": "no"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"), "--flip_rate", "0.2", "--seed", "5"]
    main([*words, "--count", "10", "--held_out", "12", "--longest", "50"])
    train, held_out = (lines(tmp_path / "out" / name) for name in ("train.jsonl", "held_out.jsonl"))
    assert len(train) == 10
    assert sum(bool(row["flipped"]) for row in train) == 2
    assert all((row["chosen"] == "no") == row["flipped"] for row in train)
    assert len(held_out) == 12
    assert not any(row["flipped"] for row in held_out)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    # no pair twice, in either direction
    assert len({(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in train + held_out}) == 22


def test_prompts_with_many_pairs_leave_others_to_hold_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n % 4}", "chosen": f"yes {n}", "rejected": "no"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"), "--count"]
    main([*words, "15"])
    assert len(lines(tmp_path / "out" / "held_out.jsonl")) == 20  # the other two prompts
    with pytest.raises(SystemExit, match="has 40 pairs of at most 350 characters: raise --longest"):
        main([*words, "31"])


def test_the_most_suspicious_pairs_by_each_signal(tmp_path: Path) -> None:
    """Twenty pairs, the first two flipped: the gaps know both, the untrained model one, length none."""
    ids = [f"p{n}" for n in range(20)]
    flipped = np.arange(20) < 2
    margin = np.where(np.arange(20) == 1, -2.0, 1.0)
    margin[7] = -3.0
    looks = [
        pd.DataFrame(
            {
                "step": step,
                "pair_id": ids,
                "gap": np.where(flipped, -5.0, 2.0) + 0.01 * np.arange(20),
                "kept": True,
                "reference_margin": margin,
                "flipped": flipped,
            }
        )
        for step in range(3)
    ]
    train = tmp_path / "train.jsonl"
    length = [9, 9, 1, 1, *[5] * 12, 20, 20, 20, 20]
    rows = [
        {"pair_id": each, "chosen": "c" * size, "rejected": "r" * 9} for each, size in zip(ids, length, strict=True)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = found(pd.concat(looks), train)
    assert told == pytest.approx(
        {"gaps_5": 1, "gaps_10": 1, "reference_5": 0, "reference_10": 0.5, "length_5": 0, "length_10": 0}
    )
    assert found(pd.concat(looks).assign(flipped=False), train) == {}
