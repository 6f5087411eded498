"""`beta-dpo generate`: a killed run goes on to the same bytes, at every temperature, and says what it left out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_runs import LIMIT_SECONDS, ROOT, command
from transformers import AutoTokenizer, GenerationConfig

from app.commands.benchmarks import Form
from app.commands.export import export
from app.commands.generate import generate
from app.core.errors import UserError
from app.core.files import Parts, locked
from app.core.samples import read_samples
from app.judges.endpoint import SamplingServer
from datamodules.controlled_task import preference_pairs

OPTIONS = ["--count", "40", "--batch_size", "4", "--temperature", "[0.7, 1.0]", "--top_p", "0.9"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stop_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """Let Ctrl-C come while batch `call`, from 0, is scored."""
    module = sys.modules["app.commands.sampling"]
    calls = iter(range(call))

    def score(*arguments: Any) -> list[float]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return scored(*arguments)

    scored = module.score
    patch.setattr(module, "score", score)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str) -> None:
        generate(tiny_llama, str(tmp_path / name), count=10, batch_size=4, temperature=[0.7, 1.0], top_p=0.9)

    run("whole.jsonl")
    for call in (4, 1):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, call)
            with pytest.raises(KeyboardInterrupt):
                run("out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    run("out.jsonl")
    assert "continuing after 5 of 6 batches" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_samples_are_kept_until_the_file_is_there(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    out.mkdir()  # a file cannot take the name of a folder
    with pytest.raises(UserError, match=r"out\.jsonl is a folder"):
        generate(tiny_llama, str(out), count=4, batch_size=2)
    monkeypatch.setattr("app.commands.generate.refuse_place", lambda *_: "")  # the folder came after the check
    with pytest.raises(OSError, match=r"out\.jsonl"):
        generate(tiny_llama, str(out), count=4, batch_size=2)
    assert len(list(Path(f"{out}.parts").glob("0*"))) == 2
    out.rmdir()
    generate(tiny_llama, str(out), count=4, batch_size=2)
    assert len(out.read_text().splitlines()) == 4
    assert not Path(f"{out}.parts").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tiny_llama: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "app.main", "generate", tiny_llama, "out.jsonl", *OPTIONS]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(line, cwd=tmp_path, env=variables, stderr=subprocess.DEVNULL)
    third = tmp_path / "out.jsonl.parts" / "000002"
    started = time.monotonic()
    while not third.exists() and run.poll() is None:
        assert time.monotonic() - started < LIMIT_SECONDS
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    if run.returncode == 0:
        pytest.skip("the run was over before it could be killed")
    assert not (tmp_path / "out.jsonl").exists()
    done = len(Parts(tmp_path / "out.jsonl.parts", json.loads((third.parent / "job.json").read_text())))
    assert 3 <= done < 20
    shown = command(tmp_path, "generate", tiny_llama, "out.jsonl", *OPTIONS)
    assert shown.returncode == 0, shown.stderr
    assert f"continuing after {done} of 20 batches" in shown.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]
    generate(tiny_llama, str(tmp_path / "whole.jsonl"), count=40, batch_size=4, temperature=[0.7, 1.0], top_p=0.9)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_each_temperature_answers_every_prompt(tiny_llama: str, tmp_path: Path) -> None:
    generate(tiny_llama, str(tmp_path / "a.jsonl"), count=5, batch_size=2, temperature=[0, 1.5])
    rows = read(tmp_path / "a.jsonl")
    assert [row["temperature"] for row in rows] == [0.0] * 5 + [1.5] * 5
    assert [row["prompt_id"] for row in rows[:5]] == [row["prompt_id"] for row in rows[5:]]
    generate(tiny_llama, str(tmp_path / "b.jsonl"), count=5, batch_size=5, temperature=0.0, seed=0)
    assert [row["response"] for row in read(tmp_path / "b.jsonl")] == [row["response"] for row in rows[:5]]
    other = shutil.copytree(tiny_llama, tmp_path / "other")  # recommends what was not asked for
    GenerationConfig(do_sample=True, temperature=0.1, min_p=0.9, repetition_penalty=9.0).save_pretrained(other)
    generate(str(other), str(tmp_path / "c.jsonl"), count=5, batch_size=2, temperature=[0, 1.5])
    assert read(tmp_path / "c.jsonl") == rows


def test_two_at_once_do_not_write_one_file(tiny_llama: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    folder = tmp_path / "a.jsonl.parts"
    with locked(folder / ".lock", "", ""), pytest.raises(UserError, match=r"a\.jsonl is in use by process \d+ on"):
        generate("not looked for", str(out), count=3)
    generate(tiny_llama, str(out), count=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_parts_of_other_samples_are_refused_and_left(tiny_llama: str, tmp_path: Path) -> None:
    out = str(tmp_path / "a.jsonl")
    for finished, temperature in ((0, 0.7), (1, 1.0)):  # of the first, no batch was done
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, finished)
            with pytest.raises(KeyboardInterrupt):
                generate(tiny_llama, out, count=3, batch_size=2, temperature=temperature)
    with pytest.raises(UserError, match=r"a\.jsonl\.parts holds the beginning of other work \(temperature, top_p"):
        generate(tiny_llama, out, count=3, batch_size=2, temperature=0.5, top_p=0.5)
    generate(tiny_llama, out, count=3, batch_size=2)
    assert len(read(tmp_path / "a.jsonl")) == 3


def test_long_prompts_are_cut_as_in_training_and_told(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"prompt": pair.prompt, "chosen": " yes .", "rejected": " no ."} for pair in preference_pairs(3, seed=0)
    ]
    pairs[1]["prompt"] = "\n\nHuman: the cat\n\nAssistant:"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    generate(
        tiny_llama,
        str(tmp_path / "out.jsonl"),
        prompts=str(tmp_path / "pairs.jsonl"),
        count=None,
        max_prompt_length=12,
        max_new_tokens=3,
    )
    told = capsys.readouterr().out
    assert "2 prompt truncated: within the last turn to 12 tokens (max_prompt_length)" in told
    cut = sum(not row["finished"] for row in read(tmp_path / "out.jsonl"))
    assert cut > 0
    assert f"{cut} of them are cut at max_new_tokens = 3\n" in told
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == [pair["prompt"] for pair in pairs]


def test_endless_prompts_need_a_number(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="any number of prompts"):
        generate(tiny_llama, str(tmp_path / "a.jsonl"), count=None)
    for wrong in ([], [0.5, 0.5], [-1.0]):
        with pytest.raises(UserError, match="temperature must be"):
            generate(tiny_llama, str(tmp_path / "a.jsonl"), temperature=wrong)


def test_prompts_alone_are_answered_and_their_columns_kept(tiny_llama: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "the cat", "topic": "cats", "level": 2},
        {"instruction": "the", "input": "dog", "topic": "dogs"},
        {"question": "the cat", "topic": None},
        {"prompt": "the dog", "chosen": "yes", "rejected": "no", "topic": "pairs"},
    ]
    path, out = tmp_path / "prompts.jsonl", str(tmp_path / "out.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(tiny_llama, out, prompts=str(path), count=None, max_new_tokens=3, columns=["topic"])
    samples = list(read_samples(out))
    assert [row["prompt"] for row in samples] == ["the cat", "the\ndog", "the cat", "the dog"]
    assert [row["topic"] for row in samples] == ["cats", "dogs", None, "pairs"]
    for columns, told in ((["level"], "has no 'level' to copy; it has topic"), (["logp"], "is a field of every")):
        with pytest.raises(UserError, match=told):
            generate(tiny_llama, out, prompts=str(path), count=None, columns=columns)


def test_the_prompts_are_not_replaced(tiny_llama: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the cat"}\n')
    with pytest.raises(UserError, match=r"out: .*prompts\.jsonl is read by this command"):
        generate(tiny_llama, str(file), prompts=str(file))
    assert file.read_text() == '{"prompt": "the cat"}\n'


def test_python_is_refused_what_the_command_line_is(tiny_llama: str, tmp_path: Path) -> None:
    out = str(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="count must be a whole number from 1"):
        generate(tiny_llama, out, count=0)
    with pytest.raises(UserError, match=r"top_p must be a finite number in \(0, 1\], not 2"):
        generate(tiny_llama, out, top_p=2.0)
    with pytest.raises(UserError, match="dtype must be one of float32"):
        export("any.ckpt", out, dtype="float99")  # type: ignore[arg-type]


def test_a_response_ends_at_an_end_of_turn_that_is_not_eos(tiny_llama: str, tmp_path: Path) -> None:
    turn_end = 40  # a word of the controlled task, which the random model says now and then
    shutil.copytree(tiny_llama, tmp_path / "model")
    settings = GenerationConfig.from_pretrained(tiny_llama)
    settings.eos_token_id = [2, turn_end]
    settings.save_pretrained(tmp_path / "model")
    found = {}
    for name, model in (("turns", str(tmp_path / "model")), ("texts", tiny_llama)):
        generate(model, str(tmp_path / f"{name}.jsonl"), count=16, batch_size=16, max_new_tokens=40)
        found[name] = read(tmp_path / f"{name}.jsonl")
    (word,) = AutoTokenizer.from_pretrained(tiny_llama).batch_decode([[turn_end]])[0].split()
    ran_on = [row for row in found["texts"] if word in row["response"].split()]
    assert ran_on
    assert not any(word in row["response"].split() for row in found["turns"])
    shorter = [row for row in found["turns"] if row["finished"]]
    assert {row["prompt_id"] for row in ran_on} <= {row["prompt_id"] for row in shorter}


def test_several_samples_of_a_prompt(tiny_llama: str, tmp_path: Path) -> None:
    generate(tiny_llama, str(tmp_path / "a.jsonl"), count=3, samples=4, batch_size=5, temperature=[0.7, 1.5])
    rows = read(tmp_path / "a.jsonl")
    assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 6
    assert [row["prompt_id"] for row in rows[:12]] == [row["prompt_id"] for row in rows[::4][:3] for _ in range(4)]
    assert len({row["response"] for row in rows}) > 12
    with pytest.raises(UserError, match="below 1e-6 logits overflow; give 0"):
        generate("model", "out.jsonl", temperature=1e-320)
    with pytest.raises(UserError, match="at temperature 0 they would all be equal"):
        generate(tiny_llama, str(tmp_path / "b.jsonl"), samples=2, temperature=[0, 1])


@pytest.mark.parametrize(
    "unused", [{"split": "test"}, {"subset": "a"}, {"name": "mine"}, {"endpoint": SamplingServer(parallel=2)}]
)
def test_options_without_a_use_are_refused(unused: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"task has no split|a file of samples has none|are for a server"):
        generate("model", "out.jsonl", **unused)


TALK = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
QUESTIONS: dict[Form, dict[str, Any]] = {
    "alpaca_eval": {"instruction": "the cat", "output": "theirs", "dataset": "koala"},
    "arena_hard": {"uid": "u7", "prompt": "the cat", "category": "hard"},
    "mt_bench": {"question_id": 81, "turns": ["the cat", "the dog"], "category": "writing"},
}


@pytest.fixture(scope="module")
def chat_model(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chat") / "talker"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TALK
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("form", QUESTIONS)
def test_answers_in_the_form_of_a_benchmark(form: Form, chat_model: str, tmp_path: Path) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / ("out.json" if form == "alpaca_eval" else "out.jsonl")
    questions.write_text(json.dumps(QUESTIONS[form]) + "\n")
    settings: dict[str, Any] = {"count": None, "max_new_tokens": 5, "temperature": 0.0}
    generate(chat_model, str(out), str(questions), format=form, **settings)
    messages = {"messages": [{"role": "user", "content": "the cat"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(messages) + "\n")
    generate(chat_model, str(tmp_path / "a.jsonl"), str(tmp_path / "chat.jsonl"), **settings)
    said = read(tmp_path / "a.jsonl")[0]["response"]
    if form == "alpaca_eval":
        assert json.loads(out.read_text()) == [{"instruction": "the cat", "output": said, "generator": "talker"}]
        return
    (line,) = read(out)
    if form == "arena_hard":
        assert line["uid"] == "u7"
        assert line["model"] == "talker"
        assert line["messages"] == [*messages["messages"], {"role": "assistant", "content": {"answer": said}}]
        return
    (choice,) = line["choices"]
    assert (line["question_id"], line["model_id"], choice["turns"][0]) == (81, "talker", said)
    turns = [*messages["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "the dog"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    generate(chat_model, str(tmp_path / "b.jsonl"), str(tmp_path / "chat.jsonl"), **settings)
    assert choice["turns"][1:] == [read(tmp_path / "b.jsonl")[0]["response"]]


def test_what_is_no_question_of_a_benchmark_is_refused(tiny_llama: str, chat_model: str, tmp_path: Path) -> None:
    questions, out = tmp_path / "question.jsonl", str(tmp_path / "out.jsonl")
    questions.write_text(json.dumps(QUESTIONS["arena_hard"]) + "\n")
    refused: list[tuple[str, Form, int, str]] = [
        (chat_model, "mt_bench", 1, r"question\.jsonl:1 is no question of mt_bench: turns must hold text"),
        (chat_model, "alpaca_eval", 1, r"out must end in \.json,"),
        (chat_model, "arena_hard", 2, "takes one answer to a question"),
        (tiny_llama, "arena_hard", 1, "is chat messages, and no chat template is used"),
    ]
    for model, form, samples, told in refused:
        with pytest.raises(UserError, match=told):
            generate(model, out, prompts=str(questions), count=None, format=form, samples=samples)
    questions.write_text(2 * (json.dumps(QUESTIONS["arena_hard"]) + "\n"))
    with pytest.raises(UserError, match=r"question\.jsonl:2 repeats the uid 'u7'"):
        generate(chat_model, out, prompts=str(questions), count=None, format="arena_hard")
