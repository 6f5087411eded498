"""Nothing degenerate in the data ends a run: three steps of the real command, finite weights, the right audit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import audit_of, write_config

from app.main import main

RUN = Path("runs") / "run"
STEPS, KEEP, ALPHA, MOMENTUM, BETA0, SIGMA_FLOOR = 3, 0.6, 0.6, 0.9, 0.1, 1e-6
ANIMALS = ["fox", "owl", "goat", "wolf", "lion", "eagle", "otter", "bear"]


def pair(number: int, prompt: str = "tell me", chosen: str = "", rejected: str = "the owl now") -> dict[str, str]:
    return {
        "pair_id": f"pair-{number}",
        "prompt": prompt,
        "chosen": chosen or f"the {ANIMALS[number % 8]} , {ANIMALS[number // 8 % 8]}",
        "rejected": rejected,
    }


def fit(folder: Path, model: str, rows: list[dict[str, str]], monkeypatch: Any, *options: str, **data: Any) -> Path:
    """Three steps on `rows` in `folder`; returns the folder of the run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(folder)
    data = {"batch_size": 4, "on_bad_row": "skip", "max_length": 24, "max_prompt_length": 12, **data}
    write_config(folder, model, path="pairs.jsonl", **data)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    length = ("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "1")
    main(["fit", "--config", "config.yaml", *length, *options])
    return folder / RUN


def assert_sound(run: Path) -> None:
    """Finite weights and optimizer state, and M0, σ, k and β that follow from the gap column by the formulas."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == STEPS
    tensors = list(state["state_dict"].values())
    tensors += [v for s in state["optimizer_states"][0]["state"].values() for v in s.values()]
    assert all(bool(torch.isfinite(torch.as_tensor(tensor)).all()) for tensor in tensors)
    table = audit_of(run).to_pandas()
    assert sorted(table["step"].unique()) == list(range(1, STEPS + 1))
    mean = std = 0.0
    spreads = 0  # batches that had a spread: a single pair has none
    for step, rows in table.groupby("step"):
        gaps, kept = rows["gap"].to_numpy(), rows["kept"].to_numpy()
        assert np.isfinite(gaps).all()
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gaps.mean()
        if len(gaps) > 1:
            std, spreads = MOMENTUM * std + (1 - MOMENTUM) * gaps.std(), spreads + 1
        m0 = mean / (1 - MOMENTUM ** int(step))
        sigma = std / (1 - MOMENTUM**spreads) if spreads else math.nan
        np.testing.assert_allclose(rows["running_mean"], m0, atol=1e-9)
        np.testing.assert_allclose(rows["running_std"].astype(float), sigma, atol=1e-9)
        weight = -((gaps - m0) ** 2) / (2 * sigma**2) if sigma > SIGMA_FLOOR else np.zeros_like(gaps)
        np.testing.assert_allclose(rows["log_weight"], weight, atol=1e-6)
        assert kept.sum() == min(max(math.floor(len(gaps) * KEEP + 1e-9), 1), len(gaps))
        beta = max(1e-3, BETA0 * (1 + ALPHA * (gaps[kept].mean() - m0)))
        np.testing.assert_allclose(rows["beta"], beta, atol=1e-9)


# rows, settings of the data, pairs of each step
CASES: dict[str, tuple[list[dict[str, str]], dict[str, Any], list[int]]] = {
    "one pair": ([pair(0)], {}, [1, 1, 1]),
    "two pairs": ([pair(0), pair(1)], {}, [2, 2, 2]),
    "batches of one": ([pair(n) for n in range(4)], {"batch_size": 1}, [1, 1, 1]),
    "batches of two": ([pair(n) for n in range(5)], {"batch_size": 2}, [2, 2, 1]),
    "one pair many times": ([pair(0) | {"pair_id": f"copy-{n}"} for n in range(8)], {}, [4, 4, 4]),
    "one token each": ([pair(n, " .", f" {name}", " .") for n, name in enumerate(ANIMALS)], {}, [4, 4, 4]),
    "prompts that fill the length": ([pair(n, "tell me now " * 30) for n in range(8)], {}, [4, 4, 4]),
    "responses beyond the length": (
        [pair(n, chosen=f"the {name} " * 30, rejected="owl me " * 30) for n, name in enumerate(ANIMALS)],
        {},
        [4, 4, 4],
    ),
    "prompts and responses beyond it": (
        [pair(n, "tell me now " * 30, f"the {name} " * 30, "owl me " * 30) for n, name in enumerate(ANIMALS)],
        {},
        [4, 4, 4],
    ),
    "some identical pairs": (
        [pair(n, chosen="the owl now") if n % 2 else pair(n) for n in range(8)],
        {},
        [4, 4, 4],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_three_steps(name: str, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, settings, sizes = CASES[name]
    run = fit(tmp_path, tiny_llama, rows, monkeypatch, **settings)
    assert_sound(run)
    assert audit_of(run).group_by("step").aggregate([("pair_id", "count")])["pair_id_count"].to_pylist() == sizes


def test_a_policy_that_stays_the_reference(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = ("--model.optimizer.init_args.lr", "0", "--model.optimizer.init_args.weight_decay", "0")
    run = fit(tmp_path, tiny_llama, [pair(n) for n in range(8)], monkeypatch, *still)
    assert_sound(run)
    table = audit_of(run).to_pandas()
    assert (table["gap"] == 0).all()
    assert (table["beta"] == BETA0).all()


def test_what_is_cut_or_left_out_is_counted(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [pair(0), pair(1, chosen="the owl now"), pair(2, "tell me now " * 30), pair(3, chosen="the fox " * 30)]
    fit(tmp_path, tiny_llama, rows, monkeypatch)
    line = next(line for line in caplog.messages if line.startswith("train: "))
    assert line.startswith("train: 3 pairs; 4 rows read")
    for note in (
        "1 prompt truncated (first: pair-2)",
        "1 chosen truncated (first: pair-3)",
        "1 skipped: chosen equals rejected",
    ):
        assert note in line


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([pair(n, chosen="the owl now") for n in range(4)], {}, "4 skipped: chosen equals rejected"),
        (
            [pair(n, chosen="the fox " * 30 + "me", rejected="the fox " * 30) for n in range(4)],
            {},
            "identical after",
        ),
        ([], {}, "pairs.jsonl"),
    ],
)
def test_nothing_to_learn_from_is_said_in_one_sentence(
    rows: list[dict[str, str]],
    settings: dict[str, Any],
    reason: str,
    tiny_llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, tiny_llama, rows, monkeypatch, **settings)
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("beta-dpo: ")
    assert reason in said
