"""Every shipped configuration parses and builds its model, data and callbacks; wrong options get one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_runs import environment, refusal, write_config

from app.commands import COMMANDS
from app.main import TRAINER_COMMANDS, main, overview
from callbacks import entries

ROOT = Path(__file__).parents[2]
COMPLETE = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path not in COMPLETE)

# what a run is made of, in this order, after the overlay of the same name
METHOD = {
    "beta_dpo": ["RewardGapStatistics", "PairFilter", "BetaScheduler"],
    "dynamic_beta": ["RewardGapStatistics", "BetaScheduler"],
    "filter_only": ["RewardGapStatistics", "PairFilter"],
    "dpo": [],
    "explicit_reward": ["ExplicitRewardGap", "RewardGapStatistics", "PairFilter", "BetaScheduler"],
    "reference_weights": ["RewardGapStatistics", "ReferenceWeights"],
    "standardised_margin": ["RewardGapStatistics", "PairFilter", "StandardisedMargin"],
    "epsilon_dpo": ["EpsilonBeta"],
}
RECORDS = ["PairAudit", "BetaDashboard", "HealthMonitor", "RunCheckpoint", "TextProgress"]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """What `--print_config` shows: the configuration after parsing and type checking."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return yaml.safe_load(captured.out)


def callbacks_of(config: dict) -> list[str]:
    return [callback["class_path"].rpartition(".")[2] for callback in entries(config)]


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_complete_configurations_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(["fit", "--config", str(path)], capsys)
    if "sft" in path.stem:
        assert config["model"]["class_path"] == "lightning_modules.SupervisedFineTuning"
        assert callbacks_of(config) == RECORDS
    else:
        assert config["model"]["class_path"] == "lightning_modules.PreferenceOptimization"
        assert callbacks_of(config) == METHOD["beta_dpo"] + RECORDS


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_overlays_parse_on_the_quickstart(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = str(ROOT / "configs/quickstart.yaml")
    config = printed(["fit", "--config", quickstart, "--config", str(path)], capsys)
    if path.parent.name == "method" and path.stem in METHOD:
        assert callbacks_of(config) == METHOD[path.stem] + RECORDS


def test_there_are_few_files() -> None:
    assert len(COMPLETE) + len(OVERLAYS) <= 35
    for path in (ROOT / "configs/method").glob("*.yaml"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert 3 <= len(lines) <= 7, path


def test_the_papers_recipe_takes_another_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs/hh_pythia.yaml")
    config = printed(["fit", "--config", recipe, "--model.name", "EleutherAI/pythia-1.4b"], capsys)
    assert config["model"]["init_args"]["name"] == "EleutherAI/pythia-1.4b"
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.RMSprop"
    assert config["data"]["init_args"]["max_length"] == 512


def test_variants_of_beta_dpo_parse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last column of the table *Which β-DPO did you run?* in docs/choosing.md."""
    monkeypatch.chdir(ROOT)
    _, section = (ROOT / "docs/choosing.md").read_text(encoding="utf-8").split("## Which β-DPO did you run?\n")
    rows = re.findall(r"^\|.*\| `(--config [^`]+)` \|$", section.partition("\n## ")[0], re.MULTILINE)
    scales = []
    for row in rows:
        config = printed(["fit", "--config", "configs/quickstart.yaml", *row.split()], capsys)
        scales.append(config["statistics"]["init_args"]["gap_scale"])
    assert scales == ["raw", "beta0", "raw", "beta0", "raw"]


def test_a_sweep_of_an_agent_parses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep for Weights & Biases in docs/clusters.md, whose agent gives every parameter as --name=value."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```yaml\n(program: .*?)```", text, re.DOTALL)
    sweep = yaml.safe_load(found)
    given = [f"--{name}={entry['values'][-1]}" for name, entry in sweep["parameters"].items()]
    _, *command, last = sweep["command"]
    assert last == "${args}"
    config = printed([*command, *given], capsys)
    assert config["model"]["init_args"]["beta0"] == 0.1
    assert config["schedule"]["init_args"]["alpha"] == 0.6
    assert config["seed_everything"] == 3
    assert config["trainer"]["logger"]["init_args"]["offline"] is False


def test_help_names_every_command() -> None:
    for name in [*TRAINER_COMMANDS, *COMMANDS]:
        assert f"\n  {name} " in overview()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan", "--memory_gb         memory of one device"),
        ("show", "--prepare           tokenise"),
        ("audit", "usage: beta-dpo audit [--config"),
        ("audit", "(type: PositiveInt"),
    ],
)
def test_the_help_of_other_commands(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert words in " ".join(capsys.readouterr().out.split("\n" + " " * 24))


def test_the_help_of_fit_names_slots_and_model_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    for words in (
        "--schedule",
        "EpsilonBeta: epsilon=0.01",
        "PreferenceOptimization: name, beta0=0.1",
        "--model.help",
    ):
        assert words in shown
    assert len(shown.splitlines()) < 80


def test_wrong_words_get_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    quickstart = ["fit", "--config", str(ROOT / "configs/quickstart.yaml")]
    assert "nowhere.yaml" in refusal([*quickstart, "--config=nowhere.yaml"], capfd)
    gap_mixture = ["--data.gap_mixture.samples=s.jsonl", "--data.gap_mixture.share=2"]
    assert "share: must be" in refusal([*quickstart, *gap_mixture], capfd)
    with pytest.raises(SystemExit):
        main(["frobnicate"])
    assert "frobnicate" in capfd.readouterr().err


def test_report_takes_its_runs_as_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 2
    assert f"There is no folder {tmp_path / 'one'}" in capsys.readouterr().err


def test_fit_loads_no_library_that_it_does_not_need(tmp_path: Path, tiny_llama: str) -> None:
    write_config(tmp_path, tiny_llama)
    unneeded = {"altair", "vl_convert", "datasets", "sklearn", "peft", "openai", "app.commands.report"}
    check = f"import sys; from app.main import main; main(sys.argv[1:]); print({unneeded} & {{*sys.modules}})"
    line = [sys.executable, "-c", check, "fit", "--config", "config.yaml", "--trainer.max_steps", "1"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


def test_help_and_version_load_no_library() -> None:
    check = "import sys; from app.main import main; main([sys.argv[1]]); assert 'torch' not in sys.modules"
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", check, option], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
