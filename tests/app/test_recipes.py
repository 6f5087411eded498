"""Every recipe of docs/pipeline.md is a command that parses to what its name promises."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import audit_of, command
from recipes import PAGE, Recipe, recipes
from test_configs import METHOD, RECORDS, ROOT, callbacks_of, printed
from tiny_runs import save_tiny_model
from transformers import AutoTokenizer

from app.main import main
from app.method import losses

ALL = recipes()
SOURCES = {"HH": "Anthropic/hh-rlhf", "TL;DR": "openai/summarize_from_feedback"}
SOURCES["UltraFeedback"] = "HuggingFaceH4/ultrafeedback_binarized"
SOURCES["UltraChat"] = "HuggingFaceH4/ultrachat_200k"
LAYOUTS = {"1 × 24 GB": (1, "1"), "1 × 80 GB": (1, "1"), "4 × 80 GB": (1, "4"), "8 × 80 GB": (1, "8")}
LAYOUTS["2 nodes of 8 × 80 GB"] = (2, "8")
# every model, data set and layout is in a sixth of them, the rest is for the slow tests
CASES = [
    pytest.param(recipe, id=recipe.name, marks=() if number % 6 == 0 else pytest.mark.slow)
    for number, recipe in enumerate(ALL)
]


def test_the_page_has_them_all() -> None:
    assert Counter(recipe.where for recipe in ALL) == dict.fromkeys(LAYOUTS, 21)
    assert Counter(recipe.what.split(" on ")[0] for recipe in ALL) == {
        **{"Pythia-410M": 20, "Pythia-1.4B": 20, "Pythia-2.8B": 30, "Qwen3-8B": 5},
        **dict.fromkeys(("Llama-3-8B", "Llama-3-8B-Instruct", "Mistral-7B-Instruct"), 10),
    }


@pytest.mark.parametrize("recipe", CASES)
def test_a_recipe_parses(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = printed(list(recipe.arguments), capsys)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    name, source = re.split(" on |, ", recipe.what)[:2]
    if recipe.what.endswith("SFT"):
        assert config["model"]["class_path"] == "lightning_modules.SupervisedFineTuning"
        assert callbacks_of(config) == RECORDS
    else:
        assert config["model"]["class_path"] == "lightning_modules.PreferenceOptimization"
        assert callbacks_of(config) == METHOD["beta_dpo"] + RECORDS
    assert config["checkpoint"]["init_args"]["every_n_steps"] > 0
    # pythia_410m of runs/pythia_410m_hh_sft, Meta-Llama-3-8B-Instruct, …
    family, (size,) = name.lower().split("-")[0], re.findall(r"[\d.]+[MB]", name)
    assert family in model["name"].lower()
    assert size.lower() in model["name"].lower()
    assert data["path"] == SOURCES[source]
    assert data["batch_size"] == (64 if name in ("Pythia-1.4B", "Pythia-2.8B") else 128)
    assert (trainer["num_nodes"], str(trainer["devices"])) == LAYOUTS[recipe.where]
    if part := re.search("(helpful|harmless) alone", recipe.what):
        assert data["subset"] == f"{part[1]}-base"
    if "SimPO" in recipe.what:
        assert (model["beta0"], model["loss"]["init_args"]["gamma"]) == (2.5, 1.375 if "Llama" in name else 0.25)


def test_the_fine_tuned_model_is_what_training_starts_from() -> None:
    """`export`, as the page has it, puts the model where the second stage looks for it."""
    folders = {recipe.arguments[recipe.arguments.index("--trainer.logger.name") + 1] for recipe in ALL}
    starts = [
        after for recipe in ALL for name, after in itertools.pairwise(recipe.arguments) if name == "--model.name"
    ]
    own = [start for start in starts if start.startswith("runs/")]  # the others are ids of the Hub
    assert own
    assert set(own) <= {f"runs/{folder}/model" for folder in folders if folder.endswith("_sft")}


def test_named_options_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the table *Coming from TRL, axolotl, LLaMA-Factory*."""
    monkeypatch.chdir(ROOT)
    lora, loss = ("--config", "configs/model/lora.yaml"), ("--model.loss", "RobustLoss")
    config = printed(["fit", "--config", "configs/hh_pythia.yaml", *lora, *loss], capsys)
    other = printed(["fit", "--config", "configs/ultrafeedback_instruct.yaml", "--model.loss", "SimPOLoss"], capsys)
    section = PAGE.read_text(encoding="utf-8").partition("## Coming from TRL")[2]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    ours = {
        name
        for row in rows
        for name in re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+|ckpt_path|seed_everything)`", row[-1])
    }
    assert len(ours) > 25
    for name in ours:
        assert exists(config, name.split(".")) or exists(other, name.split(".")), name
    classes = {name for row in rows for name in re.findall(r"`([A-Z]\w+Loss)`", row[-1])}
    assert classes <= set(vars(losses))
    if importlib.util.find_spec("trl"):
        from trl import DPOConfig, DPOTrainer

        theirs = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row[1])} - {"sigmoid", "sft"}
        known = {field.name for field in dataclasses.fields(DPOConfig)}
        assert theirs - known == {"peft_config"}
        assert "peft_config" in inspect.signature(DPOTrainer).parameters


def exists(config: Any, names: list[str]) -> bool:
    """Whether an option is among those of a printed configuration, which has every option of what it names."""
    if not names:
        return True
    inner = config.get("init_args", config) if isinstance(config, dict) else {}
    return names[0] in inner and exists(inner[names[0]], names[1:])


SHAPES = {
    "Pythia-2.8B on HH, β-DPO": "EleutherAI/pythia-2.8b",
    "Llama-3-8B on UltraChat, SFT": "meta-llama/Meta-Llama-3-8B",
    "Llama-3-8B-Instruct on UltraFeedback, β-DPO": "meta-llama/Meta-Llama-3-8B-Instruct",
    "Mistral-7B-Instruct on UltraFeedback, β-DPO": "mistralai/Mistral-7B-Instruct-v0.2",
    "Qwen3-8B on UltraFeedback, β-DPO without thinking": "Qwen/Qwen3-8B",
}


PLANNED = [recipe for recipe in ALL if recipe.what in SHAPES]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PLANNED, ids=[recipe.name for recipe in PLANNED])
def test_a_recipe_fits(recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (memory,) = re.findall(r"(\d+) GB", recipe.where)
    main(["plan", *recipe.arguments[1:], "--shape", SHAPES[recipe.what], "--memory_gb", memory])
    text = capsys.readouterr().out
    assert f"fits {memory} GB" in text, text
    budget = printed(list(recipe.arguments), capsys)["data"]["init_args"]["micro_batch_tokens"]
    assert int(text.split()[-1]) >= budget, text


CHAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant : {% endif %}"
# like Qwen 3's: an empty thought before the last answer, and without thinking at the end of the prompt
THINKING = "{% for m in messages %}{{ m['role'] + ' : ' }}"
THINKING += (
    "{% if loop.last and m['role'] == 'assistant' %}no . {% endif %}{{ m['content'] + eos_token }}{% endfor %}"
)
THINKING += "{% if add_generation_prompt %}assistant : {% if enable_thinking is false %}no . {% endif %}{% endif %}"


def hh_row(number: int) -> dict[str, object]:
    asked = f"\n\nHuman: tell me the colour of cat {number} .\n\nAssistant:"
    return {"chosen": f"{asked} the cat has colour blue {number} .", "rejected": f"{asked} blue {number} ."}


def ultrafeedback_row(number: int) -> dict[str, object]:
    asked = f"tell me the colour of cat {number} ."
    sides = {"chosen": f"the cat has colour blue {number} .", "rejected": f"blue {number} ."}
    turns = {
        side: [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        for side, text in sides.items()
    }
    return {"prompt": asked, "prompt_id": str(number), **turns, "score_chosen": 8.0, "score_rejected": 5.0}


def ultrachat_row(number: int) -> dict[str, object]:
    asked = f"tell me the colour of cat {number} ."
    turns = (("user", asked), ("assistant", "the cat has colour blue ."), ("user", "no ."), ("assistant", "blue ."))
    return {
        "prompt": asked,
        "prompt_id": str(number),
        "messages": [{"role": r, "content": text} for r, text in turns],
    }


LORA = ("--config", str(ROOT / "configs/model/lora.yaml"))
UF = ("train_prefs", "test_prefs")


@pytest.mark.parametrize(
    ("recipe", "family", "row", "splits", "further"),
    [
        ("hh_pythia", "gpt_neox", hh_row, ("train", "test"), ()),
        ("hh_pythia_sft", "gpt_neox", hh_row, ("train", "test"), ()),
        ("ultrachat_sft", "llama", ultrachat_row, ("train_sft", "test_sft"), ("--data.tokenizer", "model")),
        ("ultrafeedback_instruct", "llama", ultrafeedback_row, UF, ()),
        ("ultrafeedback_instruct", "llama", ultrafeedback_row, UF, LORA),
        (
            "ultrafeedback_instruct",
            "qwen3",
            ultrafeedback_row,
            UF,
            ("--data.chat_template_kwargs.enable_thinking", "false"),
        ),
    ],
    ids=("hh", "hh-sft", "ultrachat", "llama", "llama-lora", "qwen3"),
)
def test_a_complete_recipe_trains(
    recipe: str,
    family: str,
    row: Callable[[int], dict[str, object]],
    splits: tuple[str, str],
    further: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """Three steps of the file as it is, but for model, pairs, batch and device."""
    model = save_tiny_model(family, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = THINKING if family == "qwen3" else CHAT
    tokenizer.save_pretrained(model)
    (tmp_path / "pairs").mkdir()
    for split, count in zip(splits, (12, 4), strict=True):
        lines = [json.dumps(row(number)) for number in range(count)]
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("\n".join(lines))
    card = [f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits]
    (tmp_path / "pairs" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(card)}---\n"
    )
    options = [*further, "--model.name", model, "--data.path", "pairs", "--data.batch_size", "4"]
    options += ["--trainer.max_steps", "3", "--trainer.accelerator", "cpu"]
    done = command(tmp_path, "fit", "--config", str(ROOT / f"configs/{recipe}.yaml"), *options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / recipe / "version_0"
    if recipe.endswith("sft"):
        last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == 3
        return
    rows = audit_of(run).to_pandas()
    assert sorted(rows["step"].unique()) == [1, 2, 3]
    assert rows["gap"].notna().all()
    assert rows.groupby("step").kept.sum().tolist() == [3, 3, 3]
