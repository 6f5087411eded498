"""docs/study.md and its figures, from the table alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from app.core.files import atomic_file
from app.core.intervals import Estimate
from app.report.plot import DASHES, Interval, Line, axis, intervals, lines, run_colour, side_by_side, svg
from benchmarks.study import real_pairs
from benchmarks.study.questions import MEASURES, Comparison, Question, Rows, plan, quickstarts, real, sizes
from benchmarks.study.runs import KEY, path_of, runs_of, with_measures
from benchmarks.study.tasks import JUDGED, PAIR_FILES, TASKS, TUNING, Run
from benchmarks.study.verdicts import Difference
from benchmarks.tables import ROOT, markdown

DOCS = ROOT / "docs"
JUDGED_TASKS = {"controlled": "controlled task", "sentiment": "reviews"}
VERDICTS = {"better": "good", "worse": "act", "equal within the margin": "link"}


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
    questions = list(answered(plan(), Rows(table)))
    figures = {f"study/{question.name}.svg": svg(forest(question)) for question in questions}
    # head and tail are written by hand; the rest is generated
    head, tail = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("head.md", "tail.md"))
    people = real_model(table[table.task == "real"])
    parts = [
        verdicts(questions, table),
        head,
        *sections(questions, Rows(table)),
        people,
        arms(questions, table),
        tail,
    ]
    content = "\n\n".join(
        ["# The study: which claims about dynamic β hold here", *map(str.rstrip, filter(None, parts))]
    )
    return {"study.md": content + "\n", "../README.md": readme, **figures}


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
    if values.nunique() == 1:
        return f"{values.iloc[0]:.3g}"
    found = Difference.of(values.to_numpy(float), margin=0)
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def answered(questions: Sequence[Question], rows: Rows) -> Iterator[Question]:
    """Yield the questions with the comparisons that have all the seeds of the plan, and their results."""
    for question in questions:
        found = []
        for one in question.comparisons:
            try:
                result = rows.result(one)
            except LookupError:
                continue
            if result.of("reward").seeds >= len(question.seeds):  # a verdict before that would be a look ahead
                found.append(result)
        if found:
            yield replace(question, comparisons=found)


def verdicts(questions: Sequence[Question], table: pd.DataFrame) -> str:
    """Return the top of the page: what wins on both tasks, what is done, and the verdicts of every question."""
    by_task: dict[str, dict[str, Comparison]] = {}  # label → task → comparison
    for one in (one for question in questions for one in question.comparisons):
        by_task.setdefault(one.label, {})[one.task] = one
    both = {label: found for label, found in by_task.items() if len(found) > 1}
    better = [
        each for each, found in both.items() if {one.of("reward").verdict for one in found.values()} == {"better"}
    ]
    winners, compared = ("; ".join(each.replace(" − static β", "") for each in some) for some in (better, both))
    first = f"{winners or 'Nothing'} beats a tuned static β on both tasks (compared on both: {compared})."
    if not both:
        first = "Whether anything beats a tuned static β on both tasks is not known yet."
    judged = table[(table.phase == JUDGED) & (table.task != "real")]
    done = len(set(runs_of(judged)))  # a run may have a row for each of several processors
    wanted = sum(judged for _, _, judged in sizes())
    found, asked = (sum(len(each.comparisons) for each in some) for some in (questions, plan()))
    left = [each.title for each in plan() if each.name not in {question.name for question in questions}]
    header = [
        f"{name}, {measure}"
        for task, name in JUDGED_TASKS.items()
        for measure in ("at the end", f"KL at most {TASKS[task].budget:g}")
    ]
    return "\n\n".join(
        [
            f"**{first}** {done} of the {wanted} runs that judge have a row; "
            f"{found} of {asked} comparisons have all their seeds. All rows together took "
            f"{table.seconds.sum() / 7200:.1f} hours of two cores, without the SFT models.",
            markdown(["question", "comparison", *header], list(verdict_rows(questions, by_task))),
            *people_verdict(people_differences(table[table.task == "real"])),
            *([f"Not answered yet: {' '.join(left)}"] if left else []),
        ]
    )


def verdict_rows(questions: Sequence[Question], by_task: dict[str, dict[str, Comparison]]) -> Iterator[list[str]]:
    """Yield a row for every comparison that is decided somewhere, and one for the others of its question."""
    shown: set[str] = set()
    for question in questions:
        title = f"[{question.title}](#{anchor(question.title)})"
        left = 0
        for label in dict.fromkeys(one.label for one in question.comparisons if one.label not in shown):
            shown.add(label)
            tasks = (by_task[label].get(task) for task in JUDGED_TASKS)
            found = [one and one.of(measure) for one in tasks for measure in ("reward", "within")]
            if any(each and each.verdict != "undecided" for each in found):
                yield [title, label, *(told_verdict(each) if each else "" for each in found)]
                title = ""
            else:
                left += 1
        if left:
            yield [title, f"{left} {'comparisons' if title else 'more'}", "undecided", "undecided", "", ""]


def told_verdict(found: Difference) -> str:
    word = found.verdict.split()[0]
    return f"{word if word == 'undecided' else f'**{word}**'} {found}"


PEOPLE = "(j) On pairs of people, does the filter drop flipped pairs, does the audit find them?"


def people_verdict(differences: Mapping[str, Mapping[str, Difference]]) -> Iterator[str]:
    """Yield the line on pairs of people at the top of the page."""
    found = [(f"{data}, {label}", one) for label, by in differences.items() for data, one in by.items()]
    decided = [f"{label}: {told_verdict(one)}" for label, one in found if one.verdict != "undecided"]
    if found:
        rest = f"{len(found) - len(decided)} of {len(found)} comparisons undecided"
        yield f"[{PEOPLE}](#{anchor(PEOPLE)}) {'; '.join([*decided, rest])}."


def people_differences(table: pd.DataFrame) -> dict[str, dict[str, Difference]]:
    """Return what is compared on pairs of people, by data and paired by seed, once every run has a row."""
    found: dict[str, dict[str, Difference]] = {}
    if set(runs_of(table)) != set(real()):
        return found
    by_setting = {place: runs.set_index("seed") for place, runs in table.groupby(["data", "flip_rate", "arm"])}
    for data in PAIR_FILES:
        arms = {name: by_setting[data, 0.2, arm] for name, arm in (("β-DPO", "beta_dpo"), ("static β", "dpo"))}
        ours, theirs = arms.values()
        compared = {"dropped by the filter: flipped − other pairs": ours.dropped_flipped - ours.dropped_clean}
        for percent in real_pairs.SHARES:
            for name, runs in arms.items():
                for signal, told in (("length", "length"), ("reference", "untrained model")):
                    label = f"flipped in the first {percent} %: audit of {name} − {told}"
                    compared[label] = runs[f"gaps_{percent}"] - runs[f"{signal}_{percent}"]
        for flips in (0.0, 0.2):
            ours, theirs = (by_setting[data, flips, arm] for arm in ("beta_dpo", "dpo"))
            label = f"held-out accuracy: β-DPO − static β, flip rate {flips:g}"
            compared[label] = ours.accuracy - theirs.accuracy
        for label, values in compared.items():
            found.setdefault(label, {})[data] = Difference.of(values.to_numpy(float), margin=0)
    return found


def sections(questions: Sequence[Question], rows: Rows) -> Iterator[str]:
    """Yield a table and a figure for every question."""
    for question in questions:
        lines = []
        for one in question.comparisons:
            cells = [text for name in MEASURES for text in (f"{one.of(name)}", one.of(name).verdict)]
            chosen = (rows.run(cell) for cell in one.weights)
            settings = " : ".join(f"{run.beta0:g}, {run.learning_rate:g}" for run in chosen)
            lines.append([one.label, *cells, f"{one.of('reward').seeds}", told_collapses(one), settings])
        measures = (text for name in MEASURES.values() for text in (name, "verdict"))
        header = ["", *measures, "seeds", "collapsed", "β0, rate by the rule"]
        figure = f"![{question.title}](study/{question.name}.svg)"
        yield "\n\n".join([f"## {question.title}", question.source, markdown(header, lines), figure])


def arms(questions: Sequence[Question], table: pd.DataFrame) -> str:
    """Return the section with the means of every setting that the questions compare."""
    plan_rows, measured = Rows(table), with_measures(table)
    wanted = {plan_rows.run(cell) for question in questions for one in question.comparisons for cell in one.weights}
    settings = ["task", *KEY[3:]]
    tried = dict(list(measured[measured.phase == TUNING].groupby(settings)))
    rows = []
    for place, runs in measured[measured.phase == JUDGED].groupby(settings):
        run = Run(place[0], JUDGED, -1, *place[1:])
        if run not in wanted:
            continue
        varied = f"α {run.alpha:g}, ρ {run.keep_ratio:g}" if (run.alpha, run.keep_ratio) != (0.6, 0.8) else ""
        collapses = [runs, *([tried[place]] if place in tried else [])]
        flipped = f"{runs.dropped_flipped.mean():.2f}" if run.flip_rate else "–"
        rows.append(
            [
                f"{'reviews' if run.task == 'sentiment' else run.data}, {run.flip_rate:g}",
                " ".join(filter(None, [run.loss, run.arm, varied, run.options])),
                f"{run.beta0:g}, {run.learning_rate:g}",
                *(f"{runs.reward.mean():.2f}", f"{runs.kl.mean():.2f}", f"{runs.malformed.mean():.3f}"),
                ", ".join(f"{some.collapsed.sum()} of {len(some)}" for some in collapses),
                f"{flipped} : {runs.dropped_clean.mean():.2f}" if runs.dropped_clean.any() else "–",
            ]
        )
    header = [
        "gaps or reviews, flip rate",
        "loss and arm",
        "β0, rate",
        "reward",
        "KL",
        "malformed",
        "collapsed: judged, tuned",
    ]
    return "## All settings\n\n" + markdown([*header, "dropped: flipped : other"], rows)


def told_collapses(one: Comparison) -> str:
    return " : ".join(map(str, one.collapsed)) if any(one.collapsed) else "–"


def anchor(title: str) -> str:
    """Return the fragment identifier of a Markdown heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


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


