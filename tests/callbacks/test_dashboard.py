"""TensorBoard: every documented curve, the histograms and the charts that put β and the gap together."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_runs import controlled, preference, quiet_trainer

from callbacks import AnnotatorReliability, BetaDashboard, BetaScheduler, PairFilter, RewardGapStatistics
from callbacks.dashboard import CHARTS, SETTINGS, as_markdown, charts_with, settings_of, summaries

TAGS = {
    *(f"beta/{name}" for name in ("used", "base", "clamped")),
    *(f"gap/{name}" for name in ("mean", "kept_mean", "running_mean", "running_std")),
    *(f"filter/{name}" for name in ("kept_fraction", "effective_sample_size")),
    *(
        f"train/{name}"
        for name in (
            "loss",
            "reward_accuracy",
            "reward_margin",
            "reward_chosen",
            "reward_rejected",
            "logp_chosen",
            "logp_rejected",
            "grad_norm",
            "pairs_per_second",
            "tokens_per_second",
        )
    ),
}
VALIDATION = {
    f"val/{name}" for name in ("loss", "reward_accuracy", "reward_margin", "logp_chosen", "logp_rejected")
}
STEPS = 3


@pytest.fixture(scope="module")
def board(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """A run with the callbacks of the quickstart, as its file lists them, and RE-PO."""
    folder = tmp_path_factory.mktemp("board")
    quickstart = yaml.safe_load((Path(__file__).parents[2] / "configs/quickstart.yaml").read_text(encoding="utf-8"))
    callbacks: list[Any] = [
        RewardGapStatistics(**quickstart["statistics"]),
        PairFilter(**quickstart["filter"]),
        BetaScheduler(**quickstart["schedule"]),
        AnnotatorReliability("kind"),
        BetaDashboard(histogram_every_n_steps=1, kl_every_n_steps=2),
    ]
    logger = TensorBoardLogger(str(folder), name="", version="run")
    trainer = quiet_trainer(
        folder,
        callbacks,
        logger=logger,
        log_every_n_steps=1,
        max_steps=STEPS,
        limit_val_batches=1.0,
        val_check_interval=STEPS,
        enable_checkpointing=True,
    )
    trainer.fit(preference(tiny_llama), controlled(10 * STEPS))
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def test_every_documented_curve_has_a_point_for_every_step(board: EventAccumulator) -> None:
    scalars = set(board.Tags()["scalars"])
    assert scalars >= TAGS | VALIDATION
    for tag in TAGS:
        assert [event.step for event in board.Scalars(tag)] == list(range(1, STEPS + 1)), tag
    assert [event.value for event in board.Scalars("filter/kept_fraction")] == pytest.approx([0.8] * STEPS)
    assert board.Scalars("train/loss")[0].value == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert [event.step for event in board.Scalars("val/loss")] == [STEPS]


def test_the_clocks_and_the_gap_agree_with_each_other(board: EventAccumulator) -> None:
    values = {tag: [event.value for event in board.Scalars(tag)] for tag in TAGS}
    for step in range(STEPS):
        margin = values["train/reward_chosen"][step] - values["train/reward_rejected"][step]
        assert values["train/reward_margin"][step] == pytest.approx(margin, abs=1e-4)
        assert values["train/reward_margin"][step] == pytest.approx(0.1 * values["gap/mean"][step], abs=1e-5)
        expected = 0.1 * (1 + 0.6 * (values["gap/kept_mean"][step] - values["gap/running_mean"][step]))
        assert values["beta/used"][step] == pytest.approx(max(expected, 1e-3), abs=1e-5)
        assert values["train/tokens_per_second"][step] > values["train/pairs_per_second"][step]


def test_histograms_of_kept_and_dropped_gaps(board: EventAccumulator) -> None:
    assert {"gap/kept", "gap/dropped"} <= set(board.Tags()["histograms"])
    kept, dropped = (board.Histograms(f"gap/{name}") for name in ("kept", "dropped"))
    assert [event.histogram_value.num for event in kept] == [8.0] * STEPS
    assert [event.histogram_value.num for event in dropped] == [2.0] * STEPS


def test_every_chart_of_the_layout_has_its_curves(board: EventAccumulator) -> None:
    (event,) = board.Tensors("custom_scalars__config__")
    written = Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in written.category] == ["β", "rewards", "drift", "speed"]
    scalars = board.Tags()["scalars"]
    for category in written.category:
        assert [chart.title for chart in category.chart] == [chart.title for chart in CHARTS[category.title]]
        for chart in category.chart:
            bands = [tag for band in chart.margin.series for tag in (band.value, band.lower, band.upper)]
            for tag in bands or chart.multiline.tag:
                matching = [scalar for scalar in scalars if re.match(tag, scalar)]  # as TensorBoard does
                assert len(matching) == (tag != "beta/ceiling$"), (chart.title, tag)
    charts = [set(chart.tags) for chart in CHARTS["β"]]
    assert any({"beta/used", "gap/mean"} <= tags for tags in charts)


def test_a_run_without_statistics_leaves_whole_charts_out() -> None:
    plain = {"beta/used", "beta/base", "gap/mean", "filter/kept_fraction", "train/loss"}
    of_dpo = charts_with(plain)
    assert "effective sample size of the filter, in pairs" not in [chart.title for chart in of_dpo["β"]]
    assert of_dpo.keys() == {"β", "rewards"}
    # TensorBoard merges the layouts of runs and shows a chart twice that is not the same in both
    for name, charts in of_dpo.items():
        assert all(chart in CHARTS[name] for chart in charts)


def test_every_chart_says_what_to_do(board: EventAccumulator) -> None:
    for number, (name, charts) in enumerate(CHARTS.items(), 1):
        (event,) = board.Tensors(f"how to read/{number} {name}/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        for chart in charts:
            assert f"| **{chart.title}** | {chart.shows} | {chart.when_wrong} |" in text


def test_the_most_extreme_pairs_are_shown_with_their_texts(board: EventAccumulator) -> None:
    (lowest,) = board.Tensors("pairs/lowest gaps/text_summary")
    (highest,) = board.Tensors("pairs/highest gaps/text_summary")
    tables = [event.tensor_proto.string_val[0].decode().splitlines()[2:] for event in (lowest, highest)]
    assert [len(table) for table in tables] == [5, 5]
    gaps = [[float(re.findall(r"h = (\S+)\*\*", row)[0]) for row in table] for table in tables]
    assert gaps[0] == sorted(gaps[0])
    assert gaps[1] == sorted(gaps[1], reverse=True)
    assert gaps[0][-1] < 0 < gaps[1][-1]
    for row in tables[0]:
        prompt, chosen, rejected = (cell.strip() for cell in row.split("|")[2:5])
        assert len({prompt, chosen, rejected, "–"}) == 4
        assert "flipped: " in row


def test_the_kl_is_logged_at_its_own_steps(board: EventAccumulator) -> None:
    for side in ("chosen", "rejected"):
        events = board.Scalars(f"train/kl_{side}")
        assert [event.step for event in events] == [1, 3]
        assert events[0].value == 0  # policy and reference are one
        assert events[1].value > 1e-4


def test_text_cannot_break_the_table() -> None:
    pair = {"gap": -1.5, "step": 3, "pair_id": "a|b", "kept": True, "kind_x": "x", "grade": None}
    texts = {"a|b": {"prompt": "one\n| two |", "chosen": "<script>*x*", "rejected": "long " * 100}}
    *_, row = as_markdown([pair], texts).splitlines()
    assert row.startswith("| **h = -1.500**, kept at step 3; ")
    assert "…" in row
    assert "grade" not in row
    seen = markdown_to_safe_html(as_markdown([pair], texts))  # as TensorBoard shows it
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", seen)]
    assert len(cells) == 4
    assert cells[0].endswith("; a|b; kind_x: x")
    assert cells[1:3] == ["one | two |", "<script>*x*"]


def test_settings_come_from_the_record_of_the_run() -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/quickstart.yaml").read_text(encoding="utf-8"))
    for slot in ("statistics", "filter", "schedule"):  # as recorded
        config[slot] = {"class_path": f"callbacks.{slot}", "init_args": config[slot]}
    found = settings_of(config)
    wanted = {"α": 0.6, "ρ": 0.8, "β0": 1.0, "learning rate": 2.0e-4, "optimizer": "Adam", "seed": 1}
    assert found.items() >= wanted.items()
    assert found["loss"] == "SigmoidLoss"
    assert "ε" not in found
    assert settings_of({}) == {"loss": "SigmoidLoss"}
    columns, start, _ = summaries(found)
    experiment = HParamsPluginData.FromString(columns.value[0].metadata.plugin_data.content).experiment
    assert [info.name for info in experiment.hparam_infos] == list(SETTINGS)
    session = HParamsPluginData.FromString(start.value[0].metadata.plugin_data.content).session_start_info
    assert dict(session.hparams).keys() == found.keys()


def test_runs_without_tensorboard(tiny_llama: str, tmp_path: Path) -> None:
    quiet_trainer(tmp_path, [BetaDashboard()], max_steps=1).fit(preference(tiny_llama), controlled(4))


def test_the_interval_is_checked() -> None:
    with pytest.raises(ValueError, match="histogram_every_n_steps must be a whole number from 1"):
        BetaDashboard(0)
    with pytest.raises(ValueError, match="kl_every_n_steps must be a whole number from 0"):
        BetaDashboard(kl_every_n_steps=-1)
