"""The page from runs on disk: whole, or with this or that missing; self-contained, and every text escaped."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from synthetic_runs import STEPS, audit_of, run_with, scalars_of, write_run
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer

from app.commands.report import report
from app.core.errors import UserError
from app.core.intervals import digits, wilson
from app.report.charts import MOST_POINTS, density, drift, dropped, response, rows_panel, smoothed, thinned
from app.report.page import differences, missing, numbers_of, spec_of
from app.report.plot import Line, axis, lines
from app.report.run import read_curves, read_run
from callbacks import PairAudit, TextProgress
from callbacks.pair_audit import read_audit

CONFIG = "model: {init_args: {beta0: 0.1}}\ntrainer: {callbacks: [{class_path: callbacks.%s}]}\n"
COMMANDS = "beta-dpo fit --config a.yaml\nbeta-dpo test --config a.yaml\nbeta-dpo fit --ckpt_path last\n"


class Page(HTMLParser):
    """What a browser would see of a page: tags with attributes, ids, and the text."""

    VOID = ("meta", "link", "line", "circle", "path", "polygon", "input", "br")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.specs: list[dict[str, Any]] = []
        self.feed(file.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and data.startswith("{"):
            self.specs.append(json.loads(data))
        else:
            self.text += f" {data}"

    @property
    def anchors(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.tags if "id" in attributes]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole runs, `a/version_0` with filter and dynamic β and `b/version_0` without."""
    folder = tmp_path_factory.mktemp("runs")
    for name, dynamic in (("a", True), ("b", False)):
        write_run(
            folder / name / "version_0",
            audit_of(filtered=dynamic),
            scalars_of(dynamic=dynamic),
            config_yaml=CONFIG % ("PairFilter" if dynamic else "PairAudit"),
            commands_txt=COMMANDS,
        )
    return folder


def draw(tmp_path: Path, *runs: Path) -> Page:
    report([str(run) for run in runs], out=str(tmp_path / "page.html"))
    return Page(tmp_path / "page.html")


def test_a_whole_page(two_runs: Path, tmp_path: Path) -> None:
    page = draw(tmp_path, two_runs / "a/version_0", two_runs / "b/version_0")
    wanted = ["findings", "numbers", "quality", "beta", "response", "band", "density", "kept", "accuracy", "filter"]
    assert [anchor for anchor in page.anchors if anchor != "scheme"] == [*wanted, "drift", "speed", "settings"]
    assert "a/version_0" in page.text
    assert page.text.count("beta-dpo fit --config a.yaml") == 2
    assert "beta-dpo test" not in page.text
    links = [attributes["href"] or "" for tag, attributes in page.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= set(page.anchors)
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    assert len(figures) == len(page.specs)
    for figure, spec in zip(figures, page.specs, strict=True):
        assert spec["description"]
        assert (
            ("data-reads" in figure)
            == ("tabindex" in figure)
            == ([p["name"] for p in spec.get("params", ())] == ["at"])
        )


def test_nothing_is_fetched_and_no_text_is_markup(two_runs: Path, tmp_path: Path) -> None:
    page = draw(tmp_path, two_runs / "a/version_0")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    for tag, attributes in page.tags:
        assert "src" not in attributes
        href = attributes.get("href", "#") or ""
        assert href.startswith("#") or href == "data:,", tag
    assert "\\u003cb\\u003ebroken" in source  # a label of the data
    assert "<b>broken" not in source


@pytest.mark.slow
def test_the_same_runs_give_the_same_page(two_runs: Path, tmp_path: Path) -> None:
    draw(tmp_path, two_runs / "a/version_0")
    first = (tmp_path / "page.html").read_bytes()
    draw(tmp_path, two_runs / "a/version_0")
    assert (tmp_path / "page.html").read_bytes() == first


def test_without_an_audit(tmp_path: Path) -> None:
    page = draw(tmp_path, write_run(tmp_path / "run", None, scalars_of()))
    assert "run has no audit" in page.text
    assert "has no config.yaml" in page.text
    assert "The command was not recorded" in page.text
    assert "No samples of an SFT model were given" in page.text
    assert {"beta", "band", "response", "drift", "speed"} <= set(page.anchors)
    assert not {"density", "kept", "filter"} & set(page.anchors)


def test_with_an_audit_alone(tmp_path: Path) -> None:
    page = draw(tmp_path, write_run(tmp_path / "run", audit_of(), {}))
    assert "run has no TensorBoard events" in page.text
    assert {"beta", "band", "response", "density", "kept", "filter", "accuracy"} <= set(page.anchors)
    assert not {"drift", "speed", "quality"} & set(page.anchors)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("data: {init_args: {validation_path: null, validation_share: 0.0}}", "was not evaluated"),
        ("data: {init_args: {validation_pairs: 512}}\ntrainer: {limit_val_batches: 0}", "was not evaluated"),
        ("data: {init_args: {validation_share: 0.05}}", "ended before its first validation"),
        ("data: {init_args: {sources: [{validation_split: null}, {validation_split: test}]}}", "ended before"),
    ],
)
def test_a_run_that_did_not_validate(config: str, told: str, tmp_path: Path) -> None:
    scalars = {tag: values for tag, values in scalars_of().items() if not tag.startswith("val/")}
    (sentence,) = [
        one
        for one in missing([read_run(write_run(tmp_path / "run", None, scalars, config_yaml=config), "run")], True)
        if "held-out" in one
    ]
    assert told in sentence


