"""The inputs that all contestants of a benchmark share: a random model, and the same pairs in the same order."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from datamodules.records import TokenisedPair
from datamodules.sources.pairs import read_pairs
from datamodules.table import cached_table
from datamodules.tokenisation import Tokenisation
from lightning_modules.measuring import step_operations

BETA = 0.1
LEARNING_RATE = 1e-6
MAX_LENGTH = 512
TOKENISATION = Tokenisation(max_length=MAX_LENGTH)
SYNTHETIC = "synthetic"
# mean and most tokens of random texts, the means those of Anthropic-HH; tokenisation adds an end to each response
LENGTHS = {"prompt": (125, 256), "chosen": (39, 200), "rejected": (49, 200)}
SPREAD = 0.75  # standard deviation of the logarithm of these lengths
SPLIT_BATCHES = 3  # factor of the batch size in the contestants with several micro-batches


@dataclass(frozen=True)
class Setting:
    """The settings of one benchmark: the shape of a Llama, the data, and the number of steps.

    data: preference pairs as for `data.path`, or `synthetic`: random words with the `LENGTHS` of Anthropic-HH.
    tokenizer: folder of a tokenizer; not used for synthetic data, which has its own of `vocabulary` words.
    """

    hidden: int = 384
    layers: int = 8
    vocabulary: int = 49152
    data: str = SYNTHETIC
    tokenizer: str = "models/smollm2"
    batch_size: int = 8
    steps: int = 6  # measured steps, after one warm-up step
    micro_batch_tokens: int = 8192
    device: str = "cpu"  # float32; on `cuda` bf16 autocast over float32 weights
    model: str = ""  # folder that `prepare` fills with the model and the data

    @property
    def pairs(self) -> int:
        """Return the number of pairs that is enough for every contestant."""
        return SPLIT_BATCHES * self.batch_size * (self.steps + 1)


def prepare(setting: Setting, folder: str) -> Setting:
    """Save the model and the pairs in `folder`, and return the setting that points to them."""
    if setting.data == SYNTHETIC:
        tokenizer: Any = word_tokenizer(setting.vocabulary)
        rows = synthetic_pairs(setting)
    else:
        tokenizer = AutoTokenizer.from_pretrained(setting.tokenizer)
        rows = first_pairs(setting, tokenizer)
    path = Path(folder) / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | {"place": place}) + "\n" for place, row in enumerate(rows)))
    sizes = {"hidden_size": setting.hidden, "num_hidden_layers": setting.layers, "tie_word_embeddings": True}
    vocabulary = max(len(tokenizer), setting.vocabulary)
    save_llama(folder, tokenizer, vocab_size=vocabulary, num_attention_heads=setting.hidden // 64, **sizes)
    return replace(setting, model=folder, data=str(path))


def save_llama(folder: str | Path, tokenizer: Any, scale: float = 1.0, **sizes: Any) -> None:
    """Save a random Llama (seed 0) and its tokenizer; `scale` multiplies the matrices."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    usual = {"vocab_size": len(tokenizer), "intermediate_size": 4 * sizes["hidden_size"], **special}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(usual | sizes)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word `w2`, `w3`, …, and tokens for end and padding."""
    words = {"<eos>": 0, "<pad>": 1, **{f"w{number}": number for number in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def synthetic_pairs(setting: Setting) -> list[dict[str, str]]:
    """Return pairs of random words with log-normal lengths."""
    random = np.random.default_rng(0)

    def text(mean: float, most: int) -> str:
        length = round(random.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD))
        return " ".join(f"w{word}" for word in random.integers(2, setting.vocabulary, min(max(length, 2), most)))

    return [{side: text(*lengths) for side, lengths in LENGTHS.items()} for _ in range(setting.pairs)]


def first_pairs(setting: Setting, tokenizer: Any) -> list[dict[str, str]]:
    """Return the first pairs of the data, truncated and decoded to text."""
    table = cached_table(read_pairs(setting.data, "skip", need_rejected=True), tokenizer, TOKENISATION)
    if len(table) < setting.pairs:
        raise SystemExit(f"{setting.data} holds {len(table)} pairs, but {setting.pairs} are needed: lower --steps.")
    return [decoded(table[index], tokenizer) for index in range(setting.pairs)]


def decoded(pair: TokenisedPair, tokenizer: Any) -> dict[str, str]:
    return {side: str(tokenizer.decode(ids, skip_special_tokens=True)) for side, ids in pair._asdict().items()}


def pairs_of(setting: Setting) -> list[TokenisedPair]:
    """Return the pairs of all steps in order."""
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    table = cached_table(read_pairs(setting.data, "error", need_rejected=True), tokenizer, TOKENISATION)
    return [table[index] for index in range(setting.batch_size * (setting.steps + 1))]


def unavoidable_operations(setting: Setting) -> float:
    """Return the FLOPs that DPO with an online reference needs at least for the measured steps.

    Unique tokens pass the matrices of the layers and response tokens the head: once for the reference, three times
    (forward, and backward twice) for the policy. Attention and element-wise operations are not counted.
    """
    pairs = pairs_of(setting)[setting.batch_size :]
    tokens = sum(len(part) for pair in pairs for part in pair if part is not None)
    responses = tokens - sum(len(pair.prompt) for pair in pairs)
    model = AutoModelForCausalLM.from_pretrained(setting.model)
    return step_operations(model, model, tokens, responses, kept_fraction=1.0)