def real_model(table: pd.DataFrame) -> str:
    """Return the section on pairs of people: what the filter drops, what the audit finds, and held-out accuracy."""
    if table.empty:
        return ""
    rows = []
    for (data, flips, arm), runs in table.groupby(["data", "flip_rate", "arm"]):
        found = (f"{signal}_{percent}" for percent in real_pairs.SHARES for signal in real_pairs.SIGNALS)
        means = ("–" if runs[name].isna().any() else over_seeds(runs[name]) for name in ("accuracy", *found))
        told = "–" if arm == "dpo" or not flips else over_seeds(runs.dropped_flipped - runs.dropped_clean, "+")
        rows.append([data, f"{flips:g}", arm, f"{len(runs)}", told, *means])
    shares = (f"{percent} %: {signal}" for percent in real_pairs.SHARES for signal in real_pairs.SIGNALS)
    header = ["pairs", "flip rate", "arm", "seeds", "dropped: flipped − clean", "accuracy held out", *shares]
    told = (
        "SmolLM2-135M-Instruct, two epochs of 160 pairs of Anthropic-HH (harmless; at most 350 characters) and of "
        "PandaLM's people (450); 96 pairs of other prompts held out, without flips. The last columns are the share "
        "of flipped pairs (precision) in the most suspicious 5 and 10 %, by the audit's gaps, by the untrained "
        "model's margin, and by length in the better direction; recall is a quarter of it in the first 5 %, "
        "and half of it in the first 10 %. Intervals are Student's t at 95 % each, also beyond 0 and 1. "
        f"{len(table)} of the {len(list(real()))} runs have a row; a figure without brackets is of one seed, or "
        "the same on all."
    )
    differences = people_differences(table)
    compared = [[label, *map(told_verdict, by.values())] for label, by in differences.items()]
    verdicts = [markdown(["difference, paired by seed", *PAIR_FILES], compared)] if compared else []
    return "\n\n".join([f"## {PEOPLE}", told, *verdicts, markdown(header, rows)])