def test_few_values_are_dots_and_sides_differ_in_dash() -> None:
    (panel,) = drift([run_with(train__kl_chosen=[0.0], train__kl_rejected=[0.0])])
    marks = [layer["mark"] for layer in panel.picture.to_dict()["layer"]]
    assert {"type": "point", "filled": True, "size": 45, "opacity": 0.8, "tooltip": True} in marks
    dashes = next(d for layer in panel.picture.to_dict()["layer"] if (d := layer["encoding"].get("strokeDash")))
    chosen, rejected = dashes["scale"]["range"]
    assert chosen != rejected


def test_the_values_of_a_numeric_label_are_in_their_order() -> None:
    audit = audit_of()
    audit["grade"] = [(7, 3, 3, 5, 5, 5)[number % 6] for number in range(len(audit))]
    (panel,) = [panel for panel in dropped(run_with("run", audit), 0) if "grade" in panel.title]
    places = [panel.said.index(f" {grade}, ") for grade in (3, 5, 7)]
    assert places == sorted(places)


def test_values_left_out_of_a_label_are_counted() -> None:
    audit = audit_of()
    audit["annotator"] = [f"w{number % 12}" for number in range(len(audit))]
    (title,) = [panel.title for panel in dropped(run_with("run", audit), 0) if "annotator" in panel.title]
    assert title == "run: share dropped, by annotator, 8 most frequent of 12 values"


def test_the_key_has_dots_for_dots() -> None:
    curves = [Line("run", [1, 2, 3], [1, 2, 3]), Line("held out", [1], [2], width=0, dots=True)]
    layers = lines(curves, axis(alt.X, "step"), axis(alt.Y, "share")).to_dict()["layer"]
    (shape,) = [found for layer in layers if (found := layer["encoding"].get("shape"))]
    assert shape["scale"]["range"] == ["stroke", "circle"]
    marked = [Line(name, [1, 2], [1, 2], dots=True) for name in "ab"]  # lines with dots are lines in the key
    assert "shape" not in str(lines(marked, axis(alt.X, "step"), axis(alt.Y, "share")).to_dict())


def test_a_label_called_policy_is_a_label() -> None:
    audit = audit_of()
    audit["policy"] = [f"w{number % 2}" for number in range(len(audit))]
    own, ranking = dropped(run_with("run", audit), 0)[-2:]
    assert (own.title, ranking.title) == (
        "run: share dropped, by policy",
        "run: share dropped, by the policy's own ranking",
    )
    assert "w0" in own.said


def test_a_run_of_sft_has_its_loss() -> None:
    assert numbers_of(run_with(train__loss=[3.0, 2.0, 1.5])) == {"training loss: first, last": "3, 1.5"}


def test_curves_without_a_common_step_have_no_response() -> None:
    run = run_with(beta__used=[0.1], gap__mean=[0.2])
    run.curves["gap/mean"].index = [7]
    assert response([run]) == []


