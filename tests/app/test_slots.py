"""Named slots: what a configuration says, what a later file and an option change, what is refused, which order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_runs import ROOT, command, write_config
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from test_configs import printed

from app.cli.run_record import compared
from app.cli.trainer import shipped_configs, slots_as_wholes
from app.core.errors import UserError
from app.core.files import CONFIGS
from callbacks import (
    SLOTS,
    BetaScheduler,
    PairAudit,
    PairFilter,
    RewardGapStatistics,
    RunCheckpoint,
    entries,
    in_order,
    refuse_listed,
    slot_of,
)

TOP = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "_sft" not in path.stem)


class OwnFilter(PairFilter):
    """A user's variant of one of ours."""


class Own(Callback):
    """A user's callback."""


def chosen(config: dict[str, Any], slot: str) -> dict[str, Any]:
    return config[slot]["init_args"]


def test_the_order_is_that_of_the_table_whatever_the_order_of_the_keys() -> None:
    filled = {
        "checkpoint": RunCheckpoint(),
        "audit": PairAudit(),
        "schedule": BetaScheduler(),
        "filter": OwnFilter(),
    }
    own = Own()
    for keys in itertools.permutations([*filled, "statistics"]):
        given = {"statistics": RewardGapStatistics(), **filled, "health": None}
        found = in_order({key: given[key] for key in keys}, [own])
        assert [type(one).__name__ for one in found] == [
            *("RewardGapStatistics", "OwnFilter", "BetaScheduler", "Own", "PairAudit", "RunCheckpoint"),
        ]
    assert in_order({slot.name: None for slot in SLOTS}) == []


def test_a_callback_that_decides_nothing_fills_no_slot_that_decides() -> None:
    with pytest.raises(UserError, match=r"schedule: Own has no method on_reward_gaps"):
        in_order({"schedule": Own()})
    assert len(in_order({"samples": Own()})) == 1


def test_a_class_belongs_in_one_slot() -> None:
    assert slot_of(EarlyStopping) is None
    for kind, name in {OwnFilter: "filter", TQDMProgressBar: "progress"}.items():
        slot = slot_of(kind)
        assert slot is not None
        assert slot.name == name
    refuse_listed([EarlyStopping, Own])
    with pytest.raises(UserError, match=r"give OwnFilter to the slot 'filter'.*--filter\.OPTION"):
        refuse_listed([Own, OwnFilter])
    with pytest.raises(UserError, match="filter: PairAudit belongs in the slot 'audit'"):
        in_order({"filter": PairAudit()})
    assert len({kind for slot in SLOTS for kind in slot.kinds}) == sum(len(slot.kinds) for slot in SLOTS)


def test_a_recorded_configuration_names_its_callbacks_in_order() -> None:
    own = {"class_path": "my.Own"}
    config = {
        "checkpoint": {"class_path": "callbacks.RunCheckpoint"},
        "filter": {"class_path": "callbacks.PairFilter", "init_args": {"keep_ratio": 0.5}},
        "margin": None,
        "trainer": {"callbacks": own},
    }
    assert list(entries(config)) == [config["filter"], own, config["checkpoint"]]
    assert list(entries({"trainer": {"callbacks": [own]}})) == [own]  # as version 0.1 wrote it
    assert list(entries({})) == []


def test_a_slot_is_emptied_before_a_later_file(tmp_path: Path) -> None:
    file = tmp_path / "arm.yaml"
    file.write_text("filter: {by: head}\nschedule: null\nmodel: {}\n")
    before = ["--config", '{"filter": null}']
    assert slots_as_wholes(["fit", "--config", str(file)]) == ["fit", *before, "--config", str(file)]
    for words in (["--config", "nowhere.yaml"], ["--filter", "{by: head}"], ["--config"]):
        assert slots_as_wholes(["fit", *words]) == ["fit", *words]


