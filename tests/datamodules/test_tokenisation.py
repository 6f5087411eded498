"""Special tokens exactly once, truncation as documented, nothing lost without a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEMPLATE, byte_tokenizer, letter_tokenizer, texts, tokenise_pair
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from app.core.errors import UserError
from datamodules.records import Message, PreferencePair, TokenisedPair
from datamodules.tokenisation import (
    CONTROL_TOKENS,
    FILE_TEXT,
    REPEATED,
    PromptTruncation,
    Tokenisation,
    tokenise_pairs,
    tokenizer_files,
    tokenizer_fingerprint,
)

PAIR = PreferencePair("p", "the cat", " sat on", " mat")
PLAIN, CHAT = Tokenisation(), Tokenisation(chat_template=True)
BOS, EOS = 0, 1


def tokens(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation = PLAIN
) -> TokenisedPair:
    found, notes = tokenise_pair(pair, tokenizer, settings)
    assert notes == []
    assert found is not None
    return found


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_prompt_has_the_tokenizers_bos_and_responses_end_with_one_eos(bos: bool, add_eos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos, add_eos=add_eos)
    start = "<s>" if bos else ""
    assert texts(tokens(PAIR, tokenizer), tokenizer) == [start + "the cat", " sat on</s>", " mat</s>"]


def test_special_tokens_that_stand_in_the_text_are_not_doubled() -> None:
    tokenizer = byte_tokenizer()
    pair = PreferencePair("p", "<s><s>the cat</s>", " sat</s>", " mat</s></s>")
    found, notes = tokenise_pair(pair, tokenizer, PLAIN)
    assert texts(found, tokenizer) == ["<s>the cat", " sat</s>", " mat</s>"]
    assert notes == [CONTROL_TOKENS.format("prompts")]


def test_answers_that_repeat_their_prompt_are_counted() -> None:
    asked = "Human: hi\n\nAssistant:"
    whole = PreferencePair("p", asked, f" {asked} a", f"{asked} b")
    for pair, told in ((whole, [REPEATED]), (replace(whole, rejected=" b"), [])):
        assert tokenise_pair(pair, byte_tokenizer(), Tokenisation())[1] == told


def test_a_demonstration_has_no_rejected() -> None:
    assert tokens(replace(PAIR, rejected=None), byte_tokenizer()).rejected is None


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (replace(PAIR, chosen=" a</s>b"), "BOS or EOS within chosen"),
        (replace(PAIR, rejected=" a<s>b"), "BOS or EOS within rejected"),
        (replace(PAIR, rejected="</s>"), "empty rejected after tokenisation"),
        (replace(PAIR, prompt="</s>"), "empty prompt after tokenisation"),
        (replace(PAIR, rejected=" sat on</s>"), "identical after tokenisation"),
    ],
)
def test_what_cannot_be_tokenised_is_dropped_with_its_reason(pair: PreferencePair, reason: str) -> None:
    assert tokenise_pair(pair, byte_tokenizer(), PLAIN) == (None, [reason])


def test_text_without_a_token_does_not_make_an_empty_sequence() -> None:
    tokenizer = letter_tokenizer()
    pair = PreferencePair("p", "ab", "a", "b")
    lost = {
        "prompt": replace(pair, prompt="xyz"),
        "chosen": replace(pair, chosen="xyz"),
        "rejected": replace(pair, rejected="xyz"),
    }
    for side, without in lost.items():
        assert tokenise_pair(without, tokenizer, PLAIN) == (None, [f"empty {side} after tokenisation"])
    assert [ids.tolist() for ids in tokens(pair, tokenizer) if ids is not None] == [[1, 2], [1, 0], [2, 0]]


def test_chat_template_speaks_once_for_each_kind_of_prompt() -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    hh = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: more\n\nAssistant:"
    talk = (Message("system", "be kind"), Message("user", "the cat"))
    for prompt, templated in (
        ("the cat", "<s>[user]the cat</s>[assistant]"),
        (talk, "<s>[system]be kind</s>[user]the cat</s>[assistant]"),
        (hh, "<s>[user]hi</s>[assistant]yes?</s>[user]more</s>[assistant]"),
    ):
        found = tokens(replace(PAIR, prompt=prompt), tokenizer, CHAT)
        assert texts(found, tokenizer) == [templated, "sat on</s>", "mat</s>"]
    twice = "\n\nHuman: hi\n\nAssistant: a\n\nAssistant:"
    assert tokenise_pair(replace(PAIR, prompt=twice), tokenizer, CHAT) == (
        None,
        ["HH turns do not alternate, as a chat needs"],
    )
    spoken = (Message("assistant", "x"), Message("user", "y"))
    assert tokenise_pair(replace(PAIR, prompt=spoken), tokenizer, CHAT)[1] == ["the chat template refuses: no"]


def test_settings_that_cannot_work_are_refused_with_the_cure() -> None:
    with pytest.raises(UserError, match="eos_token"):
        tokenise_pair(PAIR, byte_tokenizer(eos=False), PLAIN)
    with pytest.raises(UserError, match=r"data\.chat_template: false"):
        tokenise_pair(PAIR, byte_tokenizer(), CHAT)
    talk = replace(PAIR, prompt=(Message("user", "hi"),))
    with pytest.raises(UserError, match=r"Pair p is chat messages.*data\.chat_template: auto"):
        tokenise_pair(talk, byte_tokenizer(template=TEMPLATE), Tokenisation(chat_template=False))
    for lengths in ((10, 10), (10, 0)):
        with pytest.raises(UserError, match=r"data\.max_prompt_length"):
            Tokenisation(*lengths)


LONG = PreferencePair("p", "ABCDEFGHIJ", "0123", "98")  # byte-level: one token for each capital and digit


@pytest.mark.parametrize(
    ("max_length", "max_prompt", "keep", "expected", "notes"),
    [
        (16, 4, "keep_end", ["<s>ABCDEFGHIJ", "0123</s>", "98</s>"], []),
        (15, 4, "keep_end", ["<s>HIJ", "0123</s>", "98</s>"], ["prompt truncated"]),
        (15, 4, "keep_start", ["<s>ABC", "0123</s>", "98</s>"], ["prompt truncated"]),
        (8, 4, "keep_end", ["<s>HIJ", "0123", "98</s>"], ["prompt truncated", "chosen truncated"]),
        (6, 4, "keep_end", ["<s>HIJ", "01", "98"], ["prompt truncated", "chosen truncated", "rejected truncated"]),
        (6, 1, "keep_end", ["<s>", "0123</s>", "98</s>"], ["prompt truncated"]),
    ],
)
def test_truncation_cuts_the_prompt_then_the_response(
    max_length: int, max_prompt: int, keep: PromptTruncation, expected: list[str], notes: list[str]
) -> None:
    tokenizer = byte_tokenizer()
    settings = Tokenisation(max_length, max_prompt, keep)
    found, cut = tokenise_pair(LONG, tokenizer, settings)
    assert found is not None
    assert texts(found, tokenizer) == expected
    assert cut == notes


def test_a_pair_that_truncation_makes_equal_is_dropped() -> None:
    pair = PreferencePair("p", "ABC", "0123", "0129")
    assert tokenise_pair(pair, byte_tokenizer(), Tokenisation(7, 4)) == (None, ["identical after truncation"])


def test_a_short_prompt_is_left_whole_when_the_response_is_what_is_long() -> None:
    tokenizer = byte_tokenizer()
    found, cut = tokenise_pair(PreferencePair("p", "AB", "0123456", "9"), tokenizer, Tokenisation(8, 4))
    assert found is not None
    assert texts(found, tokenizer) == ["<s>AB", "01234", "9</s>"]
    assert cut == ["chosen truncated"]


word = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25) | st.sampled_from(
    ["<s>", "</s>", "<s>a", "a</s>", "</s>a", " ", "0" * 30]
)


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(word, word, st.none() | word), min_size=1, max_size=4),
    form=st.sampled_from([(False, False, False), (True, False, False), (True, True, False), (True, False, True)]),
    max_prompt=st.integers(1, 20),
    room=st.integers(1, 20),
    keep=st.sampled_from(["keep_end", "keep_start"]),
)
def test_invariants_hold_for_any_text(
    pairs: list[tuple[str, str, str | None]],
    form: tuple[bool, bool, bool],
    max_prompt: int,
    room: int,
    keep: PromptTruncation,
) -> None:
    bos, add_eos, chat = form
    tokenizer = byte_tokenizer(bos=bos, add_eos=add_eos, template=TEMPLATE if chat else None)
    settings = Tokenisation(max_prompt + room, max_prompt, keep, chat)
    records = [PreferencePair(str(index), *texts) for index, texts in enumerate(pairs)]
    results = tokenise_pairs(records, tokenizer, settings)
    assert [notes for _, notes in results] == [tokenise_pair(record, tokenizer, settings)[1] for record in records]
    for record, (found, notes) in zip(records, results, strict=True):
        if found is None:
            assert len(notes) == 1
            continue
        sides = [("chosen", found.chosen)]
        if found.rejected is not None:
            sides.append(("rejected", found.rejected))
            assert found.chosen.tolist() != found.rejected.tolist()
        assert (found.rejected is None) == (record.rejected is None)
        prompt = found.prompt.tolist()
        assert prompt
        if bos:
            assert prompt[0] == BOS
            assert prompt[1:2] != [BOS]
        if not chat and "prompt truncated" not in notes:
            assert prompt[-1] != EOS
        for side, ids in sides:
            assert 1 <= len(ids) <= settings.max_length - len(prompt)
            assert ids.tolist().count(EOS) == (0 if f"{side} truncated" in notes else 1)
            assert f"{side} truncated" in notes or ids[-1] == EOS
        if not notes and not chat:  # byte-level: what was not cut can be read back
            body = texts(found, tokenizer)[1].removesuffix("</s>")
            assert record.chosen.startswith(body)
            assert record.chosen.removeprefix(body).replace("</s>", "") == ""


def test_fingerprint_follows_what_decides_the_tokens_and_nothing_else() -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    base = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)  # leaves its settings in the backend
    assert tokenizer_fingerprint(tokenizer) == base == tokenizer_fingerprint(byte_tokenizer(template=TEMPLATE))
    others = [
        byte_tokenizer(),
        byte_tokenizer(bos=False, template=TEMPLATE),
        byte_tokenizer(add_eos=True, template=TEMPLATE),
        letter_tokenizer(),
        ByT5Tokenizer(),
        ByT5Tokenizer(extra_ids=3),
    ]
    assert len({base, *map(tokenizer_fingerprint, others)}) == 7


def test_a_tokenizer_without_a_backend_works_alike() -> None:
    found = tokens(PAIR, ByT5Tokenizer())
    eos = ByT5Tokenizer().eos_token_id
    assert found.prompt.tolist() == [byte + 3 for byte in b"the cat"]
    assert found.chosen.tolist() == [*(byte + 3 for byte in b" sat on"), eos]


@pytest.mark.parametrize(("response", "wanted"), [(" ab", ["▁", "a", "b"]), ("ab", ["a", "b"])])
def test_a_response_continues_its_prompt_without_a_space_of_the_tokenizers_own(
    response: str, wanted: list[str]
) -> None:
    """SentencePiece puts a space before every text, which a response is not."""
    inside = Tokenizer(models.BPE({"</s>": 0, "▁": 1, "a": 2, "b": 3, ":": 4}, []))
    inside.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="</s>")
    found = tokens(PreferencePair("p", "b:", response, None), tokenizer)
    assert tokenizer.convert_ids_to_tokens(found.prompt.tolist()) == ["▁", "b", ":"]
    assert tokenizer.convert_ids_to_tokens(found.chosen.tolist()) == [*wanted, "</s>"]


def test_the_files_of_a_tokenizer_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    for name, text in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(text.encode(*FILE_TEXT))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    monkeypatch.setattr(
        tokenizer, "save_pretrained", lambda folder, **_: (Path(folder) / "spiece.model").write_bytes(b"\xff\r\n")
    )
    assert tokenizer_files(tokenizer)["spiece.model"].encode(*FILE_TEXT) == b"\xff\r\n"


@pytest.mark.parametrize("settings", [PLAIN, CHAT])
@pytest.mark.parametrize("bos", [True, False])
def test_plain_text_is_learnt_whole_after_the_token_that_starts_a_text(bos: bool, settings: Tokenisation) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATE
    found = tokens(PreferencePair("t", "", "the cat", None), tokenizer, settings)
    assert texts(found, tokenizer) == ["<s>" if bos else "</s>", "the cat</s>"]
