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
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import astuple
from functools import partial
from typing import Any

import pandas as pd

from app.report.plot import svg
from benchmarks.study.page import PEOPLE, by_arm, frontier, paths_table, write_page
from benchmarks.study.questions import Rows, missing, pilot, plan, quickstarts, real, sizes
from benchmarks.study.runs import FIGURES, append_result, make_row, make_sft_model, read_results, runs_of, spoken
from benchmarks.study.tasks import FOLDER, TASKS, Run
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
        print(plan_table())
    elif options.list:
        for number, run in enumerate(runs):
            print(f"{number:4} {'done ' if run in rows else 'to do'} {told(run)}")
    elif options.show is not None:
        task, run = TASKS[runs[number].task], runs[number]
        for command in [*task.sft(run.seed), *task.commands(run)]:
            print(f"OMP_NUM_THREADS=1 {spoken(command)}")
    elif options.again is not None:
        do_again(runs[number], table)
    elif options.page:
        write_page(table)
    elif options.reviews:
        failed = carry_out([run for run in pilot() if run not in rows], options.jobs)
        table = read_results().query("task == 'sentiment' and phase == 'pilot'")
        print(paths_table(table))
        drawn = FOLDER / "sentiment" / "reward-against-kl.svg"
        drawn.write_text(svg(frontier(by_arm(table))), encoding="utf-8")
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
    for runs in (first, *(missing(question, rows) for question in plan()), people):
        if left := [run for run in runs if only in told(run) and run not in given_up]:
            return left
    return []


def told(run: Run) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else f"{value}" for value in astuple(run)).rstrip()


def plan_table() -> str:
    """Return runs, rows and core minutes by question; a run counts at the first question that needs it."""
    made = runs_of(read_results())
    seen: set[tuple[str, int]] = set()
    lines, hours = [], 0.0
    for question, tuning, judging in sizes():
        task = question.comparisons[0].task
        shared, *each = TASKS[task].minutes
        fresh = {(task, seed) for seed in question.seeds} - seen
        models = len(fresh) + (0 if any(t == task for t, _ in seen) else 1 if task == "sentiment" else 5)
        seen |= fresh
        minutes = models * shared + tuning * each[0] + judging * each[1]
        hours += minutes / 120
        counts = (len(question.seeds), models, tuning, judging)
        lines.append([question.title, *map(str, counts), f"{minutes:.0f}", f"{hours:.1f}"])
    people = list(real())
    minutes = len(people) * TASKS["real"].minutes[-1]
    seeds = len({run.seed for run in people})
    lines.append([PEOPLE, f"{seeds}", "0", "0", f"{len(people)}", f"{minutes:.0f}", f"{hours + minutes / 120:.1f}"])
    header = [
        "question",
        "seeds",
        "SFT models",
        "tuning runs",
        "judged runs",
        "core minutes",
        "hours of two cores, so far",
    ]
    done = sum(run.phase in ("tuning", "judged") for run in made)
    return f"{markdown(header, lines, aligned=True)}\n\n{done} runs of the plan have a row."


def carry_out(runs: list[Run], jobs: int) -> set[Run]:
    """Do runs, `jobs` at a time, and save the row of each as soon as it is done. Return those that failed."""
    for task in dict.fromkeys(run.task for run in runs):
        TASKS[task].prepare()
    print(f"{len(runs)} runs to do", flush=True)
    # fork imports the libraries only once; one process per run, so that a run leaves no state to another
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        models = {TASKS[run.task].folder(run.seed): (run.task, run.seed) for run in runs}
        without = set()
        for model, _, error in pool.imap_unordered(attempt_model, models.values()):
            if error:
                without.add(TASKS[model[0]].folder(model[1]))
                print(f"no SFT model of {model[0]}, seed {model[1]}: its runs are left out\n{error}", flush=True)
        failed = {run for run in runs if TASKS[run.task].folder(run.seed) in without}
        runs = [run for run in runs if run not in failed]
        started = time.monotonic()
        for number, (run, row, error) in enumerate(pool.imap_unordered(attempt_run, runs), 1):
            left = (time.monotonic() - started) / number * (len(runs) - number) / 60
            if error:
                failed.add(run)
                shown = f"failed:\n{error}"
            else:
                append_result(row)
                shown = f"reward {row['reward']:.2f}" if "reward" in row else f"accuracy {row['accuracy']:.2f}"
            print(f"{number}/{len(runs)}, about {left:.0f} min left: {told(run)}: {shown}", flush=True)
    return failed


def attempt(make: Callable[[Any], Any], what: Any) -> tuple[Any, Any, str]:
    """Return `what`, what is made of it, and the error, which neither ends the others nor hangs the pool."""
    try:
        return what, make(what), ""
    except (Exception, SystemExit):
        return what, None, traceback.format_exc(limit=-3)


attempt_model, attempt_run = partial(attempt, make_sft_model), partial(attempt, make_row)


def do_again(run: Run, table: pd.DataFrame) -> None:
    """Repeat a run and print its figures beside its row, of this processor if there is one; the table stays."""
    made = {
        row["processor"]: row
        for each, row in zip(runs_of(table), table.to_dict("records"), strict=True)
        if each == run
    }
    row: dict[Any, Any] = made.get(processor()) or next(iter(made.values()), {})
    TASKS[run.task].prepare()
    make_sft_model((run.task, run.seed))
    again = make_row(run)
    print(f"{told(run)}\n{'':18} {'table':>12} {'again':>12}")
    for name in FIGURES:
        before, now = (float(each.get(name, "nan")) for each in (row, again))  # type: ignore[arg-type]
        if before == before or now == now:
            print(f"{name:18} {before:12.6g} {now:12.6g}")
    if row and row["processor"] != processor():
        print(f"The row is from another processor ({row['processor']}; here {processor()}): rounding may differ.")


if __name__ == "__main__":
    main()