@pytest.mark.parametrize(
    "words", [["--config", "{}"], ["--config={}"], ["-c", "{}"], ["-c={}"], ["-c{}"]], ids=lambda words: words[0]
)
def test_every_spelling_of_config_takes_the_name_of_a_shipped_one(words: list[str]) -> None:
    for name, path in (("quickstart", str(CONFIGS / "quickstart.yaml")), ("nowhere.yaml", "nowhere.yaml")):
        given = ["fit", *(word.replace("{}", name) for word in words), "--model.beta0", "0.1"]
        assert shipped_configs(given) == ["fit", "--config", path, "--model.beta0", "0.1"]
        given = [*given[:1], *given[-2:], *given[1:-2]]  # an option before the file counts as well
        assert shipped_configs(given) == ["fit", "--config", path, "--model.beta0", "0.1"]
    assert shipped_configs(["fit", "--config"]) == ["fit", "--config"]


def test_a_later_file_replaces_and_an_option_changes(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = ["fit", "--config", str(ROOT / "configs/quickstart.yaml")]
    other = {
        "filter": {"keep_ratio": 0.3},
        "schedule": {"alpha": 0.2, "floor": 0.5},
        "checkpoint": {"every_n_steps": 9},
    }
    words = ["--config", json.dumps(other), "--config", str(ROOT / "configs/method/random_filter.yaml")]
    config = printed([*quickstart, *words, "--filter.seed", "4"], capsys)
    assert chosen(config, "filter") == {"keep_ratio": 0.8, "seed": 4, "by": "random"}
    assert config["schedule"] is None
    assert chosen(config, "checkpoint")["every_n_steps"] == 9  # an arm leaves what it does not name
    config = printed([*quickstart, *words[:2], "--config", '{"schedule": {"epsilon": 0.02}}'], capsys)
    assert config["schedule"]["class_path"] == "callbacks.EpsilonBeta"
    assert chosen(config, "schedule") == {"epsilon": 0.02, "floor": None, "ceiling": None}


@pytest.mark.parametrize("path", TOP, ids=lambda path: path.stem)
def test_options_of_slots_work_on_every_recipe(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = printed(["fit", "--config", str(path), "--filter", "null", "--schedule.alpha", "1.0"], capsys)
    assert config["filter"] is None
    assert chosen(config, "schedule")["alpha"] == 1.0
    assert {name: chosen(config, "schedule")[name] for name in recipe["schedule"]} == recipe["schedule"] | {
        "alpha": 1.0
    }
    assert config["statistics"]["class_path"] == "callbacks.RewardGapStatistics"
    on = {slot.name for slot in SLOTS if slot.on}
    assert {slot.name for slot in SLOTS if config[slot.name]} == on | {"statistics", "schedule"}


def test_version_0_1_is_refused() -> None:
    with pytest.raises(UserError, match=r"of version 0\.1.*finish that run with version 0\.1"):
        compared({"trainer": {"callbacks": []}}, {})
    assert compared({"checkpoint": None}, {}) == {}


def test_what_a_run_takes_from_its_slots(tiny_llama: str, tmp_path: Path) -> None:
    """Lines of progress, no checkpoint, and a filter of the user's own, all at once; then what is refused."""
    write_config(tmp_path, tiny_llama)
    (tmp_path / "own.py").write_text(
        "from callbacks import PairFilter\n\n\n"
        "class Own(PairFilter):\n    def setup(self, trainer, pl_module, stage):\n"
        "        super().setup(trainer, pl_module, stage)\n        print('own filter of', self.keep_ratio)\n"
    )
    words = ["fit", "--config", "config.yaml", "--trainer.max_steps", "4", "--trainer.enable_progress_bar", "true"]
    slots = ["--filter", "{class_path: own.Own, init_args: {keep_ratio: 0.5}}", "--checkpoint", "null"]
    done = command(
        tmp_path, *words, *slots, "--progress.every_n_steps", "2", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}:."
    )
    assert done.returncode == 0, done.stderr
    assert "own filter of 0.5" in done.stdout
    assert [line.split("  ")[0] for line in done.stdout.splitlines() if line.startswith("step")] == [
        "step 2/4",
        "step 4/4",
    ]
    assert not (tmp_path / "runs/run/checkpoints").exists()
    refused = command(tmp_path, *words, "--trainer.callbacks+", "callbacks.PairFilter")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("beta-dpo: trainer.callbacks is for callbacks of your own")
    silent = ("predict", "--config", "config.yaml", "--trainer.callbacks", "null", "--scores", "null")
    assert "scores: predict would keep none of its scores" in command(tmp_path, *silent).stderr.splitlines()[-1]
