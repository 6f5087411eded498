"""docs/study.md and its figures, and README's table of the quickstart, from the table alone; by templates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from app.core.files import atomic_file
from app.report.plot import DASHES, Interval, Line, axis, intervals, lines, run_colour, side_by_side, svg
from benchmarks.study import real_pairs
from benchmarks.study.plan import JUDGED, ON_PEOPLE, PEOPLE, QUESTIONS, QUICKSTARTS, TASKS, TUNING, Question
from benchmarks.study.table import KEY, Difference, Result, Rows, path_of, runs_of
from benchmarks.tables import ROOT

DOCS = ROOT / "docs"
COLOURS = {"better": "good", "worse": "act", "equal within the margin": "link", "undecided": "quiet"}
MEANS = {"reward": 2, "kl": 2, "malformed": 3, "dropped_flipped": 2, "dropped_clean": 2}  # digits, by measure
COUNTS = ("collapsed", "runs", "collapsed_in_tuning", "runs_in_tuning")
Answers = Sequence[tuple[Question, Sequence[Result]]]


def write_page(table: pd.DataFrame) -> None:
    for name, content in documents(table).items():
        with atomic_file(DOCS / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
        print(DOCS / name)


def documents(table: pd.DataFrame) -> dict[str, str]:
    """Return the content of every generated file, by its path below docs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, mark, rest = readme.partition("<!-- quickstart -->\n")
    readme = before + mark + quickstart(table) + rest[rest.index("<!-- end -->") :]
    rows = Rows(table)
    answers = list(answered(rows))
    figures = {f"study/{question.name}.svg": svg(forest(results)) for question, results in answers}
    tables = {"study/settings.csv": settings(answers, rows), "../README.md": readme}
    return {"study.md": study(answers, table), **tables, **figures}


def answered(rows: Rows) -> Iterator[tuple[Question, Sequence[Result]]]:
    """Yield the questions with their results, those of comparisons that have all the seeds of the plan."""
    for question in QUESTIONS:
        results = []
        for label, runs in question.comparisons.items():
            with contextlib.suppress(LookupError):
                results.append(rows.result(label, runs, len(question.seeds)))  # before, a verdict would look ahead
        if results:
            yield question, results


def rendered(template: str, **values: Any) -> str:
    """Return the text of a template beside this file."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(Path(__file__).with_name(template).read_text(encoding="utf-8"))
    words = {"over_seeds": over_seeds, "told_verdict": told_verdict, "linked": linked, "Difference": Difference}
    return text.render(any=any, **words, **values)


def quickstart(table: pd.DataFrame) -> str:
    """Return README's table of the quickstart: means over seeds, differences paired by seed, and who is ahead."""
    runs = table[[run in QUICKSTARTS for run in runs_of(table)]]
    usual = runs[runs.options == ""]
    ours, theirs = (usual[usual.arm == arm].set_index("seed") for arm in ("beta_dpo", "dpo"))
    return rendered("quickstart.md", ours=ours, theirs=theirs, runs=runs)


def study(answers: Answers, table: pd.DataFrame) -> str:
    """Return the text of docs/study.md."""
    results = [result for _, results in answers for result in results]
    by_label: dict[str, dict[str, Result]] = {}  # label → task → result
    for result in results:
        by_label.setdefault(result.label, {})[result.task] = result
    both = {
        label.replace(" − static β", ""): {one.by["reward"].verdict for one in by.values()}
        for label, by in by_label.items()
        if len(by) > 1
    }
    people = table[table.task == "real"]
    differences = people_differences(people)
    told = {f"{data}, {label}": one for label, by in differences.items() for data, one in by.items()}
    decided = [f"{label}: {told_verdict(one)}" for label, one in told.items() if one.verdict != "undecided"]
    return rendered(
        "page.md",
        table=table,
        questions=QUESTIONS,
        both=list(both),
        better=[name for name, verdicts in both.items() if verdicts == {"better"}],
        # a run may have a row for each of several processors
        done=len(table[(table.phase == JUDGED) & (table.task != "real")].drop_duplicates(KEY)),
        wanted=len({run for question in QUESTIONS for run in question.judged}),
        verdicts=list(verdicts(answers, by_label)),
        answers=answers,
        about_people=PEOPLE,
        differences=differences,
        decided="; ".join([*decided, f"{len(told) - len(decided)} of {len(told)} comparisons undecided."]),
        people=people.set_index(["data", "arm", "flip_rate"]).sort_index(),
        planned_people=len(ON_PEOPLE),
    )


