"""docs/study.md and its figures, from the table alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from app.core.files import atomic_file
from benchmarks.study.figures import beta_by_gap, forest, frontier, svg
from benchmarks.study.questions import (
    ARMS,
    CONTROLS,
    FLIP_RATES,
    LARGER,
    MEASURES,
    OWN_SEEDS,
    STATIC,
    Question,
    Rows,
    confirmation,
    extension,
    quickstarts,
)
from benchmarks.study.runs import COLLAPSED, KL_BUDGET, TASKS, path_of, runs_of, with_within
from benchmarks.study.verdicts import Difference
from benchmarks.tables import ROOT, markdown

DOCS = ROOT / "docs"


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
    table = table[table.task != "quickstart"]
    first, later = (Rows(table, phase) for phase in ("confirmation", "extension"))
    questions = [
        replace(question, comparisons=[rows.result(one, question.margin) for one in question.comparisons])
        for rows, made in ((first, confirmation), (later, extension))
        for question in made(rows)
    ]
    figures = {f"study/{question.name}.svg": svg(forest(question)) for question in questions}
    figures |= {"study/beta-by-gap.svg": svg(beta_by_gap(first)), "study/frontier.svg": svg(frontier(first))}
    # head and tail are written by hand; the rest is generated
    head, tail = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("head.md", "tail.md"))
    count = table.phase.value_counts()
    numbers = {
        "runs": len(table),
        **{name: int(count[name]) for name in ("confirmation", "extension")},
        "tried": int(count.exploration + count.development),
        "hours": f"{table.seconds.sum() / 3600:.1f}",
        "kl": KL_BUDGET,
        "margin": TASKS["controlled"].margin,
        "collapsed": COLLAPSED,
    }
    parts = [
        head.format(**numbers).rstrip(),
        summary(questions),
        "## All arms on mixed data, flip rate .15",
        arms_table(first),
        "![reward against KL](study/frontier.svg)",
        *(section(question, first) for question in questions),
        own_table(later),
        real_model(table[table.task == "smollm2"]),
        tail.format(**numbers).rstrip(),
    ]
    return {"study.md": "\n\n".join(parts) + "\n", "../README.md": readme, **figures}


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
    return f"""{shown}

Both arms of a seed share SFT model, pairs and settings; intervals are Student's t over seeds.
**β-DPO against plain DPO: {", ".join(told[:4])}.**

Of all {len(runs)} runs, {len(runs) - len(usual)} of them with sums rounded in another order, the worst had
{runs.malformed.max():.3f} malformed answers, the furthest a KL of {runs.kl.max():.2f}.
{", ".join(runs.processor.unique())}; a run on another processor ends elsewhere."""


def over_seeds(values: pd.Series, sign: str = "") -> str:
    """Return the mean of `values`, one per seed, with Student's t interval at 95 %; without it if all are equal."""
    if values.nunique() == 1:
        return f"{values.iloc[0]:g}"
    found = Difference.of(values.to_numpy(float), margin=0)
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def summary(questions: Sequence[Question]) -> str:
    """Return the table of all questions: their verdicts by measure, with the interval where one decides alone."""
    rows = []
    for question in questions:
        verdicts = []
        for measure in ("end", "within"):
            found: dict[str, list[str]] = {}
            for one in question.comparisons:
                found.setdefault(getattr(one, measure).verdict, []).append(one.label)
            if len(question.comparisons) == 1:
                one = getattr(question.comparisons[0], measure)
                verdicts.append(f"{one.verdict}, {one}")
            elif len(found) == 1:
                verdicts.append(next(iter(found)))
            else:
                open_ = found.pop("undecided", [])
                told = [f"**{verdict}**: {', '.join(labels)}" for verdict, labels in found.items()]
                verdicts.append("; ".join([*told, *([f"undecided: {len(open_)} more"] if open_ else [])]))
        rows.append([f"[{question.title}](#{anchor(question.title)})", *verdicts])
    return markdown(["claim", "at the end", f"within {KL_BUDGET:g} nat"], rows)


