"""Write docs/study.md and its figures from the tables of the study, without any run.

python -m benchmarks.study.report
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from app.files import atomic_file
from benchmarks.study import smollm2
from benchmarks.study.analysis import COLLAPSED, KL_BUDGET, Difference, Rows
from benchmarks.study.claims import Claim, all_claims, extension_claims
from benchmarks.study.figures import beta_by_gap, forest, frontier, svg
from benchmarks.study.plan import (
    ARMS,
    CONTROLS,
    EXTENSION_SEEDS,
    FLIP_RATES,
    LARGER,
    MAIN_SEEDS,
    OWN_SEEDS,
    PHASES,
    SIDE_SEEDS,
    STATIC,
    chosen,
)
from benchmarks.study.table import read_results

DOCS = Path(__file__).resolve().parents[2] / "docs"


def documents(table: pd.DataFrame) -> dict[str, str]:
    """Return the content of every generated file, by its path below docs."""
    rows = Rows(table)
    later = Rows(table, "extension")
    claims = all_claims(rows) + extension_claims(later)
    figures = {f"study/{claim.name}.svg": svg(forest(claim)) for claim in claims}
    figures |= {"study/beta-by-gap.svg": svg(beta_by_gap(rows)), "study/frontier.svg": svg(frontier(rows))}
    return {"study.md": text(table, rows, later, claims), **figures}


def text(table: pd.DataFrame, rows: Rows, later: Rows, claims: Iterable[Claim]) -> str:
    # head and tail are written by hand; the rest is generated
    head, tail = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("head.md", "tail.md"))
    claims = list(claims)
    parts = [
        head.format(
            runs=len(table),
            confirmed=int((table.phase == "confirmation").sum()),
            extended=int((table.phase == "extension").sum()),
            later=f"{EXTENSION_SEEDS[0]} to {EXTENSION_SEEDS[-1]} and {OWN_SEEDS[0]} to {OWN_SEEDS[-1]}",
            hours=f"{table.seconds.sum() / 3600:.1f}",
            main=f"{MAIN_SEEDS[0]} to {MAIN_SEEDS[-1]}",
            side=f"{SIDE_SEEDS[0]} to {SIDE_SEEDS[-1]}",
            kl=KL_BUDGET,
            collapsed=COLLAPSED,
        ).rstrip(),
        summary(claims),
        "## All arms on mixed data, flip rate .15",
        arms_table(rows),
        "![reward against KL](study/frontier.svg)",
        *(section(claim) for claim in claims),
        own_table(later),
        smollm2.section(pd.read_csv(smollm2.TABLE)),
        tail.format(tried=int(table.phase.isin(["exploration", "development"]).sum())).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def summary(claims: Iterable[Claim]) -> str:
    lines = ["| claim | verdict |", "|---|---|"]
    for claim in claims:
        verdicts = claim.verdicts()
        if len(set(verdicts.values())) == 1:
            told = next(iter(verdicts.values()))
        else:
            told = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict(verdicts).items())
        lines.append(f"| [{claim.title}](#{anchor(claim.title)}) | {told} |")
    return "\n".join(lines)


def by_verdict(verdicts: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for label, verdict in verdicts.items():
        found.setdefault(verdict, []).append(label)
    return found


def anchor(title: str) -> str:
    """Return the fragment identifier of a Markdown heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def arms_table(rows: Rows) -> str:
    cells = {f"static β = {beta:g}": rows.cell("dpo", beta0=beta) for beta in STATIC}
    cells |= {f"{arm}{' (control)' if arm in CONTROLS else ''}": rows.cell(arm) for arm in ARMS}
    lines = cells_table(cells, best=f"static β = {chosen('dpo')[0]:g}")
    sft = rows.cell("dpo", beta0=chosen("dpo")[0])
    lines.append(
        f"| SFT model | | | {sft.sft_reward.mean():.2f} ± {sft.sft_reward.std():.2f} | | | "
        f"| {sft.sft_malformed.mean():.3f} | | 0 | | |"
    )
    return "\n".join(
        [*lines, "", "Means over seeds, ± one standard deviation. Bold: the best static β by development."]
    )


def own_table(rows: Rows) -> str:
    """Return the table of the cells that the last claim compares, by flip rate."""
    best = chosen("dpo")[0]
    arms = {"static β": ("dpo", best), "beta_dpo": ("beta_dpo", None)}
    arms |= {f"reference_weights, β0 = {beta:g}": ("reference_weights", beta) for beta in (best, LARGER)}
    cells = {
        f"{name}, flip rate {flips:g}": rows.cell(arm, flips=flips, beta0=beta0).loc[list(OWN_SEEDS)]
        for flips in FLIP_RATES
        for name, (arm, beta0) in arms.items()
    }
    return "\n".join(cells_table(cells))


def cells_table(cells: Mapping[str, pd.DataFrame], best: str | None = None) -> list[str]:
    """Return the lines of a table of the named cells; the name `best` is in bold."""
    lines = [
        "| arm | β0 | rate | reward | within 1 nat | win rate | accuracy | malformed | collapsed | KL "
        "| dropped, flipped : clean | β |",
        "|" + "---|" * 12,
    ]
    for name, cell in cells.items():
        mean = cell.mean(numeric_only=True)
        flipped = "–" if math.isnan(mean.dropped_flipped) else f"{mean.dropped_flipped:.2f}"
        dropped = f"{flipped} : {mean.dropped_clean:.2f}" if mean.dropped_clean > 0 else "–"
        lines.append(
            f"| {f'**{name}**' if name == best else name} | {mean.beta0:g} | {mean.learning_rate:g} "
            f"| {mean.reward:.2f} ± {cell.reward.std():.2f} | {mean.within:.2f} ± {cell.within.std():.2f} "
            f"| {mean.win_rate:.3f} | {mean.accuracy:.3f} | {mean.malformed:.3f} "
            f"| {int((cell.malformed > COLLAPSED).sum())} of {len(cell)} | {mean.kl:.2f} | {dropped} "
            f"| {cell.beta_low.min():.2f}–{cell.beta_high.max():.2f} |"
        )
    return lines


def section(claim: Claim) -> str:
    lines = ["| | at the end | within 1 nat | verdict |", "|---|---|---|---|"]
    verdicts = claim.verdicts()
    for each in claim.comparisons:
        verdict = verdicts[each.label] if claim.rule == "each" else ""
        lines.append(f"| {each.label} | {shown(each.end)} | {shown(each.within)} | {verdict} |")
    seeds = sorted({each.end.seeds for each in claim.comparisons})
    parts = [f"## {claim.title}", claim.source, "\n".join(lines), f"![{claim.title}](study/{claim.name}.svg)"]
    if claim.name == "gap":
        parts.append("![reward by β and gap](study/beta-by-gap.svg)")
    told = f"Seeds: {' and '.join(map(str, seeds))}."
    if claim.rule == "robust":
        told += f" All within the bounds? **{verdicts['all'].capitalize()}.**"
    return "\n\n".join([*parts, f"{told} {claim.remark}".rstrip()])


def shown(one: Difference) -> str:
    low, high = one.bootstrap
    return f"{one} ({low:+.2f}, {high:+.2f})"


def main() -> None:
    table = read_results()
    for phase, runs in PHASES.items():
        wanted = len(set(runs()))
        if (found := int((table.phase == phase).sum())) != wanted:
            raise SystemExit(f"{phase}: {found} rows of {wanted}: `make study` makes the rest")
    for name, content in documents(table).items():
        with atomic_file(DOCS / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    main()
