"""`beta-dpo audit` on real runs: whose pairs it lists, with which texts, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from command_runs import environment, write_config

from app.commands.audit import as_row, available, pair_histories, suspects_by, write_clean
from app.commands.judge import print_table
from app.core.errors import UserError
from app.main import main
from app.report.run import PairTexts
from datamodules import PreferenceData
from datamodules.controlled_task import preference_pairs
from datamodules.records import Message, PreferencePair
from datamodules.sources.pairs import read_row
from datamodules.sources.source import Source

RUN = "runs/csv"
TESTS = Path(__file__).parents[1]


def train(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch, **data: Any) -> None:
    """Ten steps, logged as CSV, without the callback for injected faults."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    write_config(folder, model, **data)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["callbacks"] = []
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    options = [
        "--trainer.logger",
        "CSVLogger",
        "--trainer.logger.name",
        "csv",
        "--trainer.max_steps",
        "10",
        "--trainer.limit_val_batches",
        "0",
    ]
    main(["fit", "--config", "config.yaml", *options])


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capfd.readouterr().err
    assert stop.value.code == 2, said
    assert len(said.splitlines()) == 1
    return said


def test_flipped_pairs_are_listed_with_the_texts_that_were_trained_on(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, tiny_llama, monkeypatch, pairs=20, flip_rate=0.3)
    assert pd.read_csv(f"{RUN}/metrics.csv")["beta/used"].notna().any()
    capfd.readouterr()
    main(["audit", RUN, "--count", "8"])
    shown = capfd.readouterr().out
    assert "20 pairs, each seen 5 time(s), dropped 40.0% of the times." in shown
    rows = [json.loads(line) for line in Path(RUN, "suspects.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {pair.pair_id: pair for pair in preference_pairs(20, seed=3, flip_rate=0.3)}
    flipped = sum(bool(pair.labels["flipped"]) for pair in texts.values())
    assert f"finding the {flipped} flipped of 20 pairs" in shown
    for name in ("audit", "length", "random", "8: --count", f"{flipped}: as many as flipped"):
        assert name in shown
    groups = [int(size) for size in re.findall(r"(\d+): ", shown.split("finding the")[1])]
    assert groups == sorted(groups)
    for row in rows:
        pair = texts[row["pair_id"]]
        assert (row["prompt"], row["chosen"], row["rejected"]) == (
            str(pair.prompt).strip(),
            pair.chosen.strip(),
            str(pair.rejected).strip(),
        )
    # the random reference knows nothing
    assert (
        "Ranked by gaps: the mean gap rose above 0; the run has no usable reference. Its reference prefers" in shown
    )
    for kind in ("mislabelled", "outlier"):
        scores = [row[kind] for row in rows if row["listed_as"] == kind]
        assert scores == sorted(scores, reverse=True)
        assert 0 < len(scores) <= 8

    listed = {row["pair_id"] for row in rows if row["listed_as"] == "mislabelled"}
    for option in ([], ["--swap", "true"]):
        main(["audit", RUN, "--count", "8", "--clean", "clean.jsonl", *option])
        kept = [json.loads(line) for line in Path("clean.jsonl").read_text(encoding="utf-8").splitlines()]
        assert {row["pair_id"] for row in kept} == (set(texts) if option else set(texts) - listed)
        for row in kept:
            pair = texts[row["pair_id"]]
            sides = (pair.rejected, pair.chosen) if row["pair_id"] in listed else (pair.chosen, pair.rejected)
            assert (row["prompt"], row["chosen"], row["rejected"]) == (pair.prompt, *sides)
            assert row["flipped"] == (pair.labels["flipped"] != (row["pair_id"] in listed))
    assert f"20 pairs of the training data, {len(listed)} with their responses exchanged" in capfd.readouterr().out
    assert "clean must end in .jsonl" in refused(["audit", RUN, "--clean", "a.csv"], capfd)
    assert "give its file by --clean" in refused(["audit", RUN, "--swap", "true"], capfd)
    assert "no usable signal 'posterior'; it has gaps" in refused(["audit", RUN, "--by", "posterior"], capfd)
    main(["audit", RUN, "--by", "dropped", "--out", "dropped.csv"])
    assert pd.read_csv("dropped.csv").dropped_share.iloc[0] > 0

    assert "must be a whole number from 1" in refused(["audit", RUN, "--count", "0"], capfd)
    assert "out must end in .jsonl or .csv" in refused(["audit", RUN, "--out", "a.txt"], capfd)
    assert "runs holds no audit/*.parquet" in refused(["audit", "runs"], capfd)
    (Path(RUN) / "audit" / "half.parquet").write_bytes(b"PAR1")
    assert f"{RUN}/audit cannot be read" in refused(["audit", RUN], capfd)
    assert Path(RUN, "suspects.jsonl").read_text(encoding="utf-8").count("\n") == len(rows)


def test_values_of_a_label_are_written_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [f"p{i}" for i in range(6)]
    histories = pd.DataFrame({"pair_id": pairs, "by": ["[b]Ann", "[/b]", None] * 2})
    print_table(suspects_by("by", histories, histories[:2]))
    shown = capsys.readouterr().out
    assert all(re.search(rf"{re.escape(value)} +│ 2 ", shown) for value in ("[b]Ann", "[/b]", "no value"))


def test_the_clean_data_of_several_files_names_its_pairs_by_them(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        rows = [{"prompt": f"{name}{i}?", "chosen": "yes", "rejected": "no"} for i in range(2)]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts: Any = SimpleNamespace(data=PreferenceData(list(map(str, files))))
    write_clean(str(tmp_path / "clean.jsonl"), texts, {"b.jsonl/b.jsonl:1"}, False, "")
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["pair_id"] for row in kept] == ["a.jsonl/a.jsonl:1", "a.jsonl/a.jsonl:2", "b.jsonl/b.jsonl:2"]
    texts.data.sources = [replace(source, weight=1.0) for source in texts.data.sources]
    with pytest.raises(UserError, match="which one file cannot hold"):
        write_clean(str(tmp_path / "other.jsonl"), texts, set(), False, "")


def test_what_the_clean_data_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "a?", "chosen": "b", "rejected": "c", "votes": [1]},
        {"prompt": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts: Any = SimpleNamespace(data=PreferenceData(str(tmp_path / "a.jsonl"), on_bad_row="skip"))
    write_clean(str(tmp_path / "clean.jsonl"), texts, set(), False, "")
    lacks = "clean.jsonl lacks, of a.jsonl: 1 with no use for votes; 1 skipped: missing field (first: a.jsonl:2)"
    assert lacks in capsys.readouterr().out


def test_gaps_that_speak_for_every_label_leave_no_suspect() -> None:
    audit = pd.DataFrame({"pair_id": list("ab") * 3, "step": [1, 1, 2, 2, 3, 3], "gap": [1.0, 2, 3, 4, 5, 6]})
    histories = pair_histories(audit.assign(kept=[False, True] * 3))
    assert (histories.mislabelled < 0).all()
    assert next(iter(available(histories))) == "gaps"  # and not how often the filter dropped a pair


def test_the_pairs_of_a_run_are_read_from_plain_python(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "model: {class_path: lightning_modules.PreferenceOptimization}\n"
        "data: {class_path: datamodules.ControlledTask, init_args: {pairs: 4}}\n"
    )
    program = f"from app.report.run import PairTexts; from pathlib import Path; PairTexts(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_swapped_pair_has_swapped_scores() -> None:
    labels: dict[str, object] = {"chosen_reward": 1, "rejected_reward": 2, "score_chosen": 3, "flipped": True}
    pair = PreferencePair("1", "q", "good", "bad", labels)
    own = {"pair_id": "1", "prompt": "q"}
    assert as_row(pair, swapped=False) == {**own, "chosen": "good", "rejected": "bad", **labels}
    labels = {"chosen_reward": 2, "rejected_reward": 1, "score_rejected": 3, "flipped": False}
    assert as_row(pair, swapped=True) == {**own, "chosen": "bad", "rejected": "good", **labels}
    asked = (Message("user", "q"),)
    good, bad = (json.dumps({"role": "assistant", "content": said}) for said in "ab")
    chat = PreferencePair("1", asked, good, bad)
    assert read_row(as_row(chat, swapped=False), "", Source("x"))[0] == chat  # messages in JSON stay text


def test_pairs_of_a_file_as_csv(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    words = ("fox", "owl", "cat", "dog", "cow", "hen", "pig", "bat", "rat", "elk", "bee", "ant")
    pairs = [{"prompt": f" tell me of the {w}", "chosen": f" the {w}", "rejected": " the tiger"} for w in words]
    data = tmp_path / "work" / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train(tmp_path / "work", tiny_llama, monkeypatch, path="pairs.jsonl", batch_size=5)
    capfd.readouterr()
    main(["audit", RUN, "--count", "3", "--out", "out/suspects.csv"])
    assert "finding" not in capfd.readouterr().out  # the truth is not known
    listed = pd.read_csv("out/suspects.csv")
    assert listed.prompt.str.startswith("tell me").all()
    assert set(listed.rejected) == {"the tiger"}
    assert listed.pair_id.str.startswith("pairs.jsonl:").all()
    assert len(listed) <= 6

    shutil.copytree(RUN, "part")
    for file in Path("part", "audit").glob("*.parquet"):
        rows = pd.read_parquet(file)
        rows[rows.pair_id != "pairs.jsonl:2"].to_parquet(file)
    main(["audit", "part"])
    assert "Never seen, so nothing is said of them: 1 of 12 pairs." in capfd.readouterr().out

    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[1:]))  # line 1 is what line 2 was
    assert f"The training pairs are not those of {RUN} any more" in refused(["audit", RUN], capfd)
    data.unlink()
    said = f"no file or folder 'pairs.jsonl': {RUN} names it; call the command where the run began."
    assert said in refused(["audit", RUN, "--count", "3"], capfd)
    config = Path(RUN) / "config.yaml"
    config.write_text("[1, 2]")
    assert "is not the record of `beta-dpo fit`" in refused(["audit", RUN, "--count", "3"], capfd)
    config.unlink()
    assert "config.yaml is missing" in refused(["audit", RUN, "--count", "3"], capfd)


def test_texts_need_no_tokenizer_of_their_own(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": " tell me", "chosen": " the fox x", "rejected": " the tiger"}\n'
    )
    config = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_modules.PreferenceOptimization", "init_args": {"name": tiny_llama}},
        "data": {
            "class_path": "datamodules.PreferenceData",
            "init_args": {"path": str(tmp_path / "pairs.jsonl"), "tokenizer": None},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    pairs = PairTexts(tmp_path)
    (pair_id,) = pairs.rows
    assert pairs.texts(pair_id) == {"prompt": "tell me", "chosen": "the fox<unk>", "rejected": "the tiger"}
    assert pairs.extra_tokens_of_rejected([pair_id]) == [-1]


def test_the_training_data_is_not_replaced_and_unknown_labels_are_counted(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    row = {"prompt": "the cat", "chosen": "is red", "rejected": "is blue"}
    data.write_text("".join(json.dumps(row | {"pair_id": f"p{n}"}) + "\n" for n in range(20)))
    before = data.read_text()
    config = {
        "model": {"class_path": "lightning_modules.PreferenceOptimization", "init_args": {"name": tiny_llama}},
        "data": {
            "class_path": "datamodules.PreferenceData",
            "init_args": {"path": str(data), "tokenizer": None},
        },
    }
    run = tmp_path / "run"
    (run / "audit").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    def told_of(labels: list[Any]) -> str:
        rows = {"pair_id": [f"p{n}" for n in range(20)], "gap": [-1.0, *[1.0] * 19], "flipped": labels}
        steps = [pd.DataFrame(rows | {"step": step, "kept": True, "beta": 0.1}) for step in (1, 2)]
        audit = pd.concat(steps).assign(running_mean=None, running_std=None)
        audit.to_parquet(run / "audit" / "steps.parquet")
        main(["audit", str(run)])
        return capsys.readouterr().out

    assert "20 pairs have neither true nor false in `flipped`" in told_of(["true", *["false"] * 19])
    told = told_of([True, None, None, *[False] * 17])
    assert "2 pairs have neither true nor false in `flipped`" in told
    assert "finding the 1 flipped of 18 pairs" in told
    for option, said in (("--clean", "clean"), ("--out", "out")):
        with pytest.raises(SystemExit):
            main(["audit", str(run), option, str(data)])
        assert f"{said}: {data} is read by this command, which would replace it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["audit", str(run), "--clean", "same.jsonl", "--out", "same.jsonl"])
    assert "same.jsonl is the file of the list too" in capsys.readouterr().err
    assert data.read_text() == before