def anchor(title: str) -> str:
    """Return the fragment identifier of a Markdown heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def arms_table(rows: Rows) -> str:
    best = rows.chosen("dpo")[0]
    cells = {f"static β = {beta:g}": rows.cell("dpo", beta0=beta) for beta in STATIC}
    cells |= {f"{arm}{' (control)' if arm in CONTROLS else ''}": rows.cell(arm) for arm in ARMS}
    sft = rows.cell("dpo")
    reward = f"{sft.sft_reward.mean():.2f} ± {sft.sft_reward.std():.2f}"
    last = ["SFT model", "", "", reward, "", "", "", f"{sft.sft_malformed.mean():.3f}", "", "0", "", ""]
    table = cells_table(cells, f"static β = {best:g}", last)
    return f"{table}\n\nMeans over seeds, ± one standard deviation. Bold: the best static β by development."


def own_table(rows: Rows) -> str:
    """Return the table of the cells that the last question compares, by flip rate."""
    best = rows.chosen("dpo")[0]
    arms = {"static β": ("dpo", None), "beta_dpo": ("beta_dpo", None)}
    arms |= {f"reference_weights, β0 = {beta:g}": ("reference_weights", beta) for beta in (best, LARGER)}
    return cells_table(
        {
            f"{name}, flip rate {flips:g}": rows.cell(arm, flips=flips, beta0=beta0).loc[list(OWN_SEEDS)]
            for flips in FLIP_RATES
            for name, (arm, beta0) in arms.items()
        }
    )


def cells_table(cells: Mapping[str, pd.DataFrame], best: str | None = None, *more: list[str]) -> str:
    """Return a table of the named cells, with further rows at its end; the name `best` is in bold."""
    rows = []
    for name, cell in cells.items():
        mean = cell.mean(numeric_only=True)
        flipped = "–" if math.isnan(mean.dropped_flipped) else f"{mean.dropped_flipped:.2f}"
        rows.append(
            [
                f"**{name}**" if name == best else name,
                *(f"{mean.beta0:g}", f"{mean.learning_rate:g}"),
                *(f"{mean[figure]:.2f} ± {cell[figure].std():.2f}" for figure in MEASURES),
                *(f"{mean[figure]:.3f}" for figure in ("win_rate", "accuracy", "malformed")),
                *(f"{int((cell.malformed > COLLAPSED).sum())} of {len(cell)}", f"{mean.kl:.2f}"),
                f"{flipped} : {mean.dropped_clean:.2f}" if mean.dropped_clean > 0 else "–",
                f"{cell.beta_low.min():.2f}–{cell.beta_high.max():.2f}",
            ]
        )
    header = ["arm", "β0", "rate", "reward", f"within {KL_BUDGET:g} nat", "win rate", "accuracy", "malformed"]
    return markdown([*header, "collapsed", "KL", "dropped, flipped : clean", "β"], [*rows, *more])


def section(question: Question, rows: Rows) -> str:
    lines = [
        [one.label, f"{one.end}", one.end.verdict, f"{one.within}", one.within.verdict]
        for one in question.comparisons
        if one.end and one.within
    ]
    header = ["", "at the end", "verdict", f"within {KL_BUDGET:g} nat", "verdict"]
    parts = [f"## {question.title}", question.source, markdown(header, lines)]
    parts.append(f"![{question.title}](study/{question.name}.svg)")
    seeds = sorted({one.end.seeds for one in question.comparisons if one.end})
    told = f"Seeds: {' and '.join(map(str, seeds))}."
    if unpaired := sum(one.unpaired for one in question.comparisons):
        told += f" {unpaired} pairs of rows were left out, because they are of different processors."
    if question.name == "gap":
        parts.append("![reward by β and gap](study/beta-by-gap.svg)")
        told += "".join(best_by_data(rows, measure) for measure in MEASURES)
    return "\n\n".join([*parts, told])


def best_by_data(rows: Rows, measure: str) -> str:
    """Return the sentence on which static β has the highest mean on low-, mixed- and high-gap data."""
    best = {}
    for data in ("low", "mixed", "high"):
        means = {beta: rows.cell("dpo", data, beta0=beta)[measure].mean() for beta in STATIC}
        best[data] = max(means, key=means.__getitem__)
    told = ", ".join(f"β = {beta:g} on {data}" for data, beta in best.items())
    return f" Highest mean {MEASURES[measure]}: {told}."


def paths_table(table: pd.DataFrame) -> str:
    """Return reward and KL at every checkpoint of the runs of one task, as the DPO paper's Figure 2 draws them."""
    steps = TASKS[table.task.iloc[0]].steps
    rows = [
        [
            *(str(one.seed), f"{one.data}, {one.flip_rate:g}", str(one.arm), f"{one.beta0:g}"),
            *(f"{kl:.2f}, {reward:.3f}" for kl, reward in path_of(one)),
            *(f"{one.within:.3f}", f"{one.malformed:.3f}"),
        ]
        for _, one in with_within(table).iterrows()
    ]
    header = [
        "seed",
        "data, flips",
        "arm",
        "β0",
        *(f"KL, reward at {step}" for step in (0, *steps)),
        "within",
        "cut",
    ]
    return markdown([*header, "within the budget", "cut"], rows, aligned=True)


def real_model(table: pd.DataFrame) -> str:
    """Return the section on the few steps of SmolLM2."""
    rows = [
        [
            *(one.arm, f"{one.seed}", f"{one.beta_low:.3f}–{one.beta_high:.3f}", f"{one.gap:+.2f}"),
            *(f"{one.accuracy:.2f}", f"{one.log_ratio_chosen:+.2f}, {one.log_ratio_rejected:+.2f}"),
        ]
        for one in table.sort_values(["seed", "arm"], ascending=[True, False]).itertuples()
    ]
    header = ["arm", "seed", "β, lowest–highest", "mean gap, last step", "accuracy held out"]
    told = (
        "SmolLM2-135M-Instruct, 6 steps of eight pairs of Anthropic-HH (harmless), "
        "β0 = 0.1, 32 pairs held out; `configs/smollm2_hh.yaml`. An illustration: so few steps and pairs decide "
        "nothing."
    )
    made = markdown([*header, "log-ratio chosen, rejected"], rows)
    return "\n\n".join(["## The same with a real model, as an illustration", told, made])
