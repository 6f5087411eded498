"""`make docs`: what documents show of the code: figures, build/api.md, the formats in docs/data.md.

python docs/build.py
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from textwrap import fill
from typing import Any

import altair as alt
import numpy as np
import torch

import datamodules
import lightning_modules
from app.commands import COMMANDS, function_of
from app.commands.audit import hits, pair_histories
from app.method import losses
from app.method.dynamic_beta import (
    FLOOR,
    RunningMoments,
    batch_beta,
    gaussian_log_weights,
    gumbel_top_k,
    selection_noise,
)
from app.report.charts import band, curves
from app.report.plot import DASHES, Line, axis, lines, png, rule, side_by_side, sized_to
from app.report.run import read_run
from callbacks import SLOTS
from callbacks.health import CONDITIONS
from datamodules.sources.formats import FORMATS

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "runs" / "quickstart" / "beta_dpo"
BETA0, PAIRS, KEPT = 0.1, 64, 51  # the batch of the paper's recipe at ρ = 0.8
LOWEST = BETA0 * FLOOR


def steps_of(std: float, alpha: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """β [steps] and the share of draws in which each z-score was kept, for normal gaps that do not move."""
    draws = torch.Generator().manual_seed(0)
    running, betas, kept_z, all_z = RunningMoments(), [], [], []
    for step in range(steps):
        gaps = std * torch.randn(PAIRS, generator=draws, dtype=torch.float64)
        moments = running.update(gaps)
        kept = gumbel_top_k(gaussian_log_weights(gaps, moments), KEPT, selection_noise(0, step, PAIRS))
        betas.append(batch_beta(BETA0, alpha, gaps[kept], moments).clamp(min=LOWEST))
        all_z.append(moments.z_scores(gaps))
        kept_z.append(all_z[-1][kept])
    edges = torch.linspace(-4, 4, 33, dtype=torch.float64)
    share = torch.histogram(torch.cat(kept_z), edges).hist / torch.histogram(torch.cat(all_z), edges).hist
    return torch.stack(betas), torch.stack([(edges[1:] + edges[:-1]) / 2, share])


def draw_filter() -> Any:
    z, share = (values.numpy() for values in steps_of(1.0, 0.0, 4000)[1])
    known = ~np.isnan(share)
    print(f"share kept by z: {dict(zip(z[known].round(2).tolist(), share[known].round(2).tolist(), strict=True))}")
    parts = [
        Line("selection weight exp(−z²/2)", z, np.exp(-(z**2) / 2), "quiet", (5, 3)),
        Line("share that is kept, of normal gaps", z, share),
    ]
    return titled("who is kept (ρ = 0.8, 64 pairs)", parts, "(M − M0)/σ", "weight, share of pairs")


def draw_beta() -> Any:
    deviation = torch.linspace(-4, 4, 200, dtype=torch.float64)
    moments = RunningMoments().current()
    parts = []
    for number, alpha in enumerate((0.2, 0.6, 2.0)):
        beta = torch.stack([batch_beta(BETA0, alpha, d[None], moments) for d in deviation])
        parts.append(of_alpha(number, alpha, deviation.numpy(), beta.clamp(min=LOWEST).numpy()))
    title = "β of a batch (β0 = 0.1)"
    return titled(title, parts, "mean M of the kept pairs − M0, in nats", "β") + rule(BETA0, "β0")


def draw_floor() -> Any:
    parts = []
    for number, alpha in enumerate((0.2, 0.6, 2.0)):
        shares = {}  # of 2000 steps
        for std in (0.5, 1, 2, 3, 4, 6, 8, 10):
            shares[std] = float((steps_of(std, alpha, 2000)[0] <= LOWEST).double().mean())
        told = {std: round(share, 3) for std, share in shares.items()}
        print(f"α = {alpha}: share of steps with β at its floor by standard deviation of the gaps {told}")
        parts.append(of_alpha(number, alpha, list(shares), list(shares.values()))._replace(dots=True))
    x = "standard deviation of the gaps, in nats"
    return titled("how often β meets its floor", parts, x, "share of steps")


def draw_lag() -> Any:
    running, means = RunningMoments(), []
    growing = [0.02 * step for step in range(100)]
    for gap in growing:
        means.append(running.update(torch.tensor([gap, gap], dtype=torch.float64)).mean)
    parts = [
        Line("mean gap of the batch, +0.02 a step", range(100), growing, "run1", (7, 3)),
        Line("M0, m = 0.9", range(100), means, "ink"),
    ]
    return titled("the running mean lags a growing gap", parts, "step", "nats")


def of_alpha(number: int, alpha: float, x: Any, y: Any) -> Line:
    return Line(f"α = {alpha}", x, y, f"run{number}", DASHES[number])


def titled(title: str, parts: list[Line], x: str, y: str) -> Any:
    return sized_to(lines(parts, axis(alt.X, x, nice=False), axis(alt.Y, y)), 480).properties(title=title)


FIGURES = {"filter": draw_filter, "beta": draw_beta, "floor": draw_floor, "lag": draw_lag}


def draw_quickstart(folder: Path) -> Any:
    """Draw what a run of the controlled task shows in ten seconds: gaps, β, and what its audit finds."""
    run = read_run(folder, "β-DPO")
    assert run.audit is not None
    histories = pair_histories(run.audit)
    wrong = run.audit.groupby("pair_id").flipped.first().reindex(histories.pair_id).to_numpy(bool)
    hit = hits(histories.mislabelled.to_numpy(), wrong, len(wrong) // 20)
    listed = np.arange(1, len(hit) + 1)
    suspects = Line("", listed[19:], (hit.cumsum() / listed)[19:], "run4")
    found = lines(
        [suspects], axis(alt.X, "most suspicious pairs"), axis(alt.Y, "share with a flipped label", domain=[0, 1])
    )
    swings = curves([run], {"beta/used": ""}, "β used", rules=[(run.curves["beta/base"].iloc[-1], "β0")])
    panels = [band(run, 0)[0].picture, swings[0].picture, found + rule(float(wrong.mean()), "all pairs")]
    titles = (
        "1  each step measures the reward gaps,",
        "2  sets β by the gaps of the pairs kept;",
        "3  the audit lists mislabelled pairs first",
    )
    return side_by_side(panels, titles, columns=3, width=320)


def draw_shared(folder: Path) -> Any:
    """Draw |α·(M − M0)| in all steps of a run at α = 0.6 if 2 to 128 pairs shared M, M0 and β, without filter.

    The gaps are those of its audit, in their order; 128 pairs are those of two successive steps.
    """
    audit = read_run(folder, "").audit
    assert audit is not None
    gaps = torch.from_numpy(audit.sort_values("step", kind="stable").gap.dropna().to_numpy(float, copy=True))
    shares, points = {"median": 0.5, "95 % of steps are below": 0.95}, {}
    for pairs in (2, 8, 64, 128):
        running, swings = RunningMoments(), []
        for group in gaps[: len(gaps) // pairs * pairs].split(pairs):
            swings.append(0.6 * abs(float(group.mean()) - running.update(group).mean))
        points[pairs] = np.quantile(swings, list(shares.values())).tolist()
    told = {pairs: [round(value, 3) for value in values] for pairs, values in points.items()}
    print(f"|α·(M − M0)|, median and 95 %, by pairs that share a β: {told}")
    parts = [
        Line(name, list(points), values, f"run{number}", DASHES[number], dots=True)
        for number, (name, values) in enumerate(zip(shares, zip(*points.values(), strict=True), strict=True))
    ]
    x = axis(alt.X, "pairs that share a β", type="log", base=2).axis(values=list(points))
    title = "how far a step moves β (α = 0.6)"
    return sized_to(lines(parts, x, axis(alt.Y, "|α·(M − M0)|")), 480).properties(title=title)


def entry(name: str, thing: Any) -> str:
    """One item of the reference: its call and its docstring."""
    # a default that is a function prints as an address
    call = re.sub(r"<function .*? at 0x\w+>", "…", str(inspect.signature(thing))).replace(" -> None", "")
    body = inspect.cleandoc(inspect.getdoc(thing) or "")
    return f"### {name}\n\n```python\n{name}{call}\n```\n\n```text\n{body}\n```\n"


def api() -> str:
    """Return the reference page: what a configuration can name, and the commands."""
    shipped = [c for _, c in inspect.getmembers(losses, inspect.isclass) if c.__module__ == losses.__name__]
    groups: dict[str, dict[str, Any]] = {
        "Training stages": {
            f"lightning_modules.{n}": getattr(lightning_modules, n) for n in lightning_modules.__all__
        },
        "Data": {f"datamodules.{n}": getattr(datamodules, n) for n in datamodules.__all__},
        "Callbacks": {f"callbacks.{kind.__name__}": kind for slot in SLOTS for kind in slot.kinds},
        "Losses": {
            f"app.method.losses.{c.__name__}": c
            for c in shipped
            if issubclass(c, losses.PairLoss) and c is not losses.PairLoss
        },
        "Commands": {f"beta-dpo {name}": function_of(name) for name in COMMANDS},
    }
    page = (
        "# Reference\n\nWritten by `make docs` from the code. Every class here can be named by `class_path` in a "
        "configuration, with its arguments under `init_args`.\n"
    )
    for title, group in groups.items():
        page += f"\n## {title}\n\n" + "\n".join(entry(*item) for item in group.items())
    return page


def data_page() -> str:
    """Return docs/data.md with the table of the registry of formats in its place."""
    lines = ["| `data.format` | an example row | stage | as in |", "|---|---|---|---|"]
    for format in FORMATS:
        row = json.dumps(format.example, ensure_ascii=False).replace("|", "\\|")
        stage = "preference" if format.is_pair else "SFT"
        lines.append(f"| `{format.name}` | `{row}` | {stage} | {format.named_by} |")
    return filled("data.md", "formats", "\n".join(lines) + "\n")


def monitoring_page() -> str:
    """Return docs/monitoring.md with a section for every condition of the health monitor in its place."""
    calmer = (
        "lower α or ε of the schedule, or set `schedule.z_normalised: true` (the log line says which the schedule "
        "of the run has)"
    )
    sections = []
    for one in CONDITIONS:
        text = (f"It holds if {one.meaning}", f"*Advice:* {one.advice_with(calmer)}.")
        whole = [fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in text]
        sections.append("\n\n".join([f"#### {one.name}", *whole]) + "\n")
    return filled("monitoring.md", "conditions", "\n".join(sections))


def filled(page: str, name: str, text: str) -> str:
    before, mark, rest = (HERE / page).read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    assert mark, f"docs/{page} has no place for the {name}"
    return before + mark + "\n" + text + "\n" + rest[rest.index("<!-- end -->") :]


def main() -> None:
    (HERE / "figures").mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (HERE / "figures" / f"{name}.png").write_bytes(png(draw()))
    config = QUICKSTART / "config.yaml"
    if config.exists() and "\nseed_everything: 101\n" in config.read_text(encoding="utf-8"):
        for name, draw_run in {"quickstart": draw_quickstart, "shared": draw_shared}.items():
            (HERE / "figures" / f"{name}.png").write_bytes(png(draw_run(QUICKSTART)))
    else:
        print("quickstart.png and shared.png are left as they are: they are drawn of `make quickstart SEED=101`")
    reference = HERE.parent / "build" / "api.md"
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(api(), encoding="utf-8")
    (HERE / "data.md").write_text(data_page(), encoding="utf-8")
    (HERE / "monitoring.md").write_text(monitoring_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