def test_wanted_samples_that_are_missing(
    two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sft = str(tmp_path / "page.html"), tmp_path / "sft.jsonl"
    with pytest.raises(UserError, match=r"there is no file .*sft\.jsonl"):
        report([str(two_runs / "b/version_0")], baseline=str(sft), out=out)
    sft.write_text("")
    report([str(two_runs / "b/version_0")], baseline=str(sft), out=out)
    assert "has no samples.jsonl in its folder" in Page(tmp_path / "page.html").text
    assert "no samples.jsonl in the folder, so nothing is compared with" in capsys.readouterr().out


def test_a_run_without_gaps(tmp_path: Path) -> None:
    page = draw(tmp_path, write_run(tmp_path / "sft", None, {"train/loss": [1.0, 0.5], "val/loss": [0.6]}))
    assert "sft logged no reward gaps" in page.text
    assert "was not evaluated" not in page.text


def test_a_run_of_one_step(tmp_path: Path) -> None:
    page = draw(tmp_path, write_run(tmp_path / "run", audit_of(steps=1), scalars_of(steps=1)))
    assert {"beta", "speed"} <= set(page.anchors)
    assert "density" not in page.anchors  # every gap is 0


def test_what_cannot_be_a_report(two_runs: Path, tmp_path: Path) -> None:
    run = str(two_runs / "a/version_0")
    with pytest.raises(UserError, match=r"out must end in \.html or \.png"):
        report([run], out="x.pdf")
    with pytest.raises(UserError, match="the same folder is given twice"):
        report([run, f"{run}/../version_0"], out=str(tmp_path / "x.html"))
    with pytest.raises(UserError, match=r"neither TensorBoard events, metrics\.csv nor audit"):
        report([str(tmp_path)], out=str(tmp_path / "x.html"))
    broken = write_run(tmp_path / "broken", None, scalars_of())
    with pytest.raises(UserError, match=r"has no audit/\*\.parquet"):
        report([str(broken)], out=str(tmp_path / "x.png"))
    (broken / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is not YAML"):
        report([str(broken)], out=str(tmp_path / "x.html"))
    (broken / "audit").mkdir()
    (broken / "audit" / "steps.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="audit cannot be read"):
        report([str(broken)], out=str(tmp_path / "x.html"))
    shutil.rmtree(broken / "audit")
    (broken / "config.yaml").write_bytes(b"a: caf\xe9")
    with pytest.raises(UserError, match=r"config\.yaml is not YAML"):
        report([str(broken)], out=str(tmp_path / "x.html"))
    for config in ("trainer: 5", "filter: 3", "- 1", "schedule: {init_args: [1]}", "data: {init_args: [1]}"):
        (broken / "config.yaml").write_text(config)
        with pytest.raises(UserError, match="is not the record of `beta-dpo fit`"):
            report([str(broken)], out=str(tmp_path / "x.html"))
    with pytest.raises(UserError, match=r"Did you mean .*/a/version_0\?"):
        report([str(two_runs / "a")], out=str(tmp_path / "x.html"))
    for name, audit, said in (
        ("no rows", audit_of().iloc[:0], "no row"),
        ("no gap", audit_of().drop(columns="gap"), "no column gap"),
        ("gap as text", audit_of().astype({"gap": str}), "other values in gap"),
        ("null", audit_of().assign(kept=None), "other values in kept"),
        ("lost step", audit_of().assign(step=np.nan), "other values in step"),
        ("number", audit_of().assign(pair_id=lambda rows: rows.pair_id.where(rows.step > 1)), "values in pair_id"),
        ("copy", pd.concat([audit_of(), audit_of()]), "a pair twice in one step"),
    ):
        with pytest.raises(UserError, match=f"audit has .*{said}.*remove"):
            read_run(write_run(tmp_path / name, audit, {}), name)
    with pytest.raises(UserError, match=r"metrics\.csv is not what CSVLogger writes"):
        read_run(write_run(tmp_path / "text", None, {}, metrics_csv="step,beta/used\n0,0.1\n1,x\n"), "text")
    assert not list(tmp_path.glob("x.*"))
    infinite = audit_of().assign(gap=lambda rows: rows.gap.where(rows.step > 1, np.inf))  # counts as no pair
    assert np.isfinite(
        read_run(write_run(tmp_path / "infinite", infinite, {}), "").curves["gap/mean"].iloc[1:]
    ).all()
    assert 1 not in read_run(tmp_path / "infinite", "").curves["train/reward_accuracy"].dropna().index


@pytest.mark.parametrize("at", ["cut", "spoilt"])
def test_damaged_events_are_said(at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run", None, scalars_of())
    file = next(run.glob("events.*"))
    whole = read_curves(run)
    assert not caplog.records
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] if at == "cut" else content[:half] + b"damaged" + content[half + 7 :])
    assert set(read_curves(run)) < set(whole)
    (said,) = caplog.messages
    assert f"{file.name} is cut or damaged: what follows the damage is not shown" in said


def test_a_run_with_a_csv_logger(tmp_path: Path) -> None:
    table = "step,beta/used,epoch,val/loss\n0,0.1,0,\n1,0.2,0,\n1,,0,0.6\n"
    run = read_run(write_run(tmp_path / "run", None, {}, metrics_csv=table), "run")
    assert {tag: curve.values.tolist() for tag, curve in run.curves.items()} == {
        "beta/used": [0.1, 0.2],
        "val/loss": [0.6],
    }
    (tmp_path / "run" / "metrics.csv").write_text("step,beta/used\n0,0.125\n1,0.1")  # of 0.125
    assert read_run(tmp_path / "run", "run").curves["beta/used"].tolist() == [0.125]
    (tmp_path / "run" / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"metrics\.csv is not what CSVLogger writes"):
        read_run(tmp_path / "run", "run")


def test_a_run_reads_alike_everywhere(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """β, M0 and the pairs kept, in the progress line, the audit, TensorBoard's curves and the report."""
    progress: list[Any] = [TextProgress(every_n_steps=1)]
    logger = TensorBoardLogger(str(tmp_path), name="", version="run")
    trainer = quiet_trainer(
        tmp_path,
        [*progress, *beta_dpo(), PairAudit()],
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=True,
    )
    trainer.fit(preference(tiny_llama), controlled(43))  # four batches of 10 pairs and one of 3
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    lines = [dict(re.findall(r"([\w/]+) ([\d.]+)", line)) for line in printed]
    audit, logged = read_audit(tmp_path / "run"), read_curves(tmp_path / "run")
    numbers = numbers_of(read_run(tmp_path / "run", "run"))

    steps = audit.groupby("step")
    betas = [digits(value) for value in steps.beta.mean()]
    assert betas == [digits(value) for value in logged["beta/used"].values] == [line["beta/used"] for line in lines]
    shown = numbers["β: first, lowest, highest, last"].split(", ")
    assert shown == [betas[0], min(betas, key=float), max(betas, key=float), betas[-1]]
    means = [digits(value) for value in steps.running_mean.first()]
    assert means == [digits(value) for value in logged["gap/running_mean"].values]
    assert numbers["running mean M0 and σ at the end"].startswith(f"{means[-1]}, ")
    kept = steps.kept.sum().tolist()
    assert kept == [6, 6, 6, 6, 1]
    assert [digits(k / n) for k, n in zip(kept, steps.size(), strict=True)] == [
        line["filter/kept_fraction"] for line in lines
    ]
    assert numbers["pairs kept a step"] == "6 of 10; in 1 shorter: 1 of 3"


def test_without_a_filter_every_pair_is_kept(
    two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = two_runs / "b" / "version_0"
    assert numbers_of(read_run(run, "b"))["pairs kept a step"] == "16 of 16"
    report([str(run)])  # the figure has three panels, and lies beside the run's records
    assert (run / "report.png").is_file()
    assert "replaces" not in capsys.readouterr().out
    report([str(run)])
    assert "report.png (replaces the one that was there)" in capsys.readouterr().out.replace("\n", "")


def test_curves_of_the_audit_are_those_that_were_logged(two_runs: Path) -> None:
    run = read_run(two_runs / "a/version_0", "a")
    audit = read_run(write_run(two_runs / "only", audit_of(), {}), "only")
    rows = audit_of()
    first = rows[(rows.step == 8) & rows.kept]
    for tag, value in (("beta/used", first.beta.mean()), ("gap/kept_mean", first.gap.mean())):
        assert audit.curves[tag].values[7] == pytest.approx(value)
    assert len(run.curves["beta/used"]) == len(audit.curves["beta/used"]) == STEPS


def test_settings_that_differ() -> None:
    config = {
        "a": {"class_path": "x.A", "init_args": {"b": 1, "c": None}},
        "trainer": {"callbacks": [{"class_path": "x.Y", "init_args": {"d": 2}}, {"class_path": "Z"}]},
    }
    other = {**config, "a": {"class_path": "x.A", "init_args": {"b": 3, "c": None}}}
    assert differences([config, other]) == [("a.b", ["1", "3"])]
    shown = differences([config, {}])
    assert [row for row in shown if row[0].startswith("trainer.callbacks.")] == [
        ("trainer.callbacks.Y", ["Y", "–"]),
        ("trainer.callbacks.Y.d", ["2", "–"]),
        ("trainer.callbacks.Z", ["Z", "–"]),
    ]


def test_long_curves_are_averaged_not_cut() -> None:
    curve = pd.Series(np.sin(np.arange(10_000)))
    drawn = thinned(curve)
    assert len(drawn) == MOST_POINTS
    assert drawn.iloc[3] == pytest.approx(curve[75:100].mean())
    assert drawn.index[3] == pytest.approx(87)
    holes = smoothed(pd.Series(np.where(np.arange(100) % 2, np.nan, 1.0)))
    assert holes.to_numpy() == pytest.approx(np.ones(100))


def test_a_density_integrates_to_one() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 20_000)
    at = np.linspace(-12, 14, 800)
    found = density(values, at)
    assert np.trapezoid(found, at) == pytest.approx(1, abs=1e-3)
    exact = np.exp(-(((at - 1) / 2) ** 2) / 2) / (2 * np.sqrt(2 * np.pi))
    assert np.abs(found - exact).max() < 0.06 * exact.max()


def test_a_rate_that_is_not_finite_leaves_the_page_valid_json() -> None:
    (panel,) = rows_panel("accuracy", [("run", 0, wilson(float("nan"), 10))], "share of pairs")
    assert json.dumps(spec_of(panel), allow_nan=False)
    assert panel.said == "accuracy: run nan [nan, nan]"
