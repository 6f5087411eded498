"""docs/study.md and its figures, from the table alone; page.md is the template."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from app.core.files import atomic_file
from app.core.intervals import Estimate
from app.report.plot import DASHES, Interval, Line, axis, intervals, lines, run_colour, side_by_side, svg
from benchmarks.study import real_pairs
from benchmarks.study.questions import PEOPLE, Question, plan, quickstarts, real, sizes
from benchmarks.study.table import KEY, Result, Rows, path_of, runs_of, with_measures
from benchmarks.study.tasks import JUDGED, PAIR_FILES, TASKS, TUNING, Run
from benchmarks.study.verdicts import Difference
from benchmarks.tables import ROOT, markdown

DOCS = ROOT / "docs"
VERDICTS = {"better": "good", "worse": "act", "equal within the margin": "link"}
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
    readme = before + mark + quickstart(table) + "\n" + rest[rest.index("<!-- end -->") :]
    answers = answered(Rows(table))
    figures = {f"study/{question.name}.svg": svg(forest(results)) for question, results in answers}
    return {"study.md": study(answers, table), "../README.md": readme, **figures}


def answered(rows: Rows) -> Answers:
    """Return the questions with their results, those of comparisons that have all the seeds of the plan."""
    found = []
    for question in plan():
        results = []
        for label, runs in question.comparisons.items():
            with contextlib.suppress(LookupError):
                results.append(rows.result(label, runs, len(question.seeds)))  # before, a verdict would look ahead
        if results:
            found.append((question, results))
    return found


# --- README ----------------------------------------------------------------------------------------------------

QUICKSTART = {
    "win_rate": "win rate over the SFT model",
    "reward": "mean true reward of samples, 0 to 4.5",
    "malformed": "malformed answers",
    "kl": "KL to the SFT model, nats per answer",
    "accuracy": "reward accuracy on pairs held out",
    "dropped_flipped": "swapped pairs dropped",
    "dropped_clean": "other pairs dropped",
}
AHEAD = {"better": "higher", "worse": "lower", "undecided": "not told apart"}


def quickstart(table: pd.DataFrame) -> str:
    """Return README's table of the quickstart: means over seeds, differences paired by seed, and who is ahead."""
    planned = set(quickstarts())
    runs = table[[run in planned for run in runs_of(table)]]
    usual = runs[runs.options == ""]
    ours, theirs = (usual[usual.arm == arm].set_index("seed") for arm in ("beta_dpo", "dpo"))
    sft = {"win_rate": "0.5", "reward": over_seeds(ours.sft_reward), "malformed": over_seeds(ours.sft_malformed)}
    rows, told = [], []
    for name, label in QUICKSTART.items():
        difference = ours[name] - theirs[name]
        cells = map(over_seeds, (ours[name], theirs[name]))
        rows.append([label, sft.get(name, ""), *cells, over_seeds(difference, "+")])
        told.append(f"{label.split(',')[0]} {AHEAD[Difference.of(difference.to_numpy(float), 0).verdict]}")
    shown = markdown([f"{len(ours)} seeds [95 % interval]", "SFT model", "β-DPO", "plain DPO", "difference"], rows)
    reordered, processors = len(runs) - len(usual), ", ".join(runs.processor.unique())
    return f"""{shown}

**β-DPO against plain DPO, paired by seed: {", ".join(told[:4])}.** Intervals are Student's t.
Of all {len(runs)} runs ({reordered} repeat one seed with sums rounded in another order) the highest share of \
malformed answers was {runs.malformed.max():.3f}, the highest KL {runs.kl.max():.2f}. {processors}; \
a run on another processor ends elsewhere."""


def over_seeds(values: pd.Series, sign: str = "") -> str:
    """Return the mean of `values`, one per seed, with Student's t interval at 95 %; without it if all are equal."""
    if values.isna().any():
        return "–"
    if values.nunique() == 1:
        return f"{values.iloc[0]:.3g}"
    found = Difference.of(values.to_numpy(float), margin=0)
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


# --- the page --------------------------------------------------------------------------------------------------


def study(answers: Answers, table: pd.DataFrame) -> str:
    """Return the text of docs/study.md."""
    by_label: dict[str, dict[str, Result]] = {}  # label → task → result
    for result in (result for _, results in answers for result in results):
        by_label.setdefault(result.label, {})[result.task] = result
    both = {label.replace(" − static β", ""): by for label, by in by_label.items() if len(by) > 1}
    judged = table[(table.phase == JUDGED) & (table.task != "real")]
    people = table[table.task == "real"]
    differences = people_differences(people)
    told = [(f"{data}, {label}", one) for label, by in differences.items() for data, one in by.items()]
    decided = [f"{label}: {told_verdict(one)}" for label, one in told if one.verdict != "undecided"]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string((Path(__file__).parent / "page.md").read_text(encoding="utf-8")).render(
        both=both,
        better=[
            name for name, by in both.items() if {one.by["reward"].verdict for one in by.values()} == {"better"}
        ],
        done=len(set(runs_of(judged))),  # a run may have a row for each of several processors
        wanted=sum(judging for _, _, judging in sizes()),
        found=sum(len(results) for _, results in answers),
        asked=sum(len(question.comparisons) for question in plan()),
        hours=f"{table.seconds.sum() / 7200:.1f}",
        verdicts=list(verdicts(answers, by_label)),
        open=[each.title for each in plan() if each.name not in {question.name for question, _ in answers}],
        answers=answers,
        any=any,
        linked=linked,
        told_verdict=told_verdict,
        over_seeds=over_seeds,
        about_people=PEOPLE,
        decided="; ".join([*decided, f"{len(told) - len(decided)} of {len(told)} comparisons undecided."]),
        differences=differences,
        people=list(people.groupby(["data", "flip_rate", "arm"])),
        rows_of_people=len(people),
        planned_people=len(list(real())),
        settings=list(settings(answers, table)),
    )


