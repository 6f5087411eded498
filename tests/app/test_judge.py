"""What is compared with what, what a verdict is, what is kept of it, and what the command prints."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace as Said
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import expit
from tiny_runs import save_reward_model

from app.commands.judge import by_temperature, judge, mean_by_prompt, short_names
from app.core.errors import UserError
from app.core.intervals import length_controlled, wilson
from app.core.samples import read_samples
from app.judges.answers import aligned, dialogue_text, rival_answers, sampled_answers
from app.judges.endpoint import Client, Endpoint, EndpointJudge, first_choice, parse_verdict, read_instructions
from app.judges.rewards import LearnedReward, OwnReward
from app.judges.verdicts import VerdictFile, verdict_key
from datamodules.controlled_task import preference_pairs
from datamodules.records import Message
from datamodules.rewards import RewardModel

ROOT = Path(__file__).parents[2]
PAIRS = preference_pairs(6, seed=0, flip_rate=0.0)


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def samples(side: str, **fields: object) -> list[dict]:
    return [
        {"prompt_id": pair.pair_id, "prompt": pair.prompt, "response": getattr(pair, side), **fields}
        for pair in PAIRS
    ]


# --- what meets what ---------------------------------------------------------------------------------------


def test_every_temperature_meets_its_own_or_the_only_one(tmp_path: Path) -> None:
    hot, cold = samples("rejected", temperature=1.0), samples("chosen", temperature=0.0)
    both = write(tmp_path / "both.jsonl", hot + cold)
    rows, rivals = aligned(both, write(tmp_path / "other.jsonl", cold + hot))
    assert (
        [row["temperature"] for row in rows] == [rival["temperature"] for rival in rivals] == [1.0] * 6 + [0.0] * 6
    )
    rows, rivals = aligned(both, write(tmp_path / "one.jsonl", cold))
    assert [rival["temperature"] for rival in rivals] == [0.0] * 12
    assert [row["prompt_id"] for row in rows] == [rival["prompt_id"] for rival in rivals]
    low, high = (ours for ours, _ in by_temperature(rows, rivals))
    assert {row["temperature"] for row in low} == {0.0}
    assert [row["response"] for row in high] == [row["response"] for row in hot]
    with pytest.raises(UserError, match="different prompts"):
        aligned(write(tmp_path / "warm.jsonl", samples("chosen", temperature=0.5)), both)


def test_the_chosen_responses_of_pairs_can_be_the_rivals(tmp_path: Path) -> None:
    pairs = [{"pair_id": p.pair_id, "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    ours = write(tmp_path / "ours.jsonl", samples("rejected")[:4])  # not all prompts of the pairs
    plain = write(tmp_path / "pairs.jsonl", pairs)
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    own = {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}
    other = tmp_path / "argilla.jsonl"
    rows = [{own.get(name, name): value for name, value in pair.items()} for pair in pairs]
    other.write_text("\n" + "\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    for path in (plain, str(packed), str(other)):
        _, rivals = aligned(ours, path)
        assert [rival["response"] for rival in rivals] == [pair.chosen for pair in PAIRS[:4]]
    with pytest.raises(UserError, match="different prompts"):
        aligned(ours, write(tmp_path / "few.jsonl", pairs[:3]))
    pairs[0]["prompt"], pairs[1]["prompt"] = pairs[1]["prompt"], pairs[0]["prompt"]
    with pytest.raises(UserError, match="different prompts"):  # the same ids do not make the same prompts
        aligned(ours, write(tmp_path / "swapped.jsonl", pairs))
    with pytest.raises(UserError, match="twice"):
        aligned(ours, write(tmp_path / "twice.jsonl", samples("chosen") + samples("rejected")))


def test_a_dialogue_is_written_out(tmp_path: Path) -> None:
    turns = (Message("user", "Why?"), Message("assistant", "Because."), Message("user", "Really?"))
    written = "User: Why?\n\nAssistant: Because.\n\nUser: Really?"
    assert dialogue_text(turns) == written
    assert dialogue_text("\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant:") == written
    assert dialogue_text(" Summarise this. ") == "Summarise this."
    # a sample file holds turns as lists
    rows = [{"prompt_id": "a", "prompt": turns, "response": "Yes."}]
    (ours, *_), _ = aligned(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows))
    assert dialogue_text(ours["prompt"]) == written


# --- verdicts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("A is shorter, B is right.\nVerdict: B", "second"),
        ("**Verdict: A**", "first"),
        ("Verdict: **tie**.", "tie"),
        ("My first verdict: A. No, on reflection.\nVerdict: B", "second"),
        ("B", "second"),
        (" (a) ", "first"),
        ("verdict: a", "first"),
        ("Verdict: a tie.", "tie"),
        ("Verdict: A tie", "tie"),
        ("The verdict: a slight edge.", None),
        ("A: The sky is blue.", None),
        ("Verdict: Both are fine", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_it_is_none(reply: str, said: str | None) -> None:
    assert parse_verdict(reply) == said


def test_shipped_instructions_show_both_answers_and_ask_for_what_is_read() -> None:
    shipped = sorted((ROOT / "configs/judge").glob("*.txt"))
    assert {path.stem for path in shipped} == {"dialogue", "summary"}
    for path in shipped:
        text = read_instructions(str(path)).substitute(prompt="<P>", first="<F> costs $5", second="<S>")
        assert text.index("<P>") < text.index("<F> costs $5") < text.index("<S>")
        lines = text.strip().splitlines()[-3:]
        assert [parse_verdict(line) for line in lines] == ["first", "second", "tie"]


@pytest.mark.parametrize("text", ["$prompt $first", "$prompt $first $second $third", "$prompt $first $second 5$ "])
def test_instructions_without_their_places_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(UserError, match=r"mine\.txt must hold"):
        read_instructions(str(tmp_path / "mine.txt"))


def test_a_device_is_no_file_of_verdicts() -> None:  # it would be read without an end
    with pytest.raises(UserError, match=r"verdicts must end in \.jsonl"), VerdictFile.opened("/dev/full"):
        pass


def test_verdicts_stay_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "verdicts.jsonl"
    with VerdictFile.opened(str(path)) as verdicts:
        verdicts.add("k1", verdict="tie", reply="é\nVerdict: tie")
        with pytest.raises(UserError, match="in use"), VerdictFile.opened(str(path)):
            pass
    with open(path, "ab") as file:
        file.write('{"key": "k2", "reply": "é'.encode()[:-1])  # cut within a letter
    with VerdictFile.opened(str(path)) as verdicts:
        assert len(verdicts) == 1
        assert verdicts["k1"] == {"verdict": "tie", "reply": "é\nVerdict: tie"}
        verdicts.add("k2", verdict="first")
    with VerdictFile.opened(str(path)) as verdicts:
        assert "k2" in verdicts
    path.write_text('{"no": "key"}\n')
    with pytest.raises(UserError, match=r"verdicts\.jsonl:1"), VerdictFile.opened(str(path)):
        pass


def test_whatever_decides_a_verdict_changes_its_key() -> None:
    keys = [
        verdict_key(*parts) for parts in (("m", 0, "q"), ("n", 0, "q"), ("m", 1, "q"), ("m", 0, "r"), ("m", "0q"))
    ]
    assert len(set(keys)) == 5


def test_an_endpoint_needs_a_key_or_an_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(ROOT)
    with (
        VerdictFile.opened(str(tmp_path / "v.jsonl")) as verdicts,
        pytest.raises(UserError, match="OPENAI_API_KEY"),
    ):
        EndpointJudge("some-model", Endpoint(), verdicts)
    with pytest.raises(ValueError, match="parallel must be a whole number from 1"):
        Endpoint(parallel=0)


# --- rewards -----------------------------------------------------------------------------------------------


def test_a_reward_model_judges_and_scores_no_answer_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_reward_model(tmp_path / "rm")
    ours, theirs = samples("chosen"), samples("rejected")
    learned = RewardModel(model)
    rewards = [
        list(learned.rewards([p.prompt for p in PAIRS], [row["response"] for row in side]))
        for side in (ours, theirs)
    ]
    wanted = (np.sign(np.subtract(rewards[0], rewards[1])) + 1) / 2
    path = str(tmp_path / "v.jsonl")
    with VerdictFile.opened(path) as verdicts:
        first = LearnedReward(model, verdicts)
        assert first.scores(ours, theirs).tolist() == wanted.tolist()
        assert first.describe(ours)["reward"] == pytest.approx(rewards[0], abs=1e-5)
        assert len(verdicts) == 12
    monkeypatch.setattr(RewardModel, "rewards", None)  # whoever scores again fails
    files = [write(tmp_path / "ours.jsonl", ours), write(tmp_path / "theirs.jsonl", theirs)]
    judge(files, by="reward_model", model=model, verdicts=path)
    assert f"{wanted.mean():.3f} [" in capsys.readouterr().out


# --- the command -------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_file_and_temperature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(
        tmp_path / "good" / "samples.jsonl", samples("chosen", temperature=0.5, logp=-1.0, reference_logp=-2.0)
    )
    both = samples("rejected", temperature=0.0) + samples("chosen", temperature=1.0)
    both[0] |= {"logp": -1.0, "reference_logp": -3.0}
    mixed = write(tmp_path / "mixed" / "samples.jsonl", both)
    rival = write(tmp_path / "sft-samples.jsonl", samples("rejected", temperature=1.0))
    judge([good, mixed, rival])
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    won, even = "1.000 [0.610, 1.000]", "0.500 [0.500, 0.500]"
    assert [row[:4] for row in cells] == [
        ["good", "0.5", won, "6/0/0"],
        ["mixed", "0", even, "0/6/0"],
        ["mixed", "1", won, "6/0/0"],
        ["sft-samples (rival)", "", "", ""],
    ]
    assert cells[0][-2] == "1.000 [1.000, 1.000]"  # KL
    assert "KL (1 of 6)" in shown
    assert cells[1][-1].startswith("2.000")
    words = np.mean([len(pair.chosen.split()) for pair in PAIRS])
    assert f"{words:.3g}" in cells[0]


def test_names_tell_files_and_runs_apart() -> None:
    for paths, names in (
        (["r/dpo/samples", "r/beta/samples", "r/sft"], ["dpo", "beta", "sft"]),
        (["/x/a", "/x/b"], ["a", "b"]),
        (["x/a", "x/a"], ["a", "a"]),
        (["r/a/version_0/samples", "r/b/version_0/samples", "r/sft"], ["a", "b", "sft"]),
        (["r/a/version_0"], ["a"]),
        (["/r/a/version_0", "/r/b/version_0"], ["a", "b"]),
        (["/r/a/version_0", "/r/a/version_1"], ["version_0", "version_1"]),
        (["/r/a/version_0", "/r/a/version_1", "/r/b/version_0"], ["a/version_0", "a/version_1", "b/version_0"]),
    ):
        assert short_names([Path(path) for path in paths]) == names


def test_prompts_are_what_is_resampled() -> None:
    rows = [{"prompt_id": str(number % 50)} for number in range(400)]
    scores = np.array([float(number % 50 < 25) for number in range(400)])  # all answers to a prompt alike
    estimate = mean_by_prompt(rows, scores)
    assert estimate.mean == 0.5
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(50), rel=0.1)
    assert mean_by_prompt(rows, np.ones(400), share=True) == wilson(1.0, 50)
    assert mean_by_prompt(rows, np.ones(400)) == (1.0, 1.0, 1.0)  # rewards or nats


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", samples("chosen"))
    other = write(tmp_path / "b.jsonl", [{"prompt_id": "1", "prompt": "Why?", "response": "So."}])
    refused: list[tuple[list[str], dict[str, Any], str]] = [
        ([file], {"by": "endpoint", "model": "m"}, "at least two"),
        ([file, file], {"by": "endpoint"}, "--model"),
        ([file, file], {"model": "m"}, "does not go with the true reward"),
        ([file, file], {"endpoint": Endpoint(parallel=2)}, "endpoint: its settings are for --by endpoint"),
        ([file, file], {"verdicts": "v.jsonl"}, "verdicts: the true reward keeps none"),
        ([other, other], {}, "controlled task"),
        ([write(tmp_path / "empty.jsonl", []), file], {}, "no answer"),
    ]
    for files, settings, reason in refused:
        with pytest.raises(UserError, match=reason):
            judge(files, **settings)


def letters(prompts: list, responses: list[str], letter: str = "a") -> list[float]:
    """Reward by the number of a letter."""
    return [float(response.count(letter)) for response in responses]


def test_a_reward_of_ones_own_is_a_column_or_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["aa b", "a", "bb", ""]
    mine = [
        {"prompt_id": str(number), "prompt": "p", "response": text, "gold": number, "finished": number > 0}
        for number, text in enumerate(texts)
    ]
    theirs = [row | {"response": "a", "gold": 1} for row in mine]
    a, b = write(tmp_path / "a.jsonl", mine), write(tmp_path / "b.jsonl", theirs)
    judge([a, b], reward="gold")
    shown = capsys.readouterr().out
    assert "2/1/1" in shown
    assert "1.500 [" in shown
    assert "0.750 [" in shown  # finished
    name = f"{letters.__module__}.letters"
    judge([a, b], reward=name)
    assert "1/1/2" in capsys.readouterr().out
    judge([a], reward=name, reward_args={"letter": "b"})
    assert "0.750 [" in capsys.readouterr().out
    for settings, told in (
        (
            {"reward": "silver"},
            "silver is a column of the samples, and None for the prompt '0'",
        ),
        ({"reward": "json.nothing"}, "cannot be imported"),
        ({"reward": "math.isnan"}, r"math\.isnan failed \(TypeError: "),
        ({"reward": "gold", "by": "endpoint"}, "takes the place of --by"),
        ({"reward": "gold", "reward_args": {"x": 1}}, "takes none"),
        ({"reward_args": {"x": 1}}, "name the reward"),
    ):
        with pytest.raises(UserError, match=told):
            judge([a, b], **settings)


def test_the_win_rate_at_equal_length_is_the_logistic_fit_of_scipy() -> None:
    random = np.random.default_rng(0)
    prompts = [str(number // 2) for number in range(400)][:399]  # two answers each, but for the last
    longer = random.normal(30, 100, 399)
    won = random.random(399) < expit(-0.5 + 1.5 * np.tanh(longer / longer.std()))
    scores = np.where(random.random(399) < 0.1, 0.5, won)
    weight = 1 / np.array([prompts.count(prompt) for prompt in prompts])

    def loss(fit: np.ndarray) -> float:
        q = expit(fit[0] + fit[1] * np.tanh(longer / longer.std()))
        return float(-(weight * (scores * np.log(q) + (1 - scores) * np.log1p(-q))).sum() + 0.5e-6 * (fit**2).sum())

    found = length_controlled(scores, longer, prompts)
    assert found.mean == pytest.approx(float(expit(minimize(loss, np.zeros(2), tol=1e-10).x[0])), abs=1e-5)
    assert found.low < float(expit(-0.5)) < found.high
    assert found.mean < scores.mean()  # the longer answers were ours, and the judge likes them
    even = length_controlled(scores, np.zeros(399), prompts)
    assert even.mean == pytest.approx(float(np.average(scores, weights=weight)), abs=1e-6)
    assert length_controlled(np.ones(5), longer[:5], prompts[:5]).mean == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": 1}, "prompt must be text or messages"),
        ({"response": None}, "response must be text"),
        ({"response": "\ud83d"}, "surrogates not allowed"),
        ({"prompt_id": [1]}, "prompt_id must be text or a whole number"),
        ({"finished": "false"}, "finished must be true or false"),
        ({"temperature": "0.5"}, "temperature must be a finite number"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"reference_logp": -1.0}, "logp must be a finite number"),
        ({"logp": float("nan"), "reference_logp": -1.0}, "logp must be a finite number"),
    ],
)
def test_the_wrong_field_of_a_sample_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    row = {"prompt_id": "1", "prompt": "p", "response": "r"}
    file = write(tmp_path / "a.jsonl", [row, row | changes])
    with pytest.raises(UserError, match=rf"a\.jsonl:2 is not a sample .*{said}.*: correct the line"):
        list(read_samples(file))


def test_samples_of_other_programs(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt_id": 7, "prompt": "p", "response": "r"},
        {"prompt": "q", "response": "r", "temperature": None},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    read = list(read_samples(str(file)))
    assert [(row["prompt_id"], row["response"]) for row in read] == [("7", "r"), ("3", "r")]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('\ufeff{"pair_id": "7", "prompt": "p", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    assert [row["response"] for row in rival_answers(str(pairs))] == ["a"]
    twice = write(tmp_path / "b.jsonl", [rows[0], rows[0] | {"prompt": "other"}])
    with pytest.raises(UserError, match="the prompt_id '7' has two prompts"):
        sampled_answers(twice)
    more = [rows[0], rows[0] | {"response": "s"}]
    assert len(sampled_answers(write(tmp_path / "c.jsonl", more))) == 2
    for repeated in ([*more, rows[0]], [more[0] | {"sample": 1}, more[1] | {"sample": 1}]):
        with pytest.raises(UserError, match="gives a sample of the prompt '7' twice"):
            sampled_answers(write(tmp_path / "c.jsonl", repeated))


def test_a_file_that_is_no_file_of_verdicts_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"mine": 1}')  # one line, without an end
    with pytest.raises(UserError, match="the last line is not a verdict"), VerdictFile.opened(str(path)):
        pass
    assert path.read_text() == '{"mine": 1}'


def test_a_reward_model_that_was_trained_again_scores_again(tmp_path: Path) -> None:
    model, ours = save_reward_model(tmp_path / "rm"), samples("chosen")
    with VerdictFile.opened(str(tmp_path / "v.jsonl")) as verdicts:
        first = LearnedReward(model, verdicts).rewards(ours)
        weights = load_file(tmp_path / "rm" / "model.safetensors")
        save_file({name: -part for name, part in weights.items()}, tmp_path / "rm" / "model.safetensors")
        assert not np.allclose(LearnedReward(model, verdicts).rewards(ours), first)
        save_file({name: part * np.nan for name, part in weights.items()}, tmp_path / "rm" / "model.safetensors")
        with pytest.raises(UserError, match=r"an answer to the prompt .* the reward nan: leave that prompt out"):
            LearnedReward(model, verdicts).rewards(ours)


class Unbuilt:
    """A reward whose constructor fails."""

    def __init__(self) -> None:
        raise RuntimeError("no GPU")


def tensors(prompts: list, responses: list[str]) -> torch.Tensor:
    """Rewards as a tensor, the length of each response."""
    return torch.tensor([float(len(response)) for response in responses])


def huge(prompts: list, responses: list[str]) -> list[int]:
    """Rewards beyond the range of float."""
    return [10**400] * len(responses)


def test_what_a_reward_of_ones_own_gives_or_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"prompt_id": "1", "prompt": "p", "response": "abc"}]
    assert OwnReward(f"{__name__}.tensors").rewards(answers).tolist() == [3.0]
    with pytest.raises(UserError, match="is no finite number"):
        OwnReward(f"{__name__}.huge").rewards(answers)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_a_reward.py").write_text("def f(:")
    for name, said in ((f"{__name__}.Unbuilt", "RuntimeError: no GPU"), ("half_a_reward.f", "SyntaxError: ")):
        with pytest.raises(UserError, match=f"cannot be imported or built .{said}.*PYTHONPATH=."):
            OwnReward(name)


# --- replies of another form ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply", ["<html>", None, Said(choices=[]), Said(choices=None), Said(choices=[Said(message=None)])], ids=repr
)
def test_a_reply_of_another_form_is_refused(reply: Any) -> None:
    with pytest.raises(ValueError, match="it sent "):
        first_choice(reply)
    parts = Said(choices=[Said(message=Said(content=[{"text": "A"}]))])
    with pytest.raises(ValueError, match="it sent "):
        first_choice(parts)
    assert first_choice(Said(choices=[Said(message=Said(content=None))]))[1] == ""
    assert first_choice(Said(choices=[Said(text="x")]))[1] == "x"


def test_a_server_of_another_kind_and_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(client: Any, question: int) -> None:
        first_choice("<html>")

    client = Client(Endpoint(url="http://127.0.0.1:9"))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 is no server of OpenAI's API .*<html>.*/v1; kept"):
        client.ask_all([1, 2], ask, lambda: "kept")
    monkeypatch.setenv("MY_KEY", "schl\u00fcssel\n")
    with pytest.raises(UserError, match="variable MY_KEY holds a character that no key has"):
        Client(Endpoint(api_key_env="MY_KEY"))


def test_instructions_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9 $prompt $first $second")
    with pytest.raises(UserError, match=r"mine\.txt cannot be read: it is not UTF-8"):
        read_instructions(str(tmp_path / "mine.txt"))
