"""The settings and final figures for TensorBoard's HParams tab, which compares the runs of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import summary as torch_summary

Value = str | float | bool

# title in the tab → key in the run's config.yaml; `*` for init_args
SETTINGS = {
    "α": "schedule.*.alpha",
    "ρ": "filter.*.keep_ratio",
    "β0": "model.*.beta0",
    "learning rate": "model.*.optimizer.*.lr",
    "loss": "model.*.loss.class_path",
    "filter": "filter.*.by",
    "level of β": "schedule.*.level",
    "momentum": "statistics.*.momentum",
    "gap scale": "statistics.*.gap_scale",
    "ε": "schedule.*.epsilon",
    "α of the margin": "margin.*.alpha",
    "sft weight": "model.*.sft_weight",
    "optimizer": "model.*.optimizer.class_path",
    "max grad norm": "model.*.max_grad_norm",
    "model": "model.*.name",
    "data": "data.*.path",
    "batch size": "data.*.batch_size",
    "steps": "trainer.max_steps",
    "epochs": "trainer.max_epochs",
    "seed": "seed_everything",
}
TEXTS = {"loss", "filter", "level of β", "gap scale", "optimizer", "model", "data"}
SHOWN = {"α", "ρ", "β0", "learning rate", "loss"}  # the tab shows five columns by default
# the tab takes the last logged value of a run and shows the first five metrics by default
METRICS = (
    "val/reward_accuracy",
    "val/policy_accuracy",
    "val/loss",
    "train/kl_chosen",
    "beta/used",
    "val/reward_margin",
    "val/log_ratio_chosen",
    "train/reward_accuracy",
    "beta/clamped",
    "train/pairs_per_second",
)


def settings_of(config: Mapping[str, Any]) -> dict[str, Value]:
    """Return the `SETTINGS` that the configuration of a run (config.yaml as read) has a value for."""
    found: dict[str, Value] = {"loss": "SigmoidLoss"}  # the model's default
    for title, path in SETTINGS.items():
        value: Any = config
        for part in path.replace("*", "init_args").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, (str, int, float)):
            found[title] = last_word(value) if path.endswith("class_path") else value
    return found


def arguments(entry: Any) -> Mapping[str, Any]:
    """Return the `init_args` of a `class_path` entry; empty if there are none."""
    return (entry.get("init_args") if isinstance(entry, Mapping) else None) or {}


def last_word(class_path: Any) -> str:
    return str(class_path).rsplit(".", 1)[-1]


def summaries(settings: Mapping[str, Value]) -> tuple[Summary, ...]:
    """Return the summaries that a finished run writes to its event file to appear in the HParams tab.

    The tab takes its columns from one run only, so every run names all settings, even those that it lacks.
    """
    columns = api_pb2.Experiment(
        hparam_infos=[
            # the tab puts the settings marked as different between runs first
            api_pb2.HParamInfo(
                name=title,
                type=api_pb2.DATA_TYPE_STRING if title in TEXTS else api_pb2.DATA_TYPE_FLOAT64,
                differs=title in SHOWN,
            )
            for title in SETTINGS
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS],
    )
    content = HParamsPluginData(experiment=columns, version=metadata.PLUGIN_DATA_VERSION).SerializeToString()
    described = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content)
    )
    _, start, end = torch_summary.hparams(dict(settings), {})
    return Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=described)]), start, end