def verdicts(
    answers: Answers, by_label: Mapping[str, Mapping[str, Result]]
) -> Iterator[tuple[str, list[Any], int]]:
    """Yield each question's title, its comparisons that are decided somewhere, and the number of the others.

    A comparison is its label and its differences: for each task at the end and within the KL budget, or None.
    """
    shown: set[str] = set()
    for question, results in answers:
        labels = [each.label for each in results if each.label not in shown]
        shown.update(labels)
        rows = []
        for label in labels:
            tasks = [by_label[label].get(task) for task in ("controlled", "sentiment")]
            found = [one and one.by[measure] for one in tasks for measure in ("reward", "within")]
            if any(one and one.verdict != "undecided" for one in found):
                rows.append((label, found))
        yield question.title, rows, len(labels) - len(rows)


def told_verdict(found: Difference) -> str:
    word = found.verdict.split()[0]
    return f"{word if word == 'undecided' else f'**{word}**'} {found}"


def linked(title: str) -> str:
    """Return a link to the section of that title."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return f"[{title}](#{kept.replace(' ', '-')})"


def settings(answers: Answers, table: pd.DataFrame) -> Iterator[tuple[Run, pd.DataFrame, list[str]]]:
    """Yield every setting that the questions compare, its rows, and how many collapsed: judged, and in tuning."""
    wanted = {run for _, results in answers for result in results for run in result.runs}
    columns = ["task", *KEY[3:]]
    measured = with_measures(table)
    tried = dict(list(measured[measured.phase == TUNING].groupby(columns)))
    for place, runs in measured[measured.phase == JUDGED].groupby(columns):
        if (run := Run(place[0], JUDGED, -1, *place[1:])) in wanted:
            both = [runs, *([tried[place]] if place in tried else [])]
            yield run, runs, [f"{some.collapsed.sum()} of {len(some)}" for some in both]


def people_differences(table: pd.DataFrame) -> dict[str, dict[str, Difference]]:
    """Return what is compared on pairs of people, by data and paired by seed, once every run has a row."""
    if set(runs_of(table)) != set(real()):
        return {}
    arms = {
        name: table[table.arm == arm].set_index(["flip_rate", "data", "seed"])
        for name, arm in (("β-DPO", "beta_dpo"), ("static β", "dpo"))
    }
    ours, theirs = arms.values()
    found = {"dropped by the filter: flipped − other pairs": (ours.dropped_flipped - ours.dropped_clean)[0.2]}
    for percent in real_pairs.SHARES:
        for name, runs in arms.items():
            for signal, told in (("length", "length"), ("reference", "untrained model")):
                label = f"flipped in the first {percent} %: audit of {name} − {told}"
                found[label] = (runs[f"gaps_{percent}"] - runs[f"{signal}_{percent}"])[0.2]
    for flips in (0.0, 0.2):
        found[f"held-out accuracy: β-DPO − static β, flip rate {flips:g}"] = (ours.accuracy - theirs.accuracy)[
            flips
        ]
    return {
        label: {data: Difference.of(values[data].to_numpy(float), margin=0) for data in PAIR_FILES}
        for label, values in found.items()
    }


# --- charts ----------------------------------------------------------------------------------------------------


def forest(results: Sequence[Result]) -> Any:
    """Return the chart of the mean and the interval of every comparison of a question, by both measures."""
    reward = " or ".join(sorted({"gold" if each.task == "sentiment" else "true" for each in results}))
    panels = []
    for measure in ("reward", "within"):
        rows = []
        for label, found in ((each.label, each.by[measure]) for each in results):
            estimate = Estimate(found.mean, found.low, found.high)
            rows.append(Interval(label, VERDICTS.get(found.verdict, "quiet"), estimate, found.margin))
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


def paths_table(table: pd.DataFrame) -> str:
    """Return reward and KL at every checkpoint of the runs of one task, as the DPO paper's Figure 2 draws them."""
    rows = [
        [
            *(str(one.seed), f"{one.data}, {one.flip_rate:g}", str(one.arm), f"{one.beta0:g}"),
            *(f"{kl:.2f}, {reward:.3f}" for kl, reward in path_of(one)),
            *(f"{one.within:.3f}", f"{one.malformed:.3f}"),
        ]
        for _, one in with_measures(table).iterrows()
    ]
    steps = (f"KL, reward at {step}" for step in (0, *TASKS[table.task.iloc[0]].steps))
    return markdown(["seed", "data, flips", "arm", "β0", *steps, "within the budget", "cut"], rows, aligned=True)
