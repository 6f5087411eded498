"""Do every run of the study that has no row yet, then write docs/study.md (`make study`).

python -m benchmarks.study                      do all missing runs, two at a time
python -m benchmarks.study --only TEXT          do the missing runs whose line in --list holds TEXT
                                                with --redo those that have a row, too
python -m benchmarks.study --list               list all runs with their numbers, and whether they are done
python -m benchmarks.study --show NUMBER        print the commands of one run
python -m benchmarks.study --again NUMBER       repeat one run and print its figures beside its row
python -m benchmarks.study --page               write docs/study.md and its figures from the table
python -m benchmarks.study --reviews            do a few runs on film reviews and print reward against KL
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from dataclasses import astuple

from benchmarks.study.page import paths_table, write_page
from benchmarks.study.questions import pilot, planned
from benchmarks.study.runs import (
    FIGURES,
    TASKS,
    Run,
    append_result,
    make_row,
    make_sft_model,
    read_results,
    runs_of,
    spoken,
)
from benchmarks.tables import processor


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    for name in ("--show", "--again"):
        parser.add_argument(name, type=int, metavar="NUMBER")
    for name in ("--list", "--page", "--redo", "--reviews"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    table = read_results()
    rows = dict(zip(runs_of(table), table.to_dict("records"), strict=True))
    runs = list(dict.fromkeys([*rows, *planned(table), *pilot()]))
    number = options.show if options.again is None else options.again
    if number is not None and not 0 <= number < len(runs):
        sys.exit(f"there is no run {number}: --list prints those from 0 to {len(runs) - 1}")
    if options.list:
        for number, run in enumerate(runs):
            print(f"{number:4} {'done ' if run in rows else 'to do'} {told(run)}")
    elif options.show is not None:
        task, run = TASKS[runs[number].task], runs[number]
        for command in [*task.sft(run.seed), *task.commands(run)]:
            print(f"OMP_NUM_THREADS=1 {spoken(command)}")
    elif options.again is not None:
        do_again(runs[number], rows.get(runs[number], {}))
    elif options.reviews:
        if left := [run for run in pilot() if run not in rows]:
            carry_out(left, options.jobs)
        table = read_results()
        print(paths_table(table[table.task == "sentiment"]))
    else:
        if options.redo:
            carry_out([run for run in rows if options.only in told(run)], options.jobs)
        # development chooses the settings of other runs, so more may be planned once it is done
        while not options.page and (left := missing(options.only)):
            carry_out(left, options.jobs)
        if left := missing():
            sys.exit(f"{len(left)} runs have no row yet, so the page is not written: `make study` does them")
        write_page(read_results())


def missing(only: str = "") -> list[Run]:
    """Return the planned runs without a row whose description holds `only`."""
    table = read_results()
    done = set(runs_of(table))
    return [run for run in dict.fromkeys(planned(table)) if run not in done and only in told(run)]


def told(run: Run) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else f"{value}" for value in astuple(run)).rstrip()


def carry_out(runs: list[Run], jobs: int) -> None:
    """Do runs, `jobs` at a time, and put the row of each into the table as soon as it is done."""
    print(f"{len(runs)} runs to do", flush=True)
    for task in dict.fromkeys(run.task for run in runs):
        TASKS[task].prepare()
    # fork imports the libraries only once; one process per run, so that a run leaves no state to another
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(make_sft_model, dict.fromkeys((run.task, run.seed) for run in runs)):
            pass
        started = time.monotonic()
        for number, row in enumerate(pool.imap_unordered(make_row, runs), 1):
            append_result(row)
            left = (time.monotonic() - started) / number * (len(runs) - number) / 60
            shown = f"seed {row['seed']}, {row['data']}, {row['loss']}, {row['arm']}: "
            shown += f"reward {row['reward']:.2f}" if "reward" in row else f"accuracy {row['accuracy']:.2f}"
            print(f"{number}/{len(runs)}, about {left:.0f} min left: {shown}", flush=True)


def do_again(run: Run, row: dict[str, object]) -> None:
    """Repeat a run and print its figures beside those of the table, which does not change."""
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
