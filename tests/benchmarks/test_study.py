"""The study: its questions, its table, the arithmetic of its verdicts, and docs/study.md from the table."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from app.method.dynamic_beta import Moments
from benchmarks.study.page import DOCS, documents, linked
from benchmarks.study.plan import (
    JUDGED,
    QUESTIONS,
    QUICKSTARTS,
    SEEDS,
    TASKS,
    TUNING,
    TUNING_SEEDS,
    Run,
    judged,
    tuning,
)  # fmt: skip
from benchmarks.study.runs import make_row, make_sft_model, measured
from benchmarks.study.shared_beta import SharedBeta
from benchmarks.study.table import (
    COLUMNS,
    SIGNS,
    Difference,
    Rows,
    Untuned,
    append_result,
    read_results,
    reward_within,
    runs_of,
)  # fmt: skip
from callbacks import BetaScheduler

ROOT = Path(__file__).parents[2]
RUN = Run("controlled", JUDGED, SEEDS[0], "mixed", 0.0, "sigmoid", "beta_dpo", 0.3, 3.6e-4)


def test_the_page_follows_from_the_table_and_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.study.page.svg", lambda chart: "")  # drawing them takes seconds
    for name, text in documents(read_results()).items():
        found = (DOCS / name).read_text(encoding="utf-8")
        assert found == text if not name.endswith(".svg") else found, f"{name}: python -m benchmarks.study --page"


def test_every_run_has_one_row_for_each_processor() -> None:
    table = read_results()
    assert table.processor.notna().all()
    rows = list(zip(runs_of(table), table.processor, strict=True))
    assert len(set(rows)) == len(rows)


def test_the_quickstart_is_sampled_at_its_end() -> None:
    data = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    assert QUICKSTARTS[0].sampled == [data["pairs"] // data["batch_size"]]


def test_no_run_of_the_quickstart_falls_apart() -> None:
    table = read_results()
    runs = table[table.task == "quickstart"]
    assert runs.malformed.max() < 0.08
    assert runs.kl.max() < 2


def test_settings_are_chosen_on_other_seeds_than_they_are_judged_on() -> None:
    assert not set(TUNING_SEEDS) & set(SEEDS)
    for question in QUESTIONS:
        assert {len(runs) for runs in question.comparisons.values()} <= {2, 4}  # as SIGNS adds them up


def tuning_rows(run: Run, seeds: tuple[int, ...], reward: dict[tuple[float, float], float]) -> list[dict]:
    """Return made-up rows of tuning with the given rewards, by settings."""
    place = (run.data, run.flip_rate, run.loss, run.arm)
    return [
        row(Run(run.task, TUNING, seed, *place, *settings), value)
        for settings, value in reward.items()
        for seed in seeds
    ]


def tuned(run: Run) -> list[dict]:
    """Return made-up rows of tuning after which a run has its smallest β0 and rate."""
    grid = [(one.beta0, one.learning_rate) for one in tuning(run)]
    return tuning_rows(run, TUNING_SEEDS, {at: 1.0 + (at == grid[0]) for at in grid})


def test_settings_are_chosen_in_two_rounds_and_runs_follow_from_them() -> None:
    question = QUESTIONS[0]
    static = judged("dpo", flip_rate=0.0)
    assert question.comparisons["β-DPO − static β, flip rate 0"][1] == static
    first = Rows(read_results().head(0)).missing(question.runs, question.seeds)
    assert {run.phase for run in first} == {TUNING}
    assert {run.seed for run in first} == {TUNING_SEEDS[0]}
    assert len(first) == 6 * 6  # settings × runs
    reward = {(base, rate): 3 + base - 1000 * rate for base in (0.1, 0.3, 1.0) for rate in (1.8e-4, 3.6e-4)}
    rows = tuning_rows(static, TUNING_SEEDS[:1], reward)
    with pytest.raises(Untuned) as second:
        Rows(pd.DataFrame(rows)).chosen(static)
    assert {(run.beta0, run.seed) for run in second.value.args[0]} == {(1.0, seed) for seed in TUNING_SEEDS[1:]}
    # the second by the first seed alone turns out better over all five
    better = {(1.0, 1.8e-4): 3.0, (1.0, 3.6e-4): 3.9}
    rows += tuning_rows(static, TUNING_SEEDS[1:], better)
    table = pd.DataFrame(rows)
    found = Rows(table).chosen(static)
    assert (found.beta0, found.learning_rate) == (1.0, 3.6e-4)
    ours = Rows(table).chosen(judged("dpo", "beta", flip_rate=0.0))
    assert (ours.phase, ours.seed, ours.learning_rate) == (JUDGED, -1, 3.6e-4)
    assert ours.options == "--control Control --control.by shuffled_beta"
    # a seed whose settings were run on two processors is run again, whole, on this one
    with pytest.raises(Untuned) as mixed:
        Rows(table.assign(processor=[*"ab", *table.processor[2:]])).chosen(static)
    assert {run.seed for run in mixed.value.args[0]} == {TUNING_SEEDS[0]}
    assert len(mixed.value.args[0]) == 6
    elsewhere = [one | {"processor": "other"} for one in rows if one["seed"] == TUNING_SEEDS[1]]
    moved = [one for one in rows if one["seed"] != TUNING_SEEDS[1]] + elsewhere
    assert Rows(pd.DataFrame(moved)).chosen(static) == found


def test_a_collapsed_run_counts_as_its_sft_model_in_the_plan_alone() -> None:
    runs = [replace(RUN, phase=phase) for phase in (TUNING, "pilot")]
    table = pd.DataFrame([row(run, 0.0) | {"malformed": 0.9, "sft_reward": 2.2, "kl": 4.0} for run in runs])
    rows = [Rows(table).of[replace(run, seed=-1)].iloc[0] for run in runs]
    assert [row.reward for row in rows] == [2.2, 0.0]
    assert [row.per_root for row in rows] == pytest.approx([0.0, -1.1])


def test_the_page_says_what_wins_on_both_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.study.page.svg", lambda chart: "")
    rows = []
    for task, gain, seeds in (("controlled", 0.5, SEEDS), ("sentiment", 0.3, SEEDS[:8])):
        for arm, more in (("dpo", 0.0), ("beta_dpo", gain)):
            rows += tuned(judged(arm, flip_rate=0.3, task=task))
            run = Rows(pd.DataFrame(rows)).chosen(judged(arm, flip_rate=0.3, task=task))
            rows += [row(replace(run, seed=seed), 1.0 + more + 0.001 * seed) for seed in seeds]
    earlier = read_results().query("phase not in ('tuning', 'judged')")
    table = pd.DataFrame(rows)
    one = table.task == "controlled"
    for made, said, done in (
        (table, "β-DPO, flip rate 0.3 beats a tuned static β on both tasks", 76),
        (table[one], "is not known yet", 60),
    ):
        told = documents(pd.concat([earlier, made]))["study.md"]
        assert said in told
        assert f"{done} of the " in told
    assert "**better** +0.50 [+0.50, +0.50]" in told
    last = one & (table.seed == SEEDS[-1])  # a seed of the plan is not there
    assert "**better** +" not in documents(pd.concat([earlier, table[one & ~last]]))["study.md"]


def test_the_plan_fits_eight_hours_of_two_cores() -> None:
    line = [sys.executable, "-m", "benchmarks.study", "--plan"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    last = done.stdout.split("\n\n")[0].splitlines()[-1]
    assert last.startswith("| (j)")
    assert 6 < float(last.split("|")[-2]) < 8
    assert len(QUESTIONS) == 9  # of the level that they share, as the page says


def test_a_shared_beta_follows_its_own_pairs() -> None:
    gaps, kept = torch.tensor([1.0, 3.0, 5.0, 9.0, 2.0]), torch.tensor([True, True, False, True, False])
    moments = Moments(1.0, 2.0)
    beta = SharedBeta(2, 0.5).beta(0.1, gaps, kept, moments)
    assert beta.tolist() == pytest.approx([0.15, 0.15, 0.5, 0.5, 0.1])
    whole = SharedBeta(64, 0.5).beta(0.1, gaps, kept, moments)
    assert torch.equal(whole, BetaScheduler(0.5).beta(0.1, gaps, kept, moments))


def row(run: Run, reward: float, processor: str = "one") -> dict[str, object]:
    return {**dict.fromkeys(COLUMNS, 0.125), **asdict(run), "reward": reward, "processor": processor}


def test_a_run_has_one_row_and_rows_have_an_order(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    first, second = replace(RUN, seed=2), replace(RUN, seed=1, options="--data.batch_size 128")
    append_result(row(first, 1 / 3), path)
    append_result(row(second, 2.0), path)
    append_result(row(first, 3.0), path)
    table = read_results(path)
    assert runs_of(table) == [second, first]
    assert table.reward.tolist() == [2.0, 3.0]
    before = path.read_bytes()
    append_result(table.iloc[0].to_dict(), path)
    assert path.read_bytes() == before


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    table = read_results()
    path = tmp_path / "results.csv"
    for _, each in table.head(3).iterrows():
        append_result(each.to_dict(), path)
    pd.testing.assert_frame_equal(read_results(path), table.head(3), check_dtype=False)


def test_rows_of_different_processors_are_not_compared() -> None:
    pair = (judged("filter_only"), judged("dpo"))
    made = [each for run in pair for each in tuned(run)]
    run, other = map(Rows(pd.DataFrame(made)).chosen, pair)
    rows = [row(replace(run, seed=seed), reward, "one") for seed, reward in enumerate((3.0, 3.5, 4.0, 4.5))]
    rows[0]["malformed"] = rows[3]["malformed"] = 0.9  # collapsed: the first counts with .125, the last in no pair
    rows += [row(replace(other, seed=seed), 2.0, "one" if seed < 3 else "other") for seed in range(4)]
    table = Rows(pd.DataFrame(made + rows))
    result = table.result("", pair)
    end = result.by["reward"]
    assert (end.estimate.mean, end.seeds, result.collapsed) == (pytest.approx((0.125 - 2 + 1.5 + 2) / 3), 3, [1, 0])
    with pytest.raises(LookupError, match="3 pairs of rows, of 4"):
        table.result("", pair, 4)


def test_comparisons_are_sums_by_seed() -> None:
    gain = next(each for each in QUESTIONS if each.name == "best-beta").comparisons["high − low"]
    signs = {("high", 1.0): 1, ("high", 0.1): -1, ("low", 1.0): -1, ("low", 0.1): 1}
    assert {(run.data, run.beta0): sign for run, sign in zip(gain, SIGNS, strict=True)} == signs
    rows = [one for data in ("high", "low") for one in tuned(judged("dpo", data=data))]
    reward = np.random.default_rng(0).normal(3, 0.2, (4, 6))
    for run, values in zip(gain, reward, strict=True):
        chosen = Rows(pd.DataFrame(rows)).chosen(run)
        rows += [row(replace(chosen, seed=seed), float(value)) for seed, value in enumerate(values)]
    found = Rows(pd.DataFrame(rows)).result("", gain).by["reward"]
    assert found == Difference.of(np.array(SIGNS) @ reward, 0.1, len(QUESTIONS))


def test_the_highest_reward_within_a_budget() -> None:
    path = [(0.0, 2.0), (0.5, 3.0), (2.0, 1.0), (0.8, 3.2), (1.2, 3.6)]
    assert reward_within(path, 1.0) == pytest.approx(3.4)  # between the last two
    assert reward_within(path, 0.25) == pytest.approx(2.5)
    assert reward_within(path, 5.0) == 3.6
    assert reward_within([(0.0, 2.0), (0.5, 1.0)], 1.0) == 2.0  # the SFT model itself
    assert reward_within([(0.0, 2.0), (4.0, 1.0)], 1.0) == 2.0


def test_intervals_over_seeds() -> None:
    values = np.array([0.1, 0.3, 0.2, 0.4, 0.25])
    one = Difference.of(values).estimate
    error = values.std(ddof=1) / 5**0.5
    # t of 97.5 % and 95 % at 4 degrees of freedom, from a printed table
    assert (one.low, one.high) == pytest.approx((0.25 - 2.776445 * error, 0.25 + 2.776445 * error), rel=1e-5)
    edge = 0.25 + 2.131847 * error
    assert Difference.of(values, edge + 1e-6).verdict == "equal within the margin"
    assert Difference.of(values, edge - 1e-6).verdict == "better"
    wider = Difference.of(values, 0.1, 12).estimate
    assert wider.low < one.low
    assert wider.mean == one.mean
    for wrong in (values[:1], np.array([0.1, np.nan])):
        with pytest.raises(ValueError, match="at least two"):
            Difference.of(wrong, 0.1)


def test_intervals_and_tests_for_equality_hold_what_they_promise() -> None:
    random = np.random.default_rng(0)
    draws = [Difference.of(random.normal(size=5)).estimate for _ in range(1000)]
    assert np.mean([one.low <= 0 <= one.high for one in draws]) == pytest.approx(0.95, abs=0.02)
    # a true difference of just the margin is called equal in at most 5 % of the cases
    edge = [Difference.of(random.normal(0.1, 0.05, size=8), 0.1) for _ in range(1000)]
    assert np.mean([one.verdict == "equal within the margin" for one in edge]) == pytest.approx(0.05, abs=0.02)
    same = [Difference.of(random.normal(0, 0.05, size=8), 0.1) for _ in range(200)]
    assert np.mean([one.verdict == "equal within the margin" for one in same]) > 0.95


def test_verdicts() -> None:
    values = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])

    def verdict(shift: float, scale: float = 1.0, comparisons: int = 1) -> str:
        return Difference.of(shift + scale * values, 0.1, comparisons).verdict

    assert verdict(0.0) == "equal within the margin"
    assert verdict(0.05) == "equal within the margin"  # not zero, but too small to matter
    assert verdict(0.3) == "better"
    assert verdict(-0.3) == "worse"
    assert verdict(0.0, 20) == "undecided"
    assert verdict(0.09) == "better"
    assert verdict(0.05, 4) == "undecided"
    assert verdict(0.05, comparisons=50) == "undecided"


def test_headings_are_found() -> None:
    assert linked("β-DPO is robust to α, ρ") == "[β-DPO is robust to α, ρ](#β-dpo-is-robust-to-α-ρ)"


@pytest.mark.slow
def test_the_commands_of_a_run_are_listed() -> None:
    line = [sys.executable, "-m", "benchmarks.study"]
    done = subprocess.run([*line, "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("done ") == len(set(runs_of(read_results())))
    shown = subprocess.run([*line, "--show", "0"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("beta-dpo fit") == 2  # SFT and the run
    assert shown.count("beta-dpo generate") == 1 + len(TASKS["controlled"].steps)
    wrong = subprocess.run([*line, "--show", "9999"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "there is no run 9999" in wrong.stderr


@pytest.mark.slow
def test_the_printed_commands_make_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each command, as a reader gives them, against what `make study` does in one process."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    number = runs_of(read_results()).index(RUN)
    line = [sys.executable, "-m", "benchmarks.study", "--show", str(number)]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    places = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for command in shown.splitlines():
        done = subprocess.run(["bash", "-c", command], env=places, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    by_commands = measured(RUN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_sft_model(RUN)
    row = make_row(RUN)
    assert {name: row[name] for name in by_commands} == pytest.approx(by_commands, rel=1e-6, nan_ok=True)
