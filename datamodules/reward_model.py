"""A reward model from Hugging Face (a sequence classifier), for scoring data and for judging answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.core.errors import UserError
from datamodules.records import Prompt
from datamodules.sources.prompts import prompt_messages

log = logging.getLogger(__name__)

UNLIMITED = 10**9  # a tokenizer without a limit reports a far larger number


class RewardModel:
    """A reward model r(y; x): a sequence classifier with one output, run in float32 without dropout.

    The tokenizer's chat template joins prompt and response; a tokenizer without one encodes them as a pair of
    texts. A text longer than the model's limit is cut at the front; `truncated` and the log count these texts.

    Args:
        name: folder or Hub id of a model with a single output.
        batch_size: texts per forward pass; 1 if the tokenizer has no padding token or pads with its end of text.
        device: device of the model; None uses CUDA if it is available.
        max_length: a limit in tokens below the model's own.

    Raises UserError when the model cannot be loaded, has several outputs, or has no trained classifier.
    """

    def __init__(self, name: str, batch_size: int = 32, device: str | None = None, max_length: int | None = None):
        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, truncation_side="left")
            model, missing = AutoModelForSequenceClassification.from_pretrained(
                name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"There is no reward model at {name!r}: {str(error).splitlines()[0]}") from error
        if model.config.num_labels != 1 or missing["missing_keys"]:
            raise UserError(f"{name} is no reward model: it needs a trained classifier with exactly one output.")
        self.model = model.eval().to(self.device)
        # a decoder's classifier reads its output at the last token that is not padding
        pad = self.tokenizer.pad_token_id
        self.batch_size = 1 if pad is None or pad == self.tokenizer.eos_token_id else batch_size
        model.config.pad_token_id = None if self.batch_size == 1 else pad
        positions = getattr(model.config, "max_position_embeddings", UNLIMITED)
        self.limit = min(self.tokenizer.model_max_length, positions, max_length or UNLIMITED)
        self.truncated = 0

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Iterator[float]:
        """Yield the reward of each response to its prompt, in order, as soon as its batch is done."""
        texts = zip(prompts, responses, strict=True)
        while batch := list(islice(texts, self.batch_size)):
            yield from self.batch_rewards(batch)
        if self.truncated:
            log.warning("%s: %d texts cut to their last %d tokens", self.name, self.truncated, self.limit)

    @torch.no_grad()
    def batch_rewards(self, texts: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Return the rewards of at most `batch_size` prompts and responses, in one forward pass."""
        encoded = [self._encode(prompt, response) for prompt, response in texts]
        inputs: Any
        if len(encoded) == 1:
            inputs = {name: torch.tensor([column]) for name, column in encoded[0].items()}
        else:
            inputs = dict(self.tokenizer.pad(encoded, return_tensors="pt", padding_side="right"))
        logits = self.model(**{name: column.to(self.device) for name, column in inputs.items()}).logits
        return logits[:, 0].double().tolist()

    def _encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        if self.tokenizer.chat_template:
            text = self._chat(prompt, response)
            arguments: tuple[Any, ...] = (text,)
            options: dict[str, Any] = {"add_special_tokens": False}  # the template has added them
        elif isinstance(prompt, str):
            arguments, options = (prompt, response), {}
        else:
            raise UserError(f"{self.name} has no chat template: it cannot score prompts in chat messages.")
        whole = self.tokenizer(*arguments, **options, verbose=False)
        if len(whole["input_ids"]) <= self.limit:
            return dict(whole)
        self.truncated += 1
        cut = "only_first" if len(arguments) == 2 else True
        return dict(self.tokenizer(*arguments, **options, truncation=cut, max_length=self.limit))

    def takes(self, prompt: Prompt) -> bool:
        """Return whether the chat template accepts the prompt; True without a template."""
        try:
            return not self.tokenizer.chat_template or bool(self._chat(prompt, "yes"))
        except UserError:
            return False

    def _chat(self, prompt: Prompt, response: str) -> str:
        try:
            turns = [dict(message) for message in prompt_messages(prompt)]
            turns.append({"role": "assistant", "content": response.strip()})
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except (ValueError, TemplateError) as error:
            raise UserError(
                f"{self.name} takes dialogues, and a prompt is none ({error}): leave it out."
            ) from error
