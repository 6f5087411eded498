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
import os
import sys
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from app.report.plot import svg
from benchmarks.study import plan
from benchmarks.study.page import frontier, write_page
from benchmarks.study.runs import carry_out, make_row, make_sft_model, make_shared
from benchmarks.study.table import FIGURES, Rows, read_results, runs_of, with_measures
from benchmarks.tables import markdown, processor

# of a run on reviews: KL and reward by checkpoint, as the DPO paper's Figure 2 draws them
PATHS = [
    *("seed", "data", "flip_rate", "arm", "beta0", "sft_reward"),
    *("kl_16", "reward_16", "kl_32", "reward_32", "kl", "reward", "within", "malformed"),
]


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
    done = dict.fromkeys(runs_of(table))
    runs = list(dict.fromkeys([*done, *plan.PILOT, *left_to_do()]))
    number = options.show if options.again is None else options.again
    if number is not None and not 0 <= number < len(runs):
        sys.exit(f"there is no run {number}: --list prints those from 0 to {len(runs) - 1}")
    if not any(options.only in str(run) for run in runs):
        sys.exit(f"--only: no run of --list holds {options.only!r}")
    if options.plan:
        rows = table.phase.isin((plan.TUNING, plan.JUDGED)).sum()
        print(f"{plan_table()}\n\n{rows} runs of the plan have a row.")
    elif options.list:
        for number, run in enumerate(runs):
            print(f"{number:4} {'done ' if run in done else 'to do'} {run}")
    elif options.show is not None:
        for command in [*runs[number].preparing(), *runs[number].commands()]:
            print(f"OMP_NUM_THREADS=1 {command}")
    elif options.again is not None:
        do_again(runs[number], table)
    elif options.page:
        write_page(table)
    elif options.reviews:
        failed = carry_out([run for run in plan.PILOT if run not in done], options.jobs)
        table = read_results().query("task == 'sentiment' and phase == 'pilot'")
        print(with_measures(table)[PATHS].to_string(index=False, float_format="{:.4g}".format))
        drawn = plan.TASKS["sentiment"].shared.with_name("reward-against-kl.svg")
        drawn.write_text(svg(frontier(table)), encoding="utf-8")
        print(drawn)
        sys.exit(1 if failed else 0)
    else:
        failed = carry_out([run for run in done if options.redo and options.only in str(run)], options.jobs)
        # tuning chooses the settings of other runs, so more are known once it is done
        while left := left_to_do(options.only, failed):
            failed |= carry_out(left, options.jobs)
        write_page(read_results())
        if "PAIRS" not in os.environ:
            print("The runs on pairs of people were left out: PAIRS=FOLDER names the folder of their files.")
        sys.exit(f"{len(failed)} runs failed and have no row" if failed else 0)


def left_to_do(only: str = "", failed: Iterable[plan.Run] = ()) -> list[plan.Run]:
    """Return the runs to do of the quickstart, or else of the first question that has some, but `failed` ones.

    Those on pairs of people need the environment variable PAIRS, the folder of their files.
    """
    table = read_results()
    rows, done, given_up = Rows(table), set(runs_of(table)), set(failed)
    first = [run for run in plan.QUICKSTARTS if run not in done]
    people = [run for run in plan.ON_PEOPLE if run not in done and "PAIRS" in os.environ]
    for runs in (first, *(rows.missing(each.runs, each.seeds) for each in plan.QUESTIONS), people):
        if left := [run for run in runs if only in str(run) and run not in given_up]:
            return left
    return []


def plan_table() -> str:
    """Return runs and core minutes by question; a run counts at the first question that needs it."""
    counted: set[object] = set()
    lines, hours = [], 0.0
    for title, runs in [*((each.title, each.judged) for each in plan.QUESTIONS), (plan.PEOPLE, plan.ON_PEOPLE)]:
        task, seeds = plan.TASKS[runs[0].task], {run.seed for run in runs}
        models = {replace(runs[0], seed=seed).sft for seed in (*plan.TUNING_SEEDS, *seeds) if task.prepare}
        tuned = {tuple(plan.tuning(replace(run, seed=-1))) for run in runs if task.bases}
        counts = [len(each - counted) for each in (models, tuned, set(runs))]
        counted |= models | tuned | set(runs)
        counts[1] *= 6 + 2 * (len(plan.TUNING_SEEDS) - 1)  # settings, on the first seed and on each of the others
        minutes = sum(count * each for count, each in zip(counts, task.minutes, strict=True))
        hours += minutes / 120
        lines.append([title, *map(str, (len(seeds), *counts)), f"{minutes:.0f}", f"{hours:.1f}"])
    columns = ("question", "seeds", "SFT models", "tuning runs", "judged runs", "core minutes")
    return markdown([*columns, "hours of two cores, so far"], lines, aligned=True)


def do_again(run: plan.Run, table: pd.DataFrame) -> None:
    """Repeat a run and print its figures beside its row, of this processor if there is one; the table stays."""
    here = processor()
    made = table[[each == run for each in runs_of(table)]].set_index("processor")
    row = made.loc[here] if here in made.index else made.iloc[0] if len(made) else pd.Series()
    make_shared(plan.TASKS[run.task])
    make_sft_model(run)
    both = pd.DataFrame({"table": row, "again": pd.Series(make_row(run))}).reindex(FIGURES).astype(float)
    print(f"{run}\n{both.dropna(how='all').to_string(float_format='{:12.6g}'.format, na_rep='nan')}")
    if len(made) and here not in made.index:
        print(f"The row is from another processor ({row.name}; here {here}): rounding may differ.")


if __name__ == "__main__":
    main()
