"""Every recipe of docs/pipeline.md is a command that parses to what its name promises."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from command_runs import audit_of, command
from recipes import Recipe, recipes
from test_configs import METHOD, RECORDS, ROOT, callbacks_of, printed
from tiny_runs import save_tiny_model
from transformers import AutoTokenizer

ALL = recipes()
SOURCES = {"HH": "Anthropic/hh-rlhf", "TL;DR": "openai/summarize_from_feedback"}
SOURCES["UltraFeedback"] = "HuggingFaceH4/ultrafeedback_binarized"
LAYOUTS = {"1": (1, "1"), "4": (1, "4"), "8": (1, "8"), "2 × 8": (2, "8")}
# every model, data set and layout is in a quarter of them, the rest is for the slow tests
CASES = [
    pytest.param(recipe, id=recipe.name, marks=() if (number + number // 4) % 4 == 0 else pytest.mark.slow)
    for number, recipe in enumerate(ALL)
]


def test_the_page_has_them_all() -> None:
    assert Counter(recipe.where for recipe in ALL) == dict.fromkeys(LAYOUTS, 16)
    assert Counter(recipe.what.split(" on ")[0] for recipe in ALL) == {
        **dict.fromkeys(("Pythia-410M", "Pythia-1.4B", "Pythia-2.8B"), 16),
        **dict.fromkeys(("Llama-3-8B-Instruct", "Mistral-7B-Instruct"), 8),
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
    family, size = name.lower().split("-")[0], re.search(r"[\d.]+[MB]", name)[0].lower()
    assert family in model["name"].lower()
    assert size in model["name"].lower()
    assert data["path"] == SOURCES[source]
    assert data["batch_size"] == (64 if name in ("Pythia-1.4B", "Pythia-2.8B") else 128)
    assert (trainer["num_nodes"], str(trainer["devices"])) == LAYOUTS[recipe.where]
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
    assert {re.fullmatch("runs/(.*_sft)/model", start)[1] for start in own} <= folders


CHAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant : {% endif %}"


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


@pytest.mark.parametrize(
    ("recipe", "family", "row", "splits"),
    [
        ("hh_pythia", "gpt_neox", hh_row, ("train", "test")),
        ("ultrafeedback_instruct", "llama", ultrafeedback_row, ("train_prefs", "test_prefs")),
    ],
)
def test_a_complete_recipe_trains(recipe: str, family: str, row: object, splits: list[str], tmp_path: Path) -> None:
    """Three steps of the file as it is, but for model, pairs, batch and device."""
    model = save_tiny_model(family, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    (tmp_path / "pairs").mkdir()
    for split, count in zip(splits, (12, 4), strict=True):
        lines = [json.dumps(row(number)) for number in range(count)]  # type: ignore[operator]
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("\n".join(lines))
    card = [f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits]
    (tmp_path / "pairs" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(card)}---\n"
    )
    options = ["--model.name", model, "--data.path", "pairs", "--data.batch_size", "4"]
    options += ["--trainer.max_steps", "3", "--trainer.accelerator", "cpu"]
    done = command(tmp_path, "fit", "--config", str(ROOT / f"configs/{recipe}.yaml"), *options)
    assert done.returncode == 0, done.stderr
    rows = audit_of(tmp_path / "runs" / recipe / "version_0").to_pandas()
    assert sorted(rows["step"].unique()) == [1, 2, 3]
    assert rows["gap"].notna().all()
    assert rows.groupby("step").kept.sum().tolist() == [3, 3, 3]
