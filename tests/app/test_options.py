"""Bad values of options drawn from the command's own schema: status 2 and a sentence that names the option."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from pathlib import Path

import pytest
import yaml
from command_runs import write_config
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from app.cli.dispatch import trainer_options
from app.cli.mistakes import sentence
from app.cli.options import check_values, options_of
from app.cli.trainer import BetaDPOCLI, lightning_options
from app.commands import COMMANDS, function_of
from app.core.errors import UserError
from app.main import main
from callbacks import SLOTS
from datamodules import ControlledTask, PreferenceData
from lightning_modules import PreferenceOptimization, ShardedStrategy, SupervisedFineTuning

BAD = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "-1e300",
    "1e300",
    "",
    "β σ ☃",
    "[1, [2]]",
    "{a: {b: 1}}",
    "x" * 5000,
    "null",
    "true",
]
CLASSES = [
    Trainer,
    PreferenceOptimization,
    SupervisedFineTuning,
    ControlledTask,
    PreferenceData,
    ShardedStrategy,
]
OURS = [kind for slot in SLOTS for kind in slot.kinds]


class Parsed(BetaDPOCLI):
    """Reads and checks a configuration, and builds nothing."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def parse(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], str | None]:
    """What a user is told about `fit` with these options; None where they are accepted."""
    folder = tmp_path_factory.mktemp("options")
    write_config(folder, tiny_llama)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["callbacks"] = config["schedule"] = config["filter"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    base = ["fit", "--config", str(folder / "config.yaml")]
    parser = Parsed(LightningModule, LightningDataModule, **lightning_options(base)).parser

    def told(words: list[str]) -> str | None:
        try:
            check_values(parser.parse_args([*base, *words])["fit"])
        except ArgumentError as error:
            return sentence(str(error), "fit", trainer_options())
        except UserError as error:
            return str(error)
        return None

    return told


def takes_text(name: str) -> bool:
    """Whether some class has an option of this name whose value may be text."""
    option = name.rpartition(".")[2]
    parameters = [signature(kind).parameters for kind in (*CLASSES, *OURS)]
    return any(
        option in some and re.search(r"\b(str|Path|RowFormat)\b", str(some[option].annotation))
        for some in parameters
    )


def options() -> Iterator[tuple[list[str], str]]:
    """Words that choose a class, and the name of one of its options, for all classes of ours and the Trainer."""
    yield from (([], f"trainer.{name}") for name in options_of(Trainer))
    for chosen, part, kind in (
        ([], "model", PreferenceOptimization),
        (["--model", "SupervisedFineTuning"], "model", SupervisedFineTuning),
        ([], "data", ControlledTask),
        (["--data", "PreferenceData", "--data.path", "x.jsonl"], "data", PreferenceData),
        (["--trainer.strategy", "ShardedStrategy"], "trainer.strategy", ShardedStrategy),
        *(([f"--{slot.name}", kind.__name__], slot.name, kind) for slot in SLOTS for kind in slot.kinds),
    ):
        yield from ((chosen, f"{part}.{name}") for name in options_of(kind))


def check(parse: Callable[[list[str]], str | None], cases: list[tuple[list[str], str, str]]) -> None:
    for chosen, name, value in cases:
        said = parse([*chosen, f"--{name}={value}"])
        if said is None:
            # legal are numbers that are finite, and text where text is wanted
            assert value not in ("1e300", "-1e300") or takes_text(name), (name, value)
            continue
        assert name.rpartition(".")[2] in said, (name, value, said)
        assert len(said) < 900, (name, value, said)
        assert "Union subtypes" not in said
        assert "Traceback" not in said


def drawn(count: int) -> list[tuple[list[str], str, str]]:
    every = [(chosen, name, value) for chosen, name in options() for value in BAD]
    return random.Random(17).sample(every, count)


def test_a_sample_of_bad_values_gets_a_sentence(parse: Callable[[list[str]], str | None]) -> None:
    check(parse, drawn(30))


@pytest.mark.slow
@pytest.mark.skipif(
    "EVERY_OPTION" not in os.environ, reason="two thousand starts, a quarter of an hour: EVERY_OPTION=1"
)
def test_every_bad_value_of_every_option_gets_a_sentence(parse: Callable[[list[str]], str | None]) -> None:
    check(parse, [(chosen, name, value) for chosen, name in options() for value in BAD])


NUMBERS = [
    ("model.beta0", [], 0),
    ("model.max_grad_norm", [], 0),
    ("model.sft_weight", [], -1),
    ("data.flip_rate", [], 2),
    ("data.batch_size", [], 0.5),
    ("trainer.strategy.replicas", ["--trainer.strategy", "ShardedStrategy"], 0),
    ("schedule.alpha", [], "x"),
    ("filter.keep_ratio", [], 0),
    ("schedule.epsilon", [], 1),
    ("model.loss.gamma", ["--model.loss", "SimPOLoss"], -1),
    ("model.optimizer.lr", ["--model.optimizer", "torch.optim.SGD"], "x"),
]


@pytest.mark.parametrize(("name", "chosen", "wrong"), NUMBERS, ids=lambda value: str(value))
def test_no_number_is_beyond_its_range(
    name: str, chosen: list[str], wrong: object, parse: Callable[[list[str]], str | None]
) -> None:
    for value in (wrong, ".nan", "inf", "1e300", "[]"):
        said = parse([*chosen, f"--{name}={value}"])
        assert said is not None, value
        assert name.rpartition(".")[2] in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model.beta=0.2", "model.beta: PreferenceOptimization has no such option. Did you mean beta0?"),
        (
            "--model.loss=ipo",
            "'ipo' names no class of PairLoss: name one, for example --model.loss IPOLoss",
        ),
        ("--model.optimizer=adamw", "for example --model.optimizer torch.optim.AdamW"),
        ("--model.lora={r:0}", "are no settings of Lora: give a mapping, {name: value}, of r, lora_alpha"),
        ("--tariner.max_steps=3", "Did you mean --trainer.max_steps?"),
        ("--nodes=2", "Did you mean --trainer.num_nodes?"),
        ("--data.batch_siz=3", "data.batch_siz: ControlledTask has no such option. Did you mean batch_size?"),
        ("--trainer.max_steps=-5", "trainer.max_steps must be a whole number from -1"),
        ("--trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be a whole number from 1"),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be a whole number from 1"),
        ("--model.layout=diagonal", "model.layout: expected one of 'auto', 'packed', 'separate', not 'diagonal'"),
    ],
)
def test_the_sentence_says_what_to_do(words: str, said: str, parse: Callable[[list[str]], str | None]) -> None:
    assert said in (parse([words]) or "")


