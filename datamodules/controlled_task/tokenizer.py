"""The word-level tokenizer of the controlled task, built in code.

A token is a word with the space before it, or a role tag with the two newlines before it, so that joining the
tokens gives back every text of the task exactly.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.controlled_task.vocabulary import ASSISTANT, HUMAN, WORDS

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer with all words of the task: 116 tokens; pad 0, bos 1, eos 2, unk 3.

    It adds no special tokens to a text; `tokenise_pairs` adds EOS to a response.
    """
    tokens = (PAD, BOS, EOS, UNKNOWN, HUMAN, ASSISTANT, *(f" {word}" for word in WORDS))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # Two newlines and a role, or a space and the text up to the next space or newline.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n[A-Z][a-z]+:| ?[^ \n]+"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
