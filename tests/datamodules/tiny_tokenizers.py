"""Small real tokenizers, built on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.records import PreferencePair, TokenisedPair
from datamodules.tokenisation import Tokenisation, tokenise_pairs

TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<s>' }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_TEXTS = ["the cat sat on the mat", "\n\nHuman: hello there\n\nAssistant: a good day to you"]


def byte_tokenizer(
    bos: bool = True, eos: bool = True, add_eos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, lossless on any text, whose pad token is its EOS. It knows no digits beyond single ones.

    `bos`: it puts `<s>` before a text of its own accord; `add_eos`: and `</s>` behind it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    if bos or add_eos:
        form = ("<s> " if bos else "") + "$A" + (" </s>" if add_eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    names = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>", "pad_token": "</s>"} if eos else {})
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """The letters a and b only: any other character gives no token at all."""
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2}, []))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def tokenise_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, settings: Tokenisation
) -> tuple[TokenisedPair | None, list[str]]:
    """Return the tokens of one pair; see `tokenise_pairs`."""
    return tokenise_pairs([pair], tokenizer, settings)[0]


def texts(found: TokenisedPair | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each part of a pair."""
    assert found is not None
    parts = [ids.tolist() for ids in found if ids is not None]
    return tokenizer.batch_decode(parts, clean_up_tokenization_spaces=False)
