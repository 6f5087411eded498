"""`beta-dpo pairs`: which samples meet, what is left out, and that PreferenceData takes the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from app.commands.pairs import pairs
from app.core.errors import UserError
from datamodules.sources.pairs import read_pairs


def sample_file(folder: Path, **changes: object) -> str:
    """Ten prompts with four samples each, whose reward is their number, in another order."""
    rows = [
        {
            "prompt_id": str(prompt),
            "prompt": f"prompt {prompt}",
            "response": f" w{4 * prompt + copy}",
            "finished": (prompt, copy) != (0, 0),
            "good": 4 * prompt + copy,
            "topic": "films",
            **changes,
        }
        for prompt in range(10)
        for copy in (2, 0, 3, 1)
    ]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_no_sample_is_in_two_pairs_and_flips_have_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    samples, out = sample_file(tmp_path), str(tmp_path / "pairs.jsonl")
    pairs(samples, out, reward="good", ranks=[[1, 4], [2, -2]], flip_rate=0.5, seed=1)
    assert "18 pairs of 10 prompts" in capsys.readouterr().out
    read = list(read_pairs(out, need_rejected=True))
    for high, low in zip(read[::2], read[1::2], strict=True):
        for pair, places in ((high, [3, 0]), (low, [2, 1])):
            rewards = [int(side.strip()[1:]) for side in (pair.chosen, pair.rejected or "")]
            assert [reward % 4 for reward in rewards] == (places[::-1] if pair.labels["flipped"] else places)
            assert [pair.labels["chosen_reward"], pair.labels["rejected_reward"]] == rewards
            assert pair.labels["topic"] == "films"
            assert "good" not in pair.labels  # it is one sample's alone
    assert 0 < sum(bool(pair.labels["flipped"]) for pair in read) < 18
    before = Path(out).read_text()
    pairs(samples, out, reward="good", ranks=[[1, 4], [2, -2]], flip_rate=0.5, seed=1)
    assert Path(out).read_text() == before


def test_ranks_and_what_makes_no_pair(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    samples, out = sample_file(tmp_path), str(tmp_path / "pairs.jsonl")
    counts: dict[Literal["best_worst", "adjacent"], int] = {"best_worst": 9, "adjacent": 18}
    for choice, count in counts.items():
        pairs(samples, out, reward="good", ranks=choice)
        told = capsys.readouterr().out
        assert f"{count} pairs of 10 prompts" in told
        assert "left out: 1 prompts with a sample that is cut or empty" in told
    pairs(samples, out, reward="good", ranks=[[1, 2], [2, 3]], reuse=True)
    assert "18 pairs" in capsys.readouterr().out
    for ranks, told in (
        ([[1, 2], [2, 3]], "use one twice"),
        ([[3, 1]], "do not name the better one first"),
        ([[1]], "must be a list of two ranks each"),
        ([[-1, 1]], "do not name the better one first"),
        ([[3, -3]], "makes no pair: 10 prompts; left out: 1 .*; left out: 9 prompts with too few samples"),
        ([[1, 3], [2, -2]], "makes no pair: 10 prompts; left out: 1 .*; left out: 9 prompts with too few samples"),
        ([[1, 9]], "makes no pair: 10 prompts; left out: 1 .*; left out: 9 prompts with too few samples"),
    ):
        with pytest.raises(UserError, match=told):
            pairs(samples, out, reward="good", ranks=ranks)
    with pytest.raises(UserError, match="left out: 9 pairs of equal text or reward"):
        pairs(sample_file(tmp_path, good=1), out, reward="good")


def test_a_prompt_with_fewer_samples_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, out = Path(sample_file(tmp_path)), tmp_path / "pairs.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-2]))
    pairs(str(samples), str(out), reward="good", ranks=[[1, -1], [2, -2]])
    assert "left out: 1 prompts with too few samples for these ranks" in capsys.readouterr().out
    pairs(str(samples), str(out), reward="good")
    assert f"{out} (replaces the one that was there)" in capsys.readouterr().out


@pytest.mark.parametrize("chat", [False, True])
def test_a_sample_that_is_messages_in_json_stays_text_or_is_counted(
    chat: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [json.dumps({"role": "assistant", "content": said}) for said in ("a", "b")]

    def asked(start: str) -> object:
        return [{"role": "user", "content": f"{start}?"}] if chat else f"{start}?"

    rows = [
        {"prompt_id": start, "prompt": asked(start), "response": start + text}
        for start in ("", "Say: ")
        for text in texts
    ]
    samples, out = tmp_path / "samples.jsonl", tmp_path / "pairs.jsonl"
    samples.write_text("".join(json.dumps(row | {"good": n}) + "\n" for n, row in enumerate(rows)))
    pairs(str(samples), str(out), reward="good")
    read = [pair.chosen for pair in read_pairs(str(out), need_rejected=True)]
    assert read == [*[texts[1]] * chat, f"Say: {texts[1]}"]
    told = "left out: 1 pairs that data.path would not read as they are (text that is messages in JSON)"
    assert (told in capsys.readouterr().out) != chat


def test_the_samples_are_not_replaced_and_own_columns_are_not_the_pairs(tmp_path: Path) -> None:
    samples = sample_file(tmp_path, chosen_reward=-1)
    before = Path(samples).read_text()
    with pytest.raises(UserError, match=r"out: .*samples\.jsonl is read by this command"):
        pairs(samples, samples, reward="good")
    (tmp_path / "o.jsonl").mkdir()
    with pytest.raises(UserError, match=r"out: .*\.jsonl is a folder: give a file"):
        pairs(samples, str(tmp_path / "o.jsonl"), reward="good")
    with pytest.raises(UserError, match=r"out: .*p\.jsonl cannot be written \(.*samples\.jsonl is no folder\)"):
        pairs(samples, f"{samples}/new/p.jsonl", reward="good")
    assert Path(samples).read_text() == before
    pairs(samples, str(tmp_path / "pairs.jsonl"), reward="good")
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["chosen_reward"] == 7.0
