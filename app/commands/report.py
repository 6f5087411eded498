"""The command `beta-dpo report`, which summarises runs in a table and a page or a figure."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from app.cli.mistakes import checked_command
from app.commands.judge import aligned, print_table, short_names, summary, win_rate
from app.core.errors import UserError
from app.core.files import atomic_file, refuse_place
from app.report.page import by_row, figure, numbers_of, page
from app.report.run import SAMPLES, read_run


@checked_command
def report(runs: list[str], baseline: str | None = None, out: str | None = None) -> None:
    """Print a table that compares RUNS and write a page (.html) or a figure (.png) of β, gaps and filter.

    The page compares all runs with findings in words, charts, commands and configurations. It is one file that
    needs no network, and it lists the records that a run lacks.

    Args:
        runs: log folders of runs; the figure shows the first, which needs `PairAudit`.
        baseline: samples of the SFT model; the samples of a run are read from samples.jsonl in its folder.
        out: the .html or .png file to write, which appears only when complete; none is report.png in the first run.
    """
    if not runs:
        raise UserError("runs: give the log folder of at least one run.")
    out = out or str(Path(runs[0], "report.png"))
    replaced = refuse_place("out", out, (".html", ".png"))
    if baseline is not None and not Path(baseline).is_file():
        raise UserError(f"baseline: there is no file {baseline!r}; `beta-dpo generate` writes samples.")
    folders = [Path(folder) for folder in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("runs: the same folder is given twice.")
    read = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    if out.endswith(".png") and read[0].audit is None:
        raise UserError(f"{runs[0]} has no audit/*.parquet (PairAudit) to draw: write a page, --out x.html.")
    files = {run.name: str(run.folder / SAMPLES) for run in read if (run.folder / SAMPLES).exists()}
    if baseline is not None:
        if absent := [run.name for run in read if run.name not in files]:
            print(f"{', '.join(absent)}: no {SAMPLES} in the folder, so nothing is compared with {baseline}")
        for run in read:
            if run.name in files:
                rows, rivals = aligned(files[run.name], baseline)
                run.samples = summary(rows) | {"win rate": win_rate(rows, rivals)}
                run.baseline = summary(rivals)
        first, *others = [run.name for run in read]
        if first in files:
            rivals_of = {name: aligned(files[first], files[name]) for name in others if name in files}
            read[0].rivals = {name: win_rate(*both) for name, both in rivals_of.items()}
    table = Table("", *(run.name for run in read), title="mean [95 % interval]")
    for name, cells in by_row([numbers_of(run) for run in read]):
        table.add_row(name, *cells)
    print_table(table)
    with atomic_file(out) as temporary:
        if out.endswith(".html"):
            temporary.write_text(page(read, sampled=baseline is not None), encoding="utf-8")
        else:
            temporary.write_bytes(figure(read[0]))
    print(f"{'page' if out.endswith('.html') else 'figure'}: {out}{replaced}")