def settings(answers: Answers, rows: Rows) -> str:
    """Return docs/study/settings.csv: of every setting that is compared, means over its rows, and its collapses."""
    table = []
    for run in sorted({run for _, results in answers for result in results for run in result.runs}):
        judged, tuned = rows.of[run], rows.of.get(replace(run, phase=TUNING), rows.none)
        counts = (judged.collapsed.sum(), len(judged), tuned.collapsed.sum(), len(tuned))
        table.append({**asdict(run), **judged[list(MEANS)].mean(), **dict(zip(COUNTS, counts, strict=True))})
    columns = [*(name for name in KEY if name not in ("phase", "seed")), *MEANS, *COUNTS]
    frame = pd.DataFrame(table, columns=columns).round(MEANS)
    frame["dropped_flipped"] = frame.dropped_flipped.where(frame.flip_rate > 0)  # else there is no such pair
    return frame.to_csv(index=False)


def verdicts(
    answers: Answers, by_label: Mapping[str, Mapping[str, Result]]
) -> Iterator[tuple[str, list[Any], int]]:
    """Yield each question's title, its comparisons that are decided somewhere, and the number of the others.

    A comparison is its label and its differences: for each task at the end and within the KL budget, or None.
    """
    shown: set[str] = set()
    for question, results in answers:
        found = {}
        for label in (each.label for each in results if each.label not in shown):
            tasks = [by_label[label].get(task) for task in ("controlled", "sentiment")]
            found[label] = [one and one.by[measure] for one in tasks for measure in ("reward", "within")]
        shown |= found.keys()
        rows = [row for row in found.items() if any(one and one.verdict != "undecided" for one in row[1])]
        yield question.title, rows, len(found) - len(rows)


def people_differences(table: pd.DataFrame) -> dict[str, dict[str, Difference]]:
    """Return what is compared on pairs of people, by data and paired by seed, once every run has a row."""
    if set(runs_of(table)) != set(ON_PEOPLE):
        return {}
    table = table.set_index(["flip_rate", "data", "seed"])
    ours, theirs = (table[table.arm == arm] for arm in ("beta_dpo", "dpo"))
    found = {"dropped by the filter: flipped − other pairs": (ours.dropped_flipped - ours.dropped_clean)[0.2]}
    for percent in real_pairs.SHARES:
        for name, runs in (("β-DPO", ours), ("static β", theirs)):
            for signal, told in (("length", "length"), ("reference", "untrained model")):
                label = f"flipped in the first {percent} %: audit of {name} − {told}"
                found[label] = (runs[f"gaps_{percent}"] - runs[f"{signal}_{percent}"])[0.2]
    for flips in (0.0, 0.2):
        label = f"held-out accuracy: β-DPO − static β, flip rate {flips:g}"
        found[label] = (ours.accuracy - theirs.accuracy)[flips]
    return {
        label: {data: Difference.of(values[data]) for data in TASKS["real"].data} for label, values in found.items()
    }


def over_seeds(values: pd.Series, sign: str = "") -> str:
    """Return the mean of `values`, one per seed, with Student's t interval at 95 %; without it if all are equal."""
    if values.isna().any():
        return "–"
    return f"{values.iloc[0]:.3g}" if values.nunique() == 1 else Difference.of(values).text(sign)


def told_verdict(found: Difference, text: str = "") -> str:
    word = found.verdict.split()[0]
    return f"{word if word == 'undecided' else f'**{word}**'} {text or found.text()}"


def linked(title: str) -> str:
    """Return a link to the section of that title."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return f"[{title}](#{kept.replace(' ', '-')})"


def forest(results: Sequence[Result]) -> Any:
    """Return the chart of the mean and the interval of every comparison of a question, by both measures."""
    reward = " or ".join(sorted({"gold" if each.task == "sentiment" else "true" for each in results}))
    panels = []
    for measure in ("reward", "within"):
        both = [(each.label, each.by[measure]) for each in results]
        rows = [Interval(label, COLOURS[one.verdict], one.estimate, one.margin) for label, one in both]
        panels.append(intervals(rows, f"difference in mean {reward} reward", mark=0.0))
    key = "green: better; red: worse; blue: equal within the margin (grey band); dark grey: undecided"
    return side_by_side(panels, ("at the end", "within the KL budget")).properties(
        title=alt.TitleParams(key, fontSize=11, fontWeight="normal", orient="bottom")
    )


def frontier(table: pd.DataFrame) -> Any:
    """Return the chart of reward against KL over the checkpoints of every arm, means over its rows."""
    parts = []
    for number, ((arm, beta0), rows) in enumerate(table.groupby(["arm", "beta0"], sort=False)):
        kl, reward = np.mean([path_of(row) for _, row in rows.iterrows()], axis=0).T
        label = f"static β = {beta0:g}" if arm == "dpo" else f"{arm}, β0 = {beta0:g}"
        width = 2.4 if arm == "beta_dpo" else 1.2
        parts.append(Line(label, kl, reward, run_colour(number), DASHES[number % 8], width, dots=True))
    x = axis(alt.X, "KL to the SFT model, nats (linear to 1, then logarithmic)", type="symlog", constant=1)
    return lines(parts, x, axis(alt.Y, "mean true reward"), key="right").properties(width=520, height=380)
