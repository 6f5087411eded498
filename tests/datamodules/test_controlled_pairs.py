from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pvariance

import pytest

from datamodules.controlled_task import (
    Gap,
    Kind,
    demonstrations,
    grade,
    preference_pairs,
    prompts,
)
from datamodules.controlled_task.grammar import Grade, parse_question
from datamodules.controlled_task.pairs import MIXED_QUALITY
from datamodules.records import PreferencePair

ROOT = Path(__file__).parents[2]


def within_three_errors(observed: float, expected: float, count: int) -> bool:
    return abs(observed - expected) <= 3 * math.sqrt(expected * (1 - expected) / count)


def asked(pair: PreferencePair) -> str:
    """The prompt, which is text in this task."""
    assert isinstance(pair.prompt, str)
    return pair.prompt


def grades(pair: PreferencePair) -> tuple[Grade, Grade]:
    """What the parser says of the chosen and the rejected text."""
    assert pair.rejected is not None
    return grade(asked(pair), pair.chosen), grade(asked(pair), pair.rejected)


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    return preference_pairs(5000, seed=7, gap="mixed")


def test_labels_agree_with_the_parser(pairs: list[PreferencePair]) -> None:
    for pair in pairs:
        chosen, rejected = grades(pair)
        assert (pair.labels["chosen_reward"], pair.labels["rejected_reward"]) == (chosen.reward, rejected.reward)
        assert (chosen.reward > rejected.reward) == (not pair.labels["flipped"])
        assert abs(chosen.reward - rejected.reward) >= 1
        distance = abs(chosen.rung - rejected.rung)
        assert distance >= 1
        assert pair.labels["gap_kind"] == ("high" if distance >= 2 else "low")
        assert chosen.malformed + rejected.malformed == (pair.labels["kind"] == "broken")


def test_observed_rates_are_the_rates_asked_for() -> None:
    pairs = [pair for seed in range(4) for pair in preference_pairs(2500, seed=seed, gap="mixed")]
    count = len(pairs)
    graded = [pair for pair in pairs if pair.labels["kind"] == "graded"]
    high = sum(pair.labels["gap_kind"] == "high" for pair in graded)
    assert within_three_errors(sum(bool(pair.labels["flipped"]) for pair in pairs) / count, 0.15, count)
    assert within_three_errors(1 - len(graded) / count, 0.2, count)
    assert within_three_errors(high / len(graded), 0.5, len(graded))


@pytest.mark.parametrize(("gap", "distances"), [("adjacent", {1}), ("extreme", {2, 3, 4}), ("any", {1, 2, 3, 4})])
def test_the_gap_says_how_far_the_grades_lie_apart(gap: Gap, distances: set[int]) -> None:
    pairs = preference_pairs(400, seed=3, gap=gap, broken_share=0)
    assert {abs(better.rung - worse.rung) for better, worse in map(grades, pairs)} == distances
    assert {better.kind for better, _ in map(grades, pairs)} == set(Kind) - {Kind.MALFORMED}


def test_the_default_is_four_fifths_wide_gaps_and_one_fifth_broken() -> None:
    pairs = preference_pairs(2000, seed=11)
    graded = [pair for pair in pairs if pair.labels["kind"] == "graded"]
    assert all(pair.labels["gap_kind"] == "high" for pair in graded)
    assert within_three_errors(len(graded) / len(pairs), 0.8, len(pairs))


@pytest.mark.slow
def test_length_is_no_cue_among_well_formed_pairs() -> None:
    pairs = preference_pairs(20_000, seed=5, gap="any", flip_rate=0, broken_share=0)
    differences, by_grade = [], defaultdict(list)
    for pair in pairs:
        assert pair.rejected is not None
        chosen, rejected = len(pair.chosen.split()), len(pair.rejected.split())
        differences.append((chosen > rejected) - (chosen < rejected))
        for judged, length in zip(grades(pair), (chosen, rejected), strict=True):
            by_grade[judged.kind].append(length)
    assert set(differences) == {-1, 0, 1}
    assert abs(fmean(differences)) <= 3 * math.sqrt(pvariance(differences) / len(differences))
    assert len(by_grade) == 5
    for lengths in by_grade.values():
        # The law of the lengths, not their mean alone: 10, 11, 12 as 1 : 2 : 1 whatever the grade.
        assert set(lengths) == {10, 11, 12}
        for length, share in ((10, 0.25), (11, 0.5), (12, 0.25)):
            assert within_three_errors(lengths.count(length) / len(lengths), share, len(lengths))


