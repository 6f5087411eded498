"""Chat templates in the form of the published families, and by hand what each must give for one conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tiny_tokenizers import byte_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from datamodules.records import Message

TALK = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Capital of Australia?"))
SYSTEM = (Message("system", "Be brief."), *TALK)


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its tokenizer, and the text that is trained for the answer "Canberra."."""

    template: str
    special: tuple[str, ...]
    prompt: str
    response: str
    stop: str  # the token that ends the turn
    turns: tuple[Message, ...] = TALK
    bos: str = "<s>"
    eos: str = "</s>"
    plain_tokens: tuple[str, ...] = ()  # added to the vocabulary, but not special
    options: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = byte_tokenizer(bos=False)
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.plain_tokens])
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = self.bos, self.eos, self.template
        return tokenizer


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_PROMPT = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    "<|im_start|>user\nCapital of Australia?<|im_end|>\n<|im_start|>assistant\n"
)
IM = ("<|im_start|>", "<|im_end|>")
GEMMA_SPECIAL = ("<start_of_turn>", "<end_of_turn>")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role']=='assistant' else m['role']) + '\n' + "
    "m['content']|trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_PROMPT = (
    "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
    "<start_of_turn>user\nCapital of Australia?<end_of_turn>\n<start_of_turn>model\n"
)
EMPTY_THINK = "<think>\n\n</think>\n\n"
THINK_BEFORE_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role']=='assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' }}"
    "{{ tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
THINK_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set text = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set text = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + text "
    "+ '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: {date}\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nCapital of Australia?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

FAMILIES = {
    "gemma": Family(GEMMA, GEMMA_SPECIAL, GEMMA_PROMPT, "Canberra.<end_of_turn>", "<end_of_turn>"),
    "end_of_turn_not_special": Family(
        GEMMA, (), GEMMA_PROMPT, "Canberra.<end_of_turn>", "<end_of_turn>", plain_tokens=GEMMA_SPECIAL
    ),
    "chatml_on_a_base_tokenizer": Family(CHATML, IM, CHATML_PROMPT, "Canberra.<|im_end|>", "<|im_end|>"),
    # the marks are no tokens: they are trained as text, and EOS ends the turn
    "chatml_without_its_tokens": Family(CHATML, (), CHATML_PROMPT, "Canberra.<|im_end|></s>", "</s>"),
    "ignores_generation_prompt": Family(
        CHATML.split("{% if add")[0], IM, CHATML_PROMPT, "Canberra.<|im_end|>", "<|im_end|>", eos="<|im_end|>"
    ),
    "ignores_it_and_ends_with_eos": Family(
        CHATML.split("{% if add")[0] + "{{ eos_token }}", IM, CHATML_PROMPT, "Canberra.<|im_end|>", "<|im_end|>"
    ),
    "writes_before_the_last_answer": Family(
        THINK_BEFORE_LAST,
        IM,
        CHATML_PROMPT,
        f"{EMPTY_THINK}Canberra.<|im_end|>",
        "<|im_end|>",
        eos="<|im_end|>",
        plain_tokens=THINK_TOKENS,
    ),
    "the_same_without_thinking": Family(
        THINK_BEFORE_LAST,
        IM,
        CHATML_PROMPT + EMPTY_THINK,
        "Canberra.<|im_end|>",
        "<|im_end|>",
        eos="<|im_end|>",
        plain_tokens=THINK_TOKENS,
        options={"enable_thinking": False},
    ),
    "qwen3": Family(
        QWEN3,
        (*IM, "<|endoftext|>"),
        CHATML_PROMPT,
        f"{EMPTY_THINK}Canberra.<|im_end|>",
        "<|im_end|>",
        eos="<|im_end|>",
        plain_tokens=THINK_TOKENS,
    ),
    # a generation prompt that opens a thought which an answer without one does not have
    "reasoning_only": Family(
        CHATML.replace("assistant\n'", "assistant\n<think>\n'"),
        IM,
        CHATML_PROMPT,
        "Canberra.<|im_end|>",
        "<|im_end|>",
        plain_tokens=THINK_TOKENS,
    ),
    "llama3": Family(
        LLAMA3,
        LLAMA3_SPECIAL,
        LLAMA3_PROMPT.format(date="26 Jul 2024"),
        "Canberra.<|eot_id|>",
        "<|eot_id|>",
        turns=SYSTEM,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    ),
    "llama3_on_a_date": Family(
        LLAMA3,
        LLAMA3_SPECIAL,
        LLAMA3_PROMPT.format(date="1 May 2025"),
        "Canberra.<|eot_id|>",
        "<|eot_id|>",
        turns=SYSTEM,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        options={"date_string": "1 May 2025"},
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        "<s>[INST] Hi [/INST] Yes?</s>[INST] Capital of Australia? [/INST]",
        " Canberra.</s>",
        "</s>",
    ),
    "phi3": Family(  # EOS follows the end of turn wherever no generation prompt does
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes?<|end|>\n"
        "<|user|>\nCapital of Australia?<|end|>\n<|assistant|>\n",
        "Canberra.<|end|>",
        "<|end|>",
        turns=SYSTEM,
        eos="<|endoftext|>",
    ),
    "vicuna": Family(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        (),
        "USER: Hi ASSISTANT: Yes?</s>USER: Capital of Australia? ASSISTANT:",
        " Canberra.</s>",
        "</s>",
    ),
    "nothing_ends_a_turn": Family(
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
        (),
        "### user:\nHi\n### assistant:\nYes?\n### user:\nCapital of Australia?\n### assistant:\n",
        "Canberra.</s>",
        "</s>",
    ),
}
