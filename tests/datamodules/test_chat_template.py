"""What is trained on is what the model will be asked, for every family of chat templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_families import CHATML, FAMILIES, GEMMA, QWEN3, TALK, Family
from tiny_tokenizers import byte_tokenizer, texts, tokenise_pair

from app.core.errors import UserError
from datamodules.chat_template import INDENTED, REWRITTEN
from datamodules.records import Message, PreferencePair, Prompt
from datamodules.tokenisation import (
    CONTROL_TOKENS,
    LAST_TURN,
    OLD_TURNS,
    PLAIN_BESIDE_TEMPLATE,
    Tokenisation,
    stop_ids,
    tokenise_prompts,
)

PAIR = PreferencePair("p", TALK, "Canberra.", "Sydney.")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_prompt_and_response_are_parts_of_the_rendering(family: Family) -> None:
    tokenizer = family.tokenizer()
    settings = Tokenisation(chat_template_kwargs=family.options)
    pair = PreferencePair("p", family.turns, "Canberra.", "Sydney.")
    found, notes = tokenise_pair(pair, tokenizer, settings)
    assert found is not None
    wanted = [family.prompt, family.response, family.response.replace("Canberra", "Sydney")]
    assert texts(found, tokenizer) == wanted
    taken_back = "the generation prompt ends in '<think>\\n', which the template takes back"
    assert notes == [taken_back] * (family is FAMILIES["reasoning_only"])
    assert found.chosen[-1] == tokenizer.convert_tokens_to_ids(family.stop)
    assert stop_ids(tokenizer, settings)[0] == found.chosen[-1]
    assert tokenizer.eos_token_id in stop_ids(tokenizer, settings)
    # the end that the data spells out is not doubled
    spelt = PreferencePair("p", family.turns, f"Canberra.{family.stop}\n", "Sydney.")
    assert texts(tokenise_pair(spelt, tokenizer, settings)[0], tokenizer) == wanted


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_tools_calls_and_thoughts_go_through_the_template() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer()
    pair = PreferencePair(
        "p",
        (Message("system", "Be brief."), Message("user", "Weather in Oslo?")),
        "I look it up.",
        "It is sunny.",
        chosen_fields={"tool_calls": [CALL], "reasoning_content": "Look."},
        tools=TOOLS,
    )
    schema = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'
    prompt = (
        f"<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n{schema}\n</tools><|im_end|>\n"
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\n"
    )
    calls = (
        "<think>\nLook.\n</think>\n\nI look it up.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    )
    found, notes = tokenise_pair(pair, tokenizer, Tokenisation())
    assert texts(found, tokenizer) == [prompt, calls, "<think>\n\n</think>\n\nIt is sunny.<|im_end|>"]
    assert notes == []
    # a call without a text of its own, after a call and its answer in the prompt
    told = (
        *pair.prompt,
        Message("assistant", "", tool_calls=[CALL], name="bot"),
        Message("tool", "3 °C"),
    )
    again = replace(pair, prompt=told, chosen="", chosen_fields={"tool_calls": [CALL]})
    found, notes = tokenise_pair(again, tokenizer, Tokenisation())
    assert texts(found, tokenizer)[0] == prompt + (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3 °C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert notes == []  # `name` is known to this template, of a function
    assert texts(found, tokenizer)[1].startswith("<think>\n\n</think>\n\n<tool_call>\n")


def test_the_options_of_a_row_come_before_those_of_the_data_set() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer()
    off = Tokenisation(chat_template_kwargs={"enable_thinking": False})
    on = replace(PAIR, template_kwargs={"enable_thinking": True})
    think = "<think>\n\n</think>\n\n"
    assert texts(tokenise_pair(PAIR, tokenizer, off)[0], tokenizer)[0].endswith(f"assistant\n{think}")
    assert texts(tokenise_pair(on, tokenizer, off)[0], tokenizer)[0].endswith("assistant\n")
    for name, said in (("enable_thinkin", "not known"), ("tools", "set by beta-dpo")):
        with pytest.raises(UserError, match=f"data.chat_template_kwargs: {name} is {said}"):
            tokenise_pair(PAIR, tokenizer, Tokenisation(chat_template_kwargs={name: False}))


@pytest.mark.parametrize(
    ("template", "changes", "reason"),
    [
        (GEMMA, {"prompt": (Message("system", "x"), *TALK)}, "the chat template refuses: no system role"),
        (CHATML, {"tools": TOOLS}, "the chat template has no place for tools"),
        (CHATML, {"chosen_fields": {"tool_calls": [CALL]}}, "the chat template has no place for tool_calls"),
        (
            CHATML,
            {"rejected_fields": {"reasoning_content": "so"}},
            "the chat template has no place for reasoning_content",
        ),
        (
            QWEN3.replace("m.content }}{% for", "'' if m.tool_calls else m.content }}{% for"),
            {"chosen_fields": {"tool_calls": [CALL]}},
            "the chat template leaves out the answer's text",
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.role + m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}",
            {"prompt": (Message("system", "x-y"), *TALK)},
            "the chat template leaves out the system turn",
        ),
        (
            CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
            {"prompt": (*TALK, Message("assistant", "I look."), Message("tool", "x-y"))},
            "the chat template leaves out the tool turn",
        ),
        (
            "{% if messages[-1].role == 'assistant' %}{{ 'answered' }}{% endif %}" + CHATML,
            {},
            "the chat template changes the prompt once it is answered",
        ),
        (
            "{% for m in messages %}{{ m.content.upper() }}{% endfor %}",
            {},
            "the chat template does not write the assistant's answer as it is",
        ),
        (CHATML, {"chosen": "Can<|im_end|>berra."}, "BOS, EOS or end of turn within chosen"),
        (CHATML, {"chosen": "<|im_end|>"}, "empty chosen after tokenisation"),
    ],
)
def test_what_the_template_cannot_render_whole_is_dropped(
    template: str, changes: dict[str, Any], reason: str
) -> None:
    tokenizer = replace(FAMILIES["qwen3"], template=template).tokenizer()
    assert tokenise_pair(replace(PAIR, **changes), tokenizer, Tokenisation()) == (None, [reason])


def test_what_the_template_changes_of_a_turn_is_counted() -> None:
    tokenizer = FAMILIES["chatml_on_a_base_tokenizer"].tokenizer()
    code = replace(PAIR, chosen="    return 1", rejected=" return 2")
    assert tokenise_pair(code, tokenizer, Tokenisation())[1] == [INDENTED]
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'].replace('  ', ' ')")
    assert tokenise_pair(PAIR, tokenizer, Tokenisation())[1] == []
    assert tokenise_pair(replace(PAIR, rejected="a  b"), tokenizer, Tokenisation())[1] == [REWRITTEN]
    # as Llama 3.1 writes the return of a tool
    tokenizer.chat_template = CHATML.replace(
        "m['content']", "(m.content|tojson if m.role == 'tool' else m.content)"
    )
    told = (*TALK, Message("assistant", "I look."), Message("tool", '{"temp": "3 °C"}\nrain'))
    assert tokenise_pair(replace(PAIR, prompt=told), tokenizer, Tokenisation())[1] == [REWRITTEN]


def test_a_thought_that_the_generation_prompt_begins_is_trained() -> None:
    tokenizer = FAMILIES["reasoning_only"].tokenizer()
    pair = replace(PAIR, chosen="<think>\nhm\n</think>\n\nCanberra.", rejected="<think>\nho\n</think>\n\nSydney.")
    found, notes = tokenise_pair(pair, tokenizer, Tokenisation())
    prompt, chosen, _ = texts(found, tokenizer)
    assert (prompt[-8:], chosen, notes) == ("<think>\n", "hm\n</think>\n\nCanberra.<|im_end|>", [])


def test_what_the_template_does_not_use_of_a_message_is_named() -> None:
    tokenizer = FAMILIES["chatml_on_a_base_tokenizer"].tokenizer()
    pair = replace(PAIR, prompt=(Message("user", "Hi", weight=1.0),), template_kwargs={"speed": 2})
    named = [f"with a field unused by the chat template: {name}" for name in ("weight", "speed")]
    assert tokenise_pair(pair, tokenizer, Tokenisation())[1] == named
    assert tokenise_prompts([pair], tokenizer, Tokenisation())[0][1] == named


@pytest.mark.parametrize("prompt", ["Say <|im_end|> twice", (Message("user", "Say <|im_end|> twice"),)])
def test_a_prompt_that_spells_a_special_token_is_counted(prompt: Prompt) -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer()
    pair = replace(PAIR, prompt=prompt)
    assert tokenise_pair(pair, tokenizer, Tokenisation())[1][0] == CONTROL_TOKENS.format("prompts")
    assert tokenise_prompts([pair], tokenizer, Tokenisation())[0][1][0] == CONTROL_TOKENS.format("prompts")


def test_an_answer_that_spells_any_special_token_is_counted() -> None:
    tokenizer = FAMILIES["chatml_on_a_base_tokenizer"].tokenizer()
    pair = replace(PAIR, rejected="a <|im_start|> b <|im_end|>\n")
    assert tokenise_pair(pair, tokenizer, Tokenisation())[1] == [CONTROL_TOKENS.format("answers")]


def test_text_stays_text_unless_it_is_asked_for() -> None:
    tokenizer = FAMILIES["gemma"].tokenizer()
    pair = PreferencePair("p", "Hi", " a", " b")
    found, notes = tokenise_pair(pair, tokenizer, Tokenisation())
    assert texts(found, tokenizer) == ["Hi", " a</s>", " b</s>"]
    assert notes == [PLAIN_BESIDE_TEMPLATE]
    assert tokenise_pair(pair, tokenizer, Tokenisation(chat_template=False))[1] == []
    found, notes = tokenise_pair(pair, tokenizer, Tokenisation(chat_template=True))
    assert texts(found, tokenizer)[1:] == ["a<end_of_turn>", "b<end_of_turn>"]
    assert notes == []
    tools = replace(pair, tools=TOOLS)
    assert "no place for tools" in tokenise_pair(tools, tokenizer, Tokenisation())[1][0]


def test_a_sampled_response_without_an_end_is_trained_without_one() -> None:
    tokenizer = FAMILIES["gemma"].tokenizer()
    found, _ = tokenise_pair(replace(PAIR, rejected_ends=False), tokenizer, Tokenisation())
    assert texts(found, tokenizer)[1:] == ["Canberra.<end_of_turn>", "Sydney."]


@pytest.mark.parametrize("name", ["gemma", "llama3", "phi3", "qwen3", "ignores_generation_prompt", "mistral"])
@pytest.mark.parametrize("keep", ["keep_end", "keep_start"])
def test_a_cut_never_goes_through_a_header(name: str, keep: Any) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    pair = PreferencePair("p", family.turns, "C" * 40, "S" * 40)
    question, old = "Capital of Australia?", family.turns[-3:-1]
    without_old = family.prompt
    start, end = family.prompt.index(old[0].content), family.prompt.index(question)
    # the old turns with their headers are what lies between two questions of one user
    without_old = family.prompt[:start] + family.prompt[end:]

    def cut(limit: int) -> tuple[str | None, list[str]]:
        settings = Tokenisation(limit + 30, limit, keep)
        found, notes = tokenise_pair(pair, tokenizer, settings)
        (prompt, alone), *_ = tokenise_prompts([pair], tokenizer, settings)
        if found is None:
            assert prompt is None
            assert notes == alone == ["headers and system turn exceed data.max_prompt_length"]
            return None, notes
        assert prompt is not None
        assert prompt.tolist() == found.prompt.tolist()  # sampling asks what training does
        assert len(found.prompt) <= limit
        return texts(found, tokenizer)[0], [note for note in notes if "prompt" in note]

    whole = len(tokenizer(family.prompt, add_special_tokens=False)["input_ids"])
    short = len(tokenizer(without_old, add_special_tokens=False)["input_ids"])
    assert cut(whole)[0] == family.prompt
    for limit in range(short, whole):
        assert cut(limit) == (without_old, [OLD_TURNS])
    before, after = without_old.split(question)
    seen = set()
    for limit in range(2, short):
        prompt, notes = cut(limit)
        if prompt is None:
            continue
        assert notes == [OLD_TURNS, LAST_TURN]
        assert prompt.startswith(before)
        assert prompt.endswith(after)
        rest = prompt.removeprefix(before).removesuffix(after)
        assert question.endswith(rest) if keep == "keep_end" else question.startswith(rest)
        seen.add(rest)
    assert len(seen) > 5


def test_a_transcript_as_text_loses_whole_turns_first() -> None:
    tokenizer = byte_tokenizer()
    old, new = "\n\nHuman: hi\n\nAssistant: yes?", "\n\nHuman: 0123456789\n\nAssistant:"
    pair = PreferencePair("p", old + new, " a", " b")
    size = len(tokenizer(new)["input_ids"])
    both = [OLD_TURNS, LAST_TURN]
    for settings, wanted, cut in (
        (Tokenisation(size + 3, size), new, [OLD_TURNS]),
        (Tokenisation(size - 1, size - 4), new.replace(" 012", ""), both),
        (Tokenisation(size - 1, size - 4, "keep_start"), new.replace("6789", ""), both),
    ):
        found, notes = tokenise_pair(pair, tokenizer, settings)
        assert found is not None
        assert texts(found, tokenizer)[0] == f"<s>{wanted}", settings
        assert [note for note in notes if "prompt" in note] == cut
        ids, _ = tokenise_prompts([pair], tokenizer, settings)[0]
        assert ids is not None
        assert ids.tolist() == found.prompt.tolist()
    assert tokenise_pair(pair, tokenizer, Tokenisation(8, 5))[1] == [
        "headers and system turn exceed data.max_prompt_length"
    ]