# --- figures -------------------------------------------------------------------------------------------------


def forest(question: Question) -> Any:
    """Return the chart of the mean and the interval of every comparison of a question, by both measures."""
    panels = []
    reward = " or ".join(sorted({"gold" if each.task == "sentiment" else "true" for each in question.comparisons}))
    for measure in ("reward", "within"):
        found = [(each.label, each.of(measure)) for each in question.comparisons]
        rows = [
            Interval(label, VERDICTS.get(d.verdict, "quiet"), Estimate(d.mean, d.low, d.high), d.margin)
            for label, d in found
        ]
        panels.append(intervals(rows, f"difference in mean {reward} reward", mark=0.0))
    key = "green: better; red: worse; blue: equal within the margin (grey band); dark grey: undecided"
    return side_by_side(panels, ("at the end", "within the KL budget")).properties(
        title=alt.TitleParams(key, fontSize=11, fontWeight="normal", orient="bottom")
    )


def by_arm(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each arm, those of static β by its β."""
    groups = table.groupby(["arm", "beta0"], sort=False)
    return {f"static β = {beta0:g}" if arm == "dpo" else arm: rows for (arm, beta0), rows in groups}


def frontier(cells: Mapping[str, pd.DataFrame]) -> Any:
    """Return the chart of reward against KL over the checkpoints of every arm, means over seeds."""
    parts = []
    for number, (name, cell) in enumerate(cells.items()):
        kl, reward = np.mean([path_of(row) for _, row in cell.iterrows()], axis=0).T
        arm = cell.arm.iloc[0]
        label = name if arm == "dpo" else f"{arm}, β0 = {cell.beta0.iloc[0]:g}"
        width = 2.4 if arm == "beta_dpo" else 1.2
        parts.append(Line(label, kl, reward, run_colour(number), DASHES[number % 8], width, dots=True))
    x = axis(alt.X, "KL to the SFT model, nats (linear to 1, then logarithmic)", type="symlog", constant=1)
    return lines(parts, x, axis(alt.Y, "mean true reward"), key="right").properties(width=520, height=380)
