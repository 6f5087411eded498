"""`beta-dpo show` prints what is trained, and needs no weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_families import FAMILIES
from command_runs import command, write_config

from app.core.errors import UserError
from datamodules.tokenisation import read_tokenizer


def test_show_prints_the_pairs_as_trained_and_what_was_cut_and_dropped(tmp_path: Path) -> None:
    FAMILIES["gemma"].tokenizer().save_pretrained(tmp_path / "tokenizer")  # and no weights beside it
    old = [{"role": "user", "content": "Hi " * 30}, {"role": "assistant", "content": "Yes?"}]
    question = [{"role": "user", "content": "Capital?"}]
    rows = [
        {"prompt": question, "chosen": "Canberra.", "rejected": "Sydney. " * 20},
        {"prompt": [*old, *question], "chosen": "Canberra.", "rejected": "Sydney."},
        {"prompt": [{"role": "system", "content": "Be brief."}, *question], "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, tokenizer = str(tmp_path / "pairs.jsonl"), str(tmp_path / "tokenizer")
    write_config(tmp_path, tokenizer, path=pairs, max_length=80, max_prompt_length=40, batch_size=2)
    done = command(tmp_path, "show", "--config", "config.yaml", BETA_DPO_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    prompt = json.dumps("<s><start_of_turn>user\nCapital?<end_of_turn>\n<start_of_turn>model\n")
    chosen = '"Canberra.<end_of_turn>"  trained up to "<end_of_turn>"'
    shown = done.stdout
    assert shown.count(prompt) == 2  # the second prompt lost its old turns, and no header
    assert shown.count(f"{chosen}\n") == 2
    assert shown.count(": it has no end, for it was cut") == 1
    assert "train: 2 pairs; 3 rows read; 1 rejected truncated (first: pairs.jsonl:1); " in shown
    assert "1 prompt truncated: old turns dropped (first: pairs.jsonl:2); " in shown
    assert "1 dropped: the chat template refuses: no system role (first: pairs.jsonl:3)" in shown
    assert "a response ends, and sampling stops, at <end_of_turn> or </s>" in shown
    assert not (tmp_path / "runs").exists()
    one = command(
        tmp_path, "show", "--config", "config.yaml", "--pairs", "-1", BETA_DPO_CACHE=str(tmp_path / "cache")
    )
    assert one.returncode == 2
    assert "pairs: must be a whole number from 0" in one.stderr


def test_show_takes_the_sources_in_turn(tiny_llama: str, tmp_path: Path) -> None:
    for name in "ab":
        rows = [
            {"prompt": "tell me", "chosen": "the fox", "rejected": f"the owl and {place}"} for place in range(3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(tmp_path, tiny_llama, path=["a.jsonl", "b.jsonl"])
    done = command(tmp_path, "show", "--config", "config.yaml", BETA_DPO_CACHE=str(tmp_path / "cache"))
    assert re.findall("^pair (.*)$", done.stdout, re.MULTILINE) == [
        *("a.jsonl/a.jsonl:1", "b.jsonl/b.jsonl:1", "a.jsonl/a.jsonl:2")
    ]


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("models/smollm2", "`make smollm2` makes it"),
        ("./models", "make it first"),
        ("runs/sft/model", "make it first"),
        ("/nowhere", "make it first"),
    ],
)
def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(
    name: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = f"model.name: no tokenizer at '{name}', for there is no such folder: {cure}"
    with pytest.raises(UserError, match=re.escape(said)):
        read_tokenizer(name, "model.name")


def test_show_says_what_leaves_pairs_out(tiny_llama: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"tell me {number}", "chosen": "the fox", "rejected": "the owl"} for number in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(tmp_path, tiny_llama, path="a.jsonl", validation_share=0.2)
    done = command(tmp_path, "show", "--config", "config.yaml", BETA_DPO_CACHE=str(tmp_path / "cache"))
    assert "train: 8 of 10 pairs; 10 rows read;" in done.stdout
    assert "train: data.validation_share: 2 of 10 pairs are held out\n" in done.stdout
