"""Sampling of responses in batches, by a model in this process or through a server with OpenAI's API."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig

from app.core.errors import UserError, renamed
from app.core.samples import as_sample, sample
from app.judges import Answer
from app.judges.endpoint import Client, SamplingServer, first_choice
from datamodules.batches import pack
from datamodules.records import PreferencePair, TokenisedPair
from datamodules.sources.messages import prompt_messages
from datamodules.tokenisation import Tokenisation, read_tokenizer, stop_ids, tokenise_prompts
from lightning_modules.pretrained import load_model, model_identity
from lightning_modules.refused_models import check_tokens, refuse_beyond
from lightning_modules.scorer import ResponseScorer


class Batch(NamedTuple):
    """The prompts of one call, each with the number of its sample, from 0; `number` is that of the batch."""

    number: int
    temperature: float
    items: Sequence[tuple[PreferencePair, int]]


class LocalSampler:
    """A sampler with the model in this process, on CUDA if available, and a reference that scores its samples."""

    def __init__(
        self, model: str, reference: str | None, settings: Tokenisation, seed: int, sampling: dict[str, Any]
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.models: list[tuple[str, Any]] = []
        for option, name in {"model": model, "reference": reference}.items():
            if name is not None:
                with renamed({"model.name": option}):
                    self.models.append((name, load_model(name).eval().to(self.device)))
        self.model = self.models[0][1]
        self.tokenizer = read_tokenizer(model, "model")
        if reference is not None:
            check_tokens(reference, self.tokenizer, False, option="reference", tokenizer="model")
        self.settings = settings
        self.sampling = sampling
        self.stops = stop_ids(self.tokenizer, settings, self.model.generation_config.eos_token_id)
        # its own temperature, nucleus and penalties would change what is asked for here
        self.model.generation_config = GenerationConfig()
        self.job: dict[str, Any] = {
            "models": [model_identity(name, loaded.config) for name, loaded in self.models],
            "stops": self.stops,
            "device": self.device.type,  # another kind of device draws other numbers
        }
        self._prompts: dict[str, np.ndarray] = {}  # tokens by id
        torch.manual_seed(seed)

    def read(self, items: Sequence[PreferencePair], prompts: str) -> str:
        """Tokenise the prompts, print what was cut, and return a hash of them. Raises UserError."""
        tokens = tokenise_prompts(items, self.tokenizer, self.settings)
        # `generate` has the options of the data that notes name, without the prefix
        found = [(ids, [note.replace("data.", "") for note in notes]) for ids, notes in tokens]
        if lost := Counter(notes[0] for ids, notes in found if ids is None):
            reasons = "; ".join(f"{count}: {reason}" for reason, count in lost.items())
            raise UserError(f"{lost.total()} prompts of {prompts} cannot be tokenised ({reasons}): take them out.")
        for note, count in Counter(note for _, notes in found for note in notes).items():
            limit = f" to {self.settings.max_prompt_length} tokens (max_prompt_length)" if "trunc" in note else ""
            print(f"{prompts}: {count} {note}{limit}")
        encoded = {item.pair_id: ids for item, (ids, _) in zip(items, found, strict=True) if ids is not None}
        longest = max(map(len, encoded.values())) + self.sampling["max_new_tokens"]
        largest = max(int(ids.max()) for ids in encoded.values())
        for name, loaded in self.models:
            refuse_beyond(
                loaded, longest, largest, f"The tokenizer of {name}", "max_prompt_length + max_new_tokens"
            )
        self._prompts = encoded
        return hashed([[name, ids.tolist()] for name, ids in encoded.items()])

    def answers(self, batch: Batch) -> list[Answer | str]:
        """Return the samples of a batch."""
        prompts = [self._prompts[item.pair_id] for item, _ in batch.items]
        warm = {"temperature": batch.temperature, "top_k": 0} if batch.temperature > 0 else {"top_p": None}
        sampling = {**self.sampling, "do_sample": batch.temperature > 0, **warm}
        responses = sample(self.model, prompts, self.stops, sampling)
        logps = zip(*(score(model, prompts, responses) for _, model in self.models), strict=True)
        found: list[Answer | str] = []
        for prompt, response, of_models in zip(prompts, responses, logps, strict=True):
            scores = dict(zip(("logp", "reference_logp"), of_models, strict=False))
            found.append(as_sample(self.tokenizer, prompt, response, self.stops) | scores)
        return found


class ServedSampler:
    """A sampler that asks a server: chats by its chat completions, plain text by its completions."""

    device = None  # the server's

    def __init__(
        self, model: str, settings: SamplingServer, template: Tokenisation, seed: int, sampling: dict[str, Any]
    ) -> None:
        self.client = Client(settings)
        self.chat = template.chat_template is True
        self.seed = seed
        wanted = {"chat_template_kwargs": template.chat_template_kwargs, "return_token_ids": settings.token_ids}
        more = {name: value for name, value in wanted.items() if value}
        self.options: dict[str, Any] = {"model": model, "extra_body": more}
        if sampling["top_p"] < 1:
            self.options["top_p"] = sampling["top_p"]
        self.max_tokens = sampling["max_new_tokens"]
        self.job: dict[str, Any] = {"models": [settings.url, model], "chat": self.chat, "more": more}
        self._turns: dict[str, list[dict[str, Any]]] = {}  # of the prompts that are asked as chats

    def read(self, items: Sequence[PreferencePair], prompts: str) -> str:
        """Return a hash of the prompts' ids and texts. Raises UserError for one that the server cannot be asked."""
        for item in items:
            if item.tools or item.template_kwargs:
                raise UserError(f"{prompts}: tools and template options of {item.pair_id} need a local model.")
            if not self.chat and isinstance(item.prompt, str):
                continue
            try:
                self._turns[item.pair_id] = [dict(turn) for turn in prompt_messages(item.prompt)]
            except ValueError as error:
                raise UserError(f"{prompts}: {item.pair_id} is no dialogue ({error}): take it out.") from error
        return hashed([[item.pair_id, item.prompt] for item in items])

    def answers(self, batch: Batch) -> list[Answer | str]:
        """Return the samples of a batch, or the reasons why the server refused to give one."""
        found: dict[int, Answer | str] = {}

        def ask(client: Any, place: int) -> None:
            item, copy = batch.items[place]
            # a seed of its own, so that a resumed run asks what an uninterrupted one would
            own = hashed([[self.seed, item.pair_id, copy, batch.temperature, len(item.prompt)]])
            options = {**self.options, "temperature": batch.temperature, "seed": int(own[:7], 16)}
            if turns := self._turns.get(item.pair_id):
                options["max_completion_tokens"] = self.max_tokens
                reply = client.chat.completions.create(messages=turns, **options)
            else:
                reply = client.completions.create(prompt=item.prompt, max_tokens=self.max_tokens, **options)
            found[place] = served(reply)

        kept = "the same command continues after the last finished batch."
        found |= self.client.ask_all(range(len(batch.items)), ask, lambda: kept)
        return [found[place] for place in range(len(batch.items))]


