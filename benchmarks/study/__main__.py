"""Do every run of the study's plan that has no row yet, then write docs/study.md (`make study`).

python -m benchmarks.study                      do all missing runs, two at a time, question by question
python -m benchmarks.study --only TEXT          do the missing runs whose line in --list holds TEXT
                                                with --redo those that have a row, too
python -m benchmarks.study --plan               print the runs of each question, those done, and the hours
python -m benchmarks.study --list               list all runs with their numbers, and whether they are done
python -m benchmarks.study --show NUMBER        print the commands of one run
python -m benchmarks.study --again NUMBER       repeat one run and print its figures beside its row
python -m benchmarks.study --page               write docs/study.md and its figures from the table
python -m benchmarks.study --reviews            do a few runs on film reviews; print and draw reward against KL
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from app.report.plot import svg
from benchmarks.study.page import frontier, paths_table, write_page
from benchmarks.study.questions import PEOPLE, pilot, plan, quickstarts, real, sizes
from benchmarks.study.runs import carry_out, make_row, make_sft_model, told
from benchmarks.study.table import FIGURES, Rows, read_results, runs_of
from benchmarks.study.tasks import FOLDER, JUDGED, TASKS, TUNING, TUNING_SEEDS, Run
from benchmarks.tables import markdown, processor


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    for name in ("--show", "--again"):
        parser.add_argument(name, type=int, metavar="NUMBER")
    for name in ("--plan", "--list", "--page", "--redo", "--reviews"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    table = read_results()
    rows = Rows(table).by_run
    runs = list(dict.fromkeys([*rows, *pilot(), *left_to_do()]))
    number = options.show if options.again is None else options.again
    if number is not None and not 0 <= number < len(runs):
        sys.exit(f"there is no run {number}: --list prints those from 0 to {len(runs) - 1}")
    if options.plan:
        print(plan_table(table))
    elif options.list:
        for number, run in enumerate(runs):
            print(f"{number:4} {'done ' if run in rows else 'to do'} {told(run)}")
    elif options.show is not None:
        task, run = TASKS[runs[number].task], runs[number]
        for command in [*task.sft(run.seed), *task.commands(run)]:
            print(f"OMP_NUM_THREADS=1 {command}")
    elif options.again is not None:
        do_again(runs[number], table)
    elif options.page:
        write_page(table)
    elif options.reviews:
        failed = carry_out([run for run in pilot() if run not in rows], options.jobs)
        table = read_results().query("task == 'sentiment' and phase == 'pilot'")
        print(paths_table(table))
        drawn = FOLDER / "sentiment" / "reward-against-kl.svg"
        drawn.write_text(svg(frontier(table)), encoding="utf-8")
        print(drawn)
        sys.exit(1 if failed else 0)
    else:
        failed = carry_out([run for run in rows if options.redo and options.only in told(run)], options.jobs)
        # tuning chooses the settings of other runs, so more are known once it is done
        while left := left_to_do(options.only, failed):
            failed |= carry_out(left, options.jobs)
        write_page(read_results())
        if "PAIRS" not in os.environ:
            print("The runs on pairs of people were left out: PAIRS=FOLDER names the folder of their files.")
        sys.exit(f"{len(failed)} runs failed and have no row" if failed else 0)


def left_to_do(only: str = "", failed: Iterable[Run] = ()) -> list[Run]:
    """Return the runs to do of the quickstart, or else of the first question that has some, but `failed` ones.

    Those on pairs of people need the environment variable PAIRS, the folder of their files.
    """
    rows, given_up = Rows(read_results()), set(failed)
    first = (run for run in quickstarts() if run not in rows.by_run)
    people = (run for run in real() if run not in rows.by_run and "PAIRS" in os.environ)
    for runs in (first, *(rows.missing(question.runs, question.seeds) for question in plan()), people):
        if left := [run for run in runs if only in told(run) and run not in given_up]:
            return left
    return []


def plan_table(table: pd.DataFrame) -> str:
    """Return runs and core minutes by question; a run counts at the first question that needs it."""
    people = list(real())
    asked = [(each.title, each.runs[0].task, each.seeds, tuning, judging) for each, tuning, judging in sizes()]
    asked.append((PEOPLE, "real", sorted({run.seed for run in people}), 0, len(people)))
    seen: set[Path] = set()
    lines, hours = [], 0.0
    for title, name, seeds, tuning, judging in asked:
        task = TASKS[name]
        models = {task.folder(seed) for seed in (*TUNING_SEEDS, *seeds) if task.sft(seed)} - seen
        seen |= models
        counts = (len(models), tuning, judging)
        minutes = sum(count * each for count, each in zip(counts, task.minutes, strict=True))
        hours += minutes / 120
        lines.append([title, *map(str, (len(seeds), *counts)), f"{minutes:.0f}", f"{hours:.1f}"])
    columns = ("question", "seeds", "SFT models", "tuning runs", "judged runs", "core minutes")
    done = table.phase.isin((TUNING, JUDGED)).sum()
    return (
        f"{markdown([*columns, 'hours of two cores, so far'], lines, aligned=True)}\n\n"
        f"{done} runs of the plan have a row."
    )


def do_again(run: Run, table: pd.DataFrame) -> None:
    """Repeat a run and print its figures beside its row, of this processor if there is one; the table stays."""
    here = processor()
    made = {row["processor"]: row for _, row in table[[each == run for each in runs_of(table)]].iterrows()}
    row = made.get(here, next(iter(made.values()), {}))
    TASKS[run.task].prepare()
    make_sft_model((run.task, run.seed))
    again = make_row(run)
    print(f"{told(run)}\n{'':18} {'table':>12} {'again':>12}")
    for name in FIGURES:
        before, now = (float(each.get(name, math.nan)) for each in (row, again))
        if not math.isnan(before) or not math.isnan(now):
            print(f"{name:18} {before:12.6g} {now:12.6g}")
    if made and here not in made:
        print(f"The row is from another processor ({row['processor']}; here {here}): rounding may differ.")


if __name__ == "__main__":
    main()
