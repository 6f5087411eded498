"""Do every run of the study that has no row yet, then write docs/study.md (`make study`).

python -m benchmarks.study                      do all missing runs, two at a time
python -m benchmarks.study --phase development  do the missing runs of one phase
python -m benchmarks.study --list               list all runs with their numbers, and whether they are done
python -m benchmarks.study --show NUMBER        print the commands of one run
python -m benchmarks.study --again NUMBER       repeat one run and print its figures beside its row
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator

from benchmarks.study import report
from benchmarks.study.plan import PHASES
from benchmarks.study.runs import StudyRun, sft_commands
from benchmarks.study.table import FIGURES, append_result, is_done, read_results, row_of
from benchmarks.study.work import make_row, make_sft_model

Task = tuple[str, StudyRun]  # phase and run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--phase", choices=list(PHASES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    for one in ("--show", "--again"):
        parser.add_argument(one, type=int, metavar="NUMBER")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list or options.show is not None or options.again is not None:
        tasks = [task for phase in PHASES for task in tasks_of(phase)]
        number = options.show if options.again is None else options.again
        if number is not None and not 0 <= number < len(tasks):
            sys.exit(f"there is no run {number}: --list prints those from 0 to {len(tasks) - 1}")
        if options.list:
            list_runs(tasks)
        elif options.again is not None:
            do_again(*tasks[number])
        else:
            show_commands(tasks[number][1])
        return
    for phase in PHASES if options.phase is None else [options.phase]:
        carry_out(phase, options.jobs)
    if options.phase is None:
        report.main()


def tasks_of(phase: str) -> Iterator[Task]:
    return ((phase, run) for run in PHASES[phase]())


def carry_out(phase: str, jobs: int) -> None:
    """Do the missing runs of a phase, `jobs` at a time, in the order of the plan."""
    tasks, rows = list(tasks_of(phase)), read_results()
    missing = [(name, run) for name, run in tasks if not is_done(run, name, rows)]
    print(f"{phase}: {len(tasks)} runs, {len(missing)} to do", flush=True)
    if not missing:
        return
    # fork imports the libraries only once; one process per run, so that a run leaves no state to another
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(make_sft_model, dict.fromkeys(run.seed for _, run in missing), chunksize=1):
            pass
        started = time.monotonic()
        for number, row in enumerate(pool.imap_unordered(row_for, missing, chunksize=1), 1):
            append_result(row)
            left = (time.monotonic() - started) / number * (len(missing) - number) / 60
            told = f"seed {row['seed']}, {row['data']}, {row['loss']}, {row['arm']}: reward {row['reward']:.2f}"
            print(f"{number}/{len(missing)}, about {left:.0f} min left: {told}", flush=True)


def row_for(task: Task) -> dict[str, object]:
    phase, run = task
    return make_row(run, phase)


def list_runs(tasks: list[Task]) -> None:
    rows = read_results()
    for number, (phase, run) in enumerate(tasks):
        done = "done" if is_done(run, phase, rows) else "to do"
        print(f"{number:4} {phase:12} {done:5} seed {run.seed} {run.name}")


def show_commands(run: StudyRun) -> None:
    """Print the commands of a run, for the project's folder; all runs of a seed share the first three."""
    for command in [*sft_commands(run.seed), *run.commands()]:
        print("OMP_NUM_THREADS=1 beta-dpo", shlex.join(command))


def do_again(phase: str, run: StudyRun) -> None:
    """Repeat a run and print its figures beside those of the table, which does not change."""
    make_sft_model(run.seed)
    again, row = make_row(run, phase), row_of(run, phase, read_results())
    print(f"{run.id}\n{'':18} {'table':>12} {'again':>12}")
    for name in FIGURES:
        before = math.nan if row is None else float(row[name])
        print(f"{name:18} {before:12.6g} {again[name]:12.6g}")


if __name__ == "__main__":
    main()
