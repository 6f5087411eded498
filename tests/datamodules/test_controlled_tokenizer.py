from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from datamodules.controlled_task import Gap, build_tokenizer, demonstrations, preference_pairs, prompts
from datamodules.controlled_task.grammar import WORDS

TOKENIZER = build_tokenizer()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**40),
    split=st.sampled_from(["train", "held_out"]),
    gap=st.sampled_from(["adjacent", "extreme", "any"]),
)
def test_every_generated_text_comes_back_to_the_letter(seed: int, split: Any, gap: Gap) -> None:
    for pair in preference_pairs(8, seed, split=split, gap=gap, broken_share=0.5):
        assert isinstance(pair.prompt, str)
        assert pair.rejected is not None
        for text in (pair.prompt, pair.chosen, pair.rejected, pair.prompt + pair.chosen):
            ids = TOKENIZER(text)["input_ids"]
            assert TOKENIZER.unk_token_id not in ids
            assert TOKENIZER.decode(ids) == text


def test_prompt_and_response_encode_apart_as_they_do_together() -> None:
    for item in demonstrations(100, seed=0):
        assert isinstance(item.prompt, str)
        apart = TOKENIZER(item.prompt)["input_ids"] + TOKENIZER(item.chosen)["input_ids"]
        assert TOKENIZER(item.prompt + item.chosen)["input_ids"] == apart


def test_one_token_a_word_and_no_special_token_unasked() -> None:
    for prompt in prompts(50, seed=0):
        ids = TOKENIZER(prompt)["input_ids"]
        assert len(ids) == 26
        assert not set(ids) & set(TOKENIZER.all_special_ids)
    for item in demonstrations(50, seed=0):
        assert len(TOKENIZER(item.chosen)["input_ids"]) == len(item.chosen.split())


def test_the_vocabulary_is_small_and_without_doubles() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert len(TOKENIZER) == 116
    special = TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id
    assert special == (0, 1, 2, 3)


def test_a_foreign_word_is_unknown_and_never_dropped() -> None:
    ids = TOKENIZER(" the unicorn has colour red")["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == [" the", "<unk>", " has", " colour", " red"]


def test_eos_is_left_out_of_decoded_samples() -> None:
    ids = [*TOKENIZER(" sure the lion")["input_ids"], TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == " sure the lion"


@pytest.mark.parametrize("text", [prompts(1, seed=5)[0], demonstrations(1, seed=5)[0].chosen])
def test_saved_and_loaded_by_auto_tokenizer_it_is_the_same(tmp_path: Path, text: str) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = TOKENIZER(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.special_tokens_map == TOKENIZER.special_tokens_map
