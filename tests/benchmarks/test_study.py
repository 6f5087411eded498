"""The study: its plan, its table, the arithmetic of its verdicts, and docs/study.md from the table byte by byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.study.analysis import Difference, better, reward_within, robust
from benchmarks.study.plan import OWN_SEEDS, PHASES, chosen
from benchmarks.study.report import DOCS, anchor, documents
from benchmarks.study.runs import STEPS, StudyRun
from benchmarks.study.table import COLUMNS, append_result, is_done, read_results, row_of
from benchmarks.study.work import make_row, measured

ROOT = Path(__file__).parents[2]


def test_the_page_and_its_figures_follow_from_the_table() -> None:
    for name, text in documents(read_results()).items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"{name}: python -m benchmarks.study.report"


def test_every_run_of_the_plan_has_its_row_and_no_row_is_of_another() -> None:
    table = read_results()
    tasks = [(phase, run) for phase, runs in PHASES.items() for run in runs()]
    assert len(set(tasks)) == len(tasks) == len(table)
    assert len({run.id for _, run in tasks}) == len(tasks)
    assert all(is_done(run, phase, table) for phase, run in tasks)


def test_settings_were_chosen_on_other_seeds_than_they_are_judged_on() -> None:
    table = read_results()
    seeds = {phase: set(rows.seed) for phase, rows in table.groupby("phase")}
    assert not seeds["confirmation"] & (seeds["development"] | seeds["exploration"])
    assert not set(OWN_SEEDS) & (seeds["development"] | seeds["exploration"] | seeds["confirmation"])
    assert set(table[(table.phase == "extension") & (table.arm == "reference_weights")].seed) == set(OWN_SEEDS)
    rows = table[(table.phase == "development") & (table.arm == "dpo") & (table.loss == "sigmoid")]
    best = rows.sort_values("reward").iloc[-1]
    assert chosen("dpo") == (best.beta0, best.learning_rate)
    assert chosen("random_filter") == chosen("beta_dpo")


def row(run: StudyRun, reward: float) -> dict[str, object]:
    figures = dict.fromkeys(COLUMNS, 0.125)
    return {**figures, "phase": "development", **run.settings(), "reward": reward}


def test_a_run_has_one_row_and_rows_have_an_order(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    first, second = (StudyRun(seed, "mixed", 0.15, "dpo", 0.1, 2.4e-4) for seed in (2, 1))
    append_result(row(first, 1 / 3), path)
    append_result(row(second, 2.0), path)
    append_result(row(first, 3.0), path)
    table = read_results(path)
    assert table.seed.tolist() == [1, 2]
    assert table.reward.tolist() == [2.0, 3.0]
    assert is_done(first, "development", table)
    assert not is_done(first, "confirmation", table)
    assert not is_done(StudyRun(2, "mixed", 0.15, "dpo", 0.3, 2.4e-4), "development", table)
    found = row_of(second, "development", table)
    assert found is not None
    assert found.reward == 2.0
    before = path.read_bytes()
    append_result(table.iloc[0].to_dict(), path)
    assert path.read_bytes() == before


def test_the_highest_reward_within_a_budget() -> None:
    path = [(0.0, 2.0), (0.5, 3.0), (2.0, 1.0), (0.8, 3.2), (1.2, 3.6)]
    assert reward_within(path, 1.0) == pytest.approx(3.4)  # between the last two
    assert reward_within(path, 0.25) == pytest.approx(2.5)
    assert reward_within(path, 5.0) == 3.6
    assert reward_within([(0.0, 2.0), (0.5, 1.0)], 1.0) == 2.0  # the SFT model itself
    assert reward_within([(0.0, 2.0), (4.0, 1.0)], 1.0) == 2.0


def test_intervals_over_seeds() -> None:
    values = np.array([0.1, 0.3, 0.2, 0.4, 0.25])
    one = Difference.of(values)
    half = 2.776445 * values.std(ddof=1) / 5**0.5  # t of 97.5 % at 4 degrees of freedom, from a printed table
    assert (one.low, one.high) == pytest.approx((0.25 - half, 0.25 + half), rel=1e-5)
    wider = Difference.of(values, 12)
    assert wider.low < one.low < one.bootstrap[0]
    assert wider.mean == one.mean
    with pytest.raises(ValueError, match="two"):
        Difference.of(values[:1])


def test_intervals_hold_what_they_promise() -> None:
    random = np.random.default_rng(0)
    draws = [Difference.of(random.normal(size=5)) for _ in range(1000)]
    assert np.mean([one.low <= 0 <= one.high for one in draws]) == pytest.approx(0.95, abs=0.02)


def test_verdicts() -> None:
    def interval(low: float, high: float) -> Difference:
        return Difference((low + high) / 2, low, high, 5, (low, high))

    above, below, open_ = interval(0.1, 0.2), interval(-0.2, -0.1), interval(-0.1, 0.1)
    assert better(above, open_) == better(open_, above) == better(above, above) == "holds here"
    assert better(below, open_) == better(open_, below) == "does not hold here"
    assert better(open_, open_) == better(above, below) == better(below, above) == "cannot be decided here"
    assert robust([open_, above]) == "holds here"
    assert robust([open_, interval(0.1, 0.3)]) == "cannot be decided here"
    assert robust([open_, interval(0.25, 0.3)]) == "does not hold here"


def test_headings_are_found() -> None:
    assert anchor("β-DPO is robust to α and ρ") == "β-dpo-is-robust-to-α-and-ρ"


@pytest.mark.slow
def test_the_commands_of_a_run_are_listed() -> None:
    line = [sys.executable, "-m", "benchmarks.study"]
    done = subprocess.run([*line, "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(read_results())
    shown = subprocess.run([*line, "--show", "0"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("beta-dpo fit") == 2  # SFT and the run
    assert shown.count("beta-dpo generate") == 1 + len(STEPS)
    wrong = subprocess.run([*line, "--show", "9999"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "there is no run 9999" in wrong.stderr


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    table = read_results()
    path = tmp_path / "results.csv"
    for _, each in table.head(3).iterrows():
        append_result(each.to_dict(), path)
    pd.testing.assert_frame_equal(read_results(path), table.head(3))


@pytest.mark.slow
def test_the_printed_commands_make_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each command, as a reader gives them, against what `make study` does in one process."""
    run = StudyRun(3, "mixed", 0.15, "beta_dpo", 0.3, 2.4e-4)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    line = [sys.executable, "-m", "benchmarks.study", "--show"]
    number = next(i for i, other in enumerate(of for runs in PHASES.values() for of in runs()) if other == run)
    shown = subprocess.run([*line, str(number)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    places = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for command in shown.splitlines():
        done = subprocess.run(["bash", "-c", command], env=places, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    by_commands = measured(run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = make_row(run, "development")
    assert {name: row[name] for name in by_commands} == pytest.approx(by_commands, rel=1e-6, nan_ok=True)
