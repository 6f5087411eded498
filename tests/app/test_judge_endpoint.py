"""The endpoint judge against a real server: both orders, ties, retries, and no verdict asked for twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import LIMIT_SECONDS, ROOT, command
from served_judge import INSTRUCTIONS, REPLIES, WORDS, Relay, score, served, train_judge, verdict

from app.commands.generate import generate
from app.core.errors import UserError
from app.core.samples import read_samples
from app.judges.endpoint import Endpoint, EndpointJudge, SamplingServer
from app.judges.verdicts import VerdictFile

KEY = "sk-of-a-user-5f1c"
NEEDED = ("openai", "fastapi", "uvicorn")
pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason=f"needs {NEEDED}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    train_judge(folder)
    (folder / "instructions.txt").write_text(INSTRUCTIONS)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    with served(model) as url:
        yield url


def rows(words: list[str], **fields: object) -> list[dict]:
    return [{"prompt_id": f"p{i}", "prompt": "what", "response": word, **fields} for i, word in enumerate(words)]


EVERY = list(product(WORDS, WORDS))
OURS, THEIRS = rows([ours for ours, _ in EVERY]), rows([theirs for _, theirs in EVERY])
WANTED = [score(*pair) for pair in EVERY]
DIFFERENT = sum(ours != theirs for ours, theirs in EVERY)


def settings(model: Path, url: str, **changes: Any) -> Endpoint:
    return Endpoint(url=url, instructions=str(model / "instructions.txt"), max_tokens=8, **changes)


def test_scores_are_means_over_both_orders(model: Path, server: str, tmp_path: Path) -> None:
    relay = Relay(server)
    with relay.running() as url, VerdictFile.opened(str(tmp_path / "verdicts.jsonl")) as verdicts:
        judge = EndpointJudge(str(model), settings(model, url), verdicts)
        np.testing.assert_array_equal(judge.scores(OURS, THEIRS), WANTED)
    # good > fair > poor whatever the order; slick wins in one order of two; equal answers are not asked about
    assert dict(zip(EVERY, WANTED, strict=True))["good", "poor"] == 1.0
    assert dict(zip(EVERY, WANTED, strict=True))["slick", "good"] == 0.5
    assert len(relay.asked) == len(set(relay.asked)) == DIFFERENT
    biased = 2 * 3  # slick against each of the three, in both roles
    unread = sum(verdict(*pair) is None for pair in EVERY if pair[0] != pair[1])
    first, second = judge.notes()
    assert f"saw {DIFFERENT} pairs" in first
    assert f"Of the {DIFFERENT - unread} with both verdicts the order changed it on {biased};" in first
    assert f"{2 * unread} of {2 * DIFFERENT} replies hold no verdict: {unread} pairs are in no win rate." in second


def test_a_failing_server_is_asked_again_and_a_refusing_one_is_not(
    model: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    relay, path = Relay(server), tmp_path / "verdicts.jsonl"
    with relay.running() as url, VerdictFile.opened(str(path)) as verdicts:
        relay.fail_next = 2
        patient = EndpointJudge(
            str(model), settings(model, url, retries=2, parallel=1, api_key_env="OPENAI_API_KEY"), verdicts
        )
        assert patient.scores(OURS[1:2], THEIRS[1:2]) == WANTED[1:2]
        assert relay.keys == {f"Bearer {KEY}"}
        relay.status = 503
        hasty = EndpointJudge(
            str(model), settings(model, url, retries=1, parallel=1, api_key_env="OPENAI_API_KEY"), verdicts
        )
        with pytest.raises(UserError, match=r"verdicts\.jsonl keeps 2 verdicts"):
            hasty.scores(OURS[:8], THEIRS[:8])
        relay.status = 401
        with pytest.raises(UserError, match="gave no reply") as refusal:
            patient.scores(OURS[:8], THEIRS[:8])
        relay.status = 400
        with pytest.raises(
            UserError, match=r"No pair has a readable verdict .* 2 of 2 replies .* refused: .*not now"
        ):
            EndpointJudge(str(model), settings(model, url), verdicts).scores(OURS[7:8], THEIRS[7:8])
        assert "Bearer none" in relay.keys  # the user's key goes to no other server unasked
        relay.status = None
        relay.fail_next, relay.failure = 1, 400  # one order of one pair
        partly = EndpointJudge(str(model), settings(model, url, parallel=1), verdicts)
        scores = partly.scores(OURS[2:4], THEIRS[2:4])
        assert np.isnan(scores).sum() == 1
        assert partly.notes()[2].startswith("The endpoint refused 1 pairs (prompts p2): ")
        patient.scores(OURS[:8], THEIRS[:8])
    assert len(relay.asked) == len(set(relay.asked))
    assert KEY not in str(refusal.value)
    assert KEY not in path.read_text()


@pytest.mark.slow
def test_a_killed_judge_asks_nothing_twice(model: Path, server: str, tmp_path: Path) -> None:
    for name, answers in {"ours": OURS, "theirs": THEIRS}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    relay = Relay(server)
    with relay.running() as url:
        line = ["judge", "ours.jsonl", "theirs.jsonl", "--by", "endpoint", "--model", str(model)]
        line += [f"--endpoint.url={url}", f"--endpoint.instructions={model / 'instructions.txt'}"]
        line += [
            "--endpoint.max_tokens=8",
            "--endpoint.parallel=1",
            "--endpoint.api_key_env=OPENAI_API_KEY",
            "--verdicts=kept/verdicts.jsonl",
        ]
        relay.hold_from = 7
        places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        variables = {**os.environ, "PYTHONPATH": places, "OPENAI_API_KEY": KEY}
        judge = subprocess.Popen([sys.executable, "-m", "app.main", *line], cwd=tmp_path, env=variables)
        assert relay.holding.wait(LIMIT_SECONDS)
        judge.kill()
        judge.wait()
        kept = tmp_path / "kept" / "verdicts.jsonl"
        assert len(kept.read_text().splitlines()) == 7
        with open(kept, "a") as file:
            file.write('{"key": "cut sho')  # as a kill in the middle of a write would leave it
        relay.hold_from = None
        run = command(tmp_path, *line, OPENAI_API_KEY=KEY)
    assert run.returncode == 0, run.stderr
    assert len(relay.asked) == len(set(relay.asked)) == DIFFERENT
    assert len(kept.read_text().splitlines()) == DIFFERENT
    wins, losses = sum(s > 0.5 for s in WANTED), sum(s < 0.5 for s in WANTED)
    ties = sum(s == 0.5 for s in WANTED)
    assert f"{wins}/{ties}/{losses}" in run.stdout
    assert f"{np.nanmean(WANTED):.3f} [" in run.stdout
    everything = run.stdout + run.stderr
    everything += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in everything


def test_a_server_samples(model: Path, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` writes the answers of the server's model, counts refused prompts, and reports a failing server."""
    texts = [f"asked what first {ours} second {theirs}" for ours, theirs in EVERY[:3]]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    relay = Relay(server)
    with relay.running() as url:

        def sampled(**more: Any) -> None:
            endpoint = SamplingServer(url=url, parallel=1, retries=0)
            settings = {
                "count": None,
                "max_new_tokens": 6,
                "temperature": 0.0,
                "chat_template": True,
                "batch_size": 2,
            }
            generate(str(model), str(out), str(prompts), endpoint=endpoint, **settings | more)

        sampled()
        rows = list(read_samples(str(out)))
        assert [row["response"].strip() for row in rows] == [REPLIES[verdict(*pair)] for pair in EVERY[:3]]
        assert all(row["finished"] for row in rows)
        assert [row["prompt"] for row in rows] == texts == relay.asked
        sampled(max_new_tokens=1)
        assert "3 of them are cut at max_new_tokens = 1" in capsys.readouterr().out
        relay.fail_next, relay.failure = 1, 400
        sampled()
        assert len(out.read_text().splitlines()) == 2
        assert "1 samples were refused by the endpoint: Error code: 400" in capsys.readouterr().out
        relay.fail_next, relay.failure = 3, 400
        with pytest.raises(UserError, match="refused every prompt"):
            sampled()
        relay.status = 503
        with pytest.raises(UserError, match="the same command continues after the last finished batch"):
            sampled()
    for more, told in (({"reference": "x"}, "reference"), ({"max_prompt_length": 8}, "max_prompt_length")):
        with pytest.raises(UserError, match=f"{told} needs the model in this process"):
            sampled(**more)