Sampler = LocalSampler | ServedSampler


def served(reply: Any) -> Answer | str:
    """Return the sample in a server's reply, or the reason why it holds none."""
    (choice, text), usage = first_choice(reply), reply.usage
    if choice.finish_reason not in ("stop", "length"):
        return f"it ended by {choice.finish_reason}"
    answer = {"response": text, "finished": choice.finish_reason == "stop"}
    if usage is not None:
        answer["tokens"] = usage.completion_tokens
    # vLLM gives the prompt's tokens with the choice (completions) or with the reply (chat)
    prompt = getattr(choice, "prompt_token_ids", None) or getattr(reply, "prompt_token_ids", None)
    if prompt and getattr(choice, "token_ids", None):
        answer |= {"prompt_ids": list(prompt), "response_ids": list(choice.token_ids)}
    return answer


def hashed(rows: list[Any]) -> str:
    """Return a hash of rows in JSON."""
    return hashlib.blake2b("".join(map(json.dumps, rows)).encode(), digest_size=16).hexdigest()


@torch.no_grad()
def score(model: Any, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[float]:
    """Return log π(y|x) of every response, EOS included, at temperature 1."""
    scorer = ResponseScorer(model)
    pairs = [TokenisedPair(prompt, response, None) for prompt, response in zip(prompts, responses, strict=True)]
    budget = len(pairs) * max(len(pair.prompt) + len(pair.chosen) for pair in pairs)
    logps = torch.zeros(len(pairs), dtype=torch.float64)
    for rows in pack(pairs, range(len(pairs)), ("chosen",), "separate", budget, scorer.balanced_row):
        logps[rows.pairs] = scorer(rows.to(model.device)).cpu()
    return logps.tolist()


def generator_state(device: torch.device | None) -> str:
    """Return as text the state of the random generator that sampling on `device` uses; empty without a device."""
    if device is None:
        return ""
    source: Any = torch.cuda if device.type == "cuda" else torch
    return base64.b64encode(source.get_rng_state().numpy().tobytes()).decode()


def restore_generator(state: str, device: torch.device | None) -> None:
    """Set the random generator of `device` to `state`, as `generator_state` returned it."""
    if device is not None:
        source: Any = torch.cuda if device.type == "cuda" else torch
        source.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))