def test_neighbouring_grades_differ_in_one_fault_only() -> None:
    for pair in preference_pairs(600, seed=13, gap="adjacent", flip_rate=0, broken_share=0):
        assert pair.rejected is not None
        question = parse_question(asked(pair))
        merits = []
        for text in (pair.chosen, pair.rejected):
            words = text.split()
            start = words.index("has") + 1
            claims = {(words[start], words[start + 1]), (words[start + 3], words[start + 4])}
            named = {attribute for attribute, _ in claims}
            polite_enough = grade(asked(pair), text).kind is not Kind.RUDE
            on_topic = named == set(question.asked)
            right = sum(question.facts[attribute] == value for attribute, value in claims)
            merits.append((polite_enough, on_topic, right))
        better, worse = merits
        assert sum(int(b) - int(w) for b, w in zip(better, worse, strict=True)) == 1
        assert all(b >= w for b, w in zip(better, worse, strict=True))


def test_a_rude_response_has_the_content_of_the_one_it_stands_against() -> None:
    met = set()
    for pair in preference_pairs(600, seed=17, gap="any", flip_rate=0, broken_share=0):
        assert pair.rejected is not None
        chosen, rejected = grades(pair)
        if rejected.kind is Kind.RUDE:
            rude_opener = pair.rejected.split()[0]
            mended = grade(asked(pair), pair.rejected.replace(f" {rude_opener} ", " well ", 1))
            assert mended.kind is chosen.kind
            met.add(mended.kind)
    assert len(met) == 4


def test_the_flip_rate_changes_labels_and_never_texts() -> None:
    clean = preference_pairs(300, seed=2, flip_rate=0)
    flipped = preference_pairs(300, seed=2, flip_rate=1)
    for one, other in zip(clean, flipped, strict=True):
        assert (one.prompt, one.chosen, one.rejected) == (other.prompt, other.rejected, other.chosen)
        assert one.labels["chosen_reward"] == other.labels["rejected_reward"]
        assert (one.labels["flipped"], other.labels["flipped"]) == (False, True)


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert preference_pairs(50, seed=4)[:20] == preference_pairs(20, seed=4)
    assert demonstrations(50, seed=4)[:20] == demonstrations(20, seed=4)
    assert prompts(50, seed=4)[:20] == prompts(20, seed=4)
    assert prompts(20, seed=4) != prompts(20, seed=5)


def test_no_animal_description_is_on_both_sides() -> None:
    described: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        texts = [asked(pair) for pair in preference_pairs(2000, seed=1, split=split)]
        texts += [asked(item) for item in demonstrations(2000, seed=1, split=split)]
        texts += prompts(2000, seed=1, split=split)
        assert all(parse_question(text).split == split for text in texts)
        described[split] = {text.split(" can you ")[0] for text in texts}
    assert not described["train"] & described["held_out"]


def test_a_description_stays_on_its_side_whatever_is_asked() -> None:
    text = prompts(1, seed=0)[0]
    question = parse_question(text)
    swapped = text.replace(
        f"its {question.asked[0]} and {question.asked[1]}", f"its {question.asked[1]} and {question.asked[0]}"
    )
    assert parse_question(swapped).asked == question.asked[::-1]
    assert parse_question(swapped).split == "held_out"


def test_demonstrations_come_in_the_shares_asked_for() -> None:
    items = demonstrations(5000, seed=9)
    for kind, share in MIXED_QUALITY.items():
        observed = sum(grade(asked(item), item.chosen).kind is kind for item in items) / len(items)
        assert within_three_errors(observed, share, len(items))
    for item in items:
        judged = grade(asked(item), item.chosen)
        assert item.rejected is None
        assert item.labels == {"kind": judged.kind.value, "chosen_reward": judged.reward}


def test_pair_ids_are_unique_over_splits_seeds_gaps_and_uses() -> None:
    lists = [
        preference_pairs(20, seed=seed, split=split, gap=gap)
        for seed in (0, 1)
        for split in ("train", "held_out")
        for gap in ("adjacent", "extreme", "mixed", "any")
    ]
    lists += [demonstrations(20, seed=seed, split=split) for seed in (0, 1) for split in ("train", "held_out")]
    ids = [pair.pair_id for pairs in lists for pair in pairs]
    assert len(set(ids)) == len(ids)
    assert preference_pairs(1, seed=7)[0].pair_id == "controlled-train-extreme-7-000000"


FINGERPRINT = """
import hashlib
from datamodules.controlled_task import demonstrations, preference_pairs, prompts
made = preference_pairs(50, seed=3, gap="any"), demonstrations(50, seed=3), prompts(50, seed=3)
print(hashlib.sha256(repr(made).encode()).hexdigest())
"""


@pytest.mark.slow
def test_every_process_makes_the_same_texts() -> None:
    made = preference_pairs(50, seed=3, gap="any"), demonstrations(50, seed=3), prompts(50, seed=3)
    expected = hashlib.sha256(repr(made).encode()).hexdigest()
    result = subprocess.run(
        [sys.executable, "-c", FINGERPRINT],
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == expected