@pytest.mark.parametrize("value", ["nan", "-1", "x", "1e300"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate m o.jsonl", "top_p"),
        ("generate m o.jsonl", "count"),
        ("generate m o.jsonl", "temperature"),
        ("generate m o.jsonl", "batch_size"),
        ("generate m o.jsonl", "seed"),
        ("audit run", "count"),
        ("judge a b", "endpoint.timeout"),
        ("judge a b", "endpoint.parallel"),
    ],
)
def test_numbers_of_the_small_commands(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.split()[0] in COMMANDS
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), f"--{option}", value])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert said.startswith("beta-dpo: ")
    assert option.rpartition(".")[2] in said


@pytest.mark.parametrize("value", [float("nan"), 1e300, -1, None, [[1]], {}], ids=repr)
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("judge", name) for name in ("answers", "by", "endpoint", "verdicts")),
        *(("report", name) for name in ("runs", "out")),
        *(("convert", name) for name in ("gguf", "out")),
        *(("generate", name) for name in ("count", "prompts")),
        ("audit", "run"),
        ("export", "adapter"),
        ("quickstart", "seed"),
    ],
)
def test_calls_from_python(command: str, option: str, value: object) -> None:
    function = function_of(command)
    needed = {n: ["a", "b"] if "list" in str(one.annotation) else "a" for n, one in required(function).items()}
    if value is None and (command, option) in (("generate", "count"), ("report", "out")):
        return  # all prompts; the folder of the run
    with pytest.raises(UserError, match=f"^{option} must be "):
        function(**(needed | {option: value}))


def required(function: Callable[..., None]) -> dict[str, Parameter]:
    return {name: one for name, one in signature(function).parameters.items() if one.default is Parameter.empty}


def test_a_number_is_written_back_as_it_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
    with pytest.raises(SystemExit):
        main(["fit", "--config", quickstart, "--model.beta0=0.25", "--data.batch_size=32", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["beta0"] == 0.25
    assert config["data"]["init_args"]["batch_size"] == 32
