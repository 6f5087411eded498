"""Rewards of a reward model: for judging answers, and as labels, scored once per machine in resumable parts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from app.core.cache import cached, fingerprint
from app.core.errors import UserError, refused
from app.core.files import Parts, atomic_file, folder_hash, refuse_absent
from app.method.ranges import PositiveInt, checked
from datamodules.records import PreferencePair, Prompt
from datamodules.sources.messages import prompt_messages
from datamodules.sources.pairs import PairStream
from datamodules.table import PairTable, progress_bar, read_rows, record_batch, write_rows

log = logging.getLogger(__name__)

REWARDS_VERSION = 3  # raise when scoring or the layout below changes
COLUMNS = ("chosen_reward", "rejected_reward")
_FILES = ("rewards.arrow", "rewards.json")
_PAIRS_PER_PART = 256
_SCHEMA = pa.schema([("pair_id", pa.string()), *((name, pa.float64()) for name in COLUMNS)])
Rewards = tuple[float | None, float | None]  # of the chosen and the rejected response
UNLIMITED = 10**9  # a tokenizer without a limit reports a far larger number


@checked
@dataclass(frozen=True)
class RewardScoring:
    """The reward model that scores the pairs that are trained on (`data.reward_model`).

    Args:
        name: folder or Hub id of a sequence classifier with one output. It reads prompt and response in its
            tokenizer's chat template, or as a pair of texts if there is none.
        batch_size: texts per forward pass.
        max_length: most tokens of a text; longer ones are cut at the front and counted. Default: the model's limit.
    """

    name: str
    batch_size: PositiveInt = 32
    max_length: PositiveInt | None = None

    def fingerprint(self) -> dict[str, object]:
        """Return the model's part of the cache key: a folder's content hash or a Hub commit, and `max_length`."""
        if Path(self.name).is_dir():
            return {"model": folder_hash(self.name), "max_length": self.max_length}
        refuse_absent("data.reward_model.name", "reward model", self.name)
        with refused(f"data.reward_model.name: no reward model at {self.name!r}"):
            commit = AutoConfig.from_pretrained(self.name, trust_remote_code=False)._commit_hash
        return {"model": [self.name, commit], "max_length": self.max_length}


def reward_scores(stream: PairStream, scoring: RewardScoring, device: torch.device) -> pa.Table:
    """Return the rewards of all pairs of `stream`, from the cache if they are there: `pair_id` and `COLUMNS`.

    A pair with a tool call, or a prompt that the model's chat template refuses, has null rewards. Raises UserError.
    """
    job = {"version": REWARDS_VERSION, "data": stream.description(), **scoring.fingerprint()}

    def build(folder: Path) -> None:
        parts = Parts(folder.with_suffix(".parts"), job)
        done = len(parts)
        log.info("scoring %s with %s%s", stream.name, scoring.name, f", from part {done} on" if done else "")
        model = RewardModel(scoring.name, scoring.batch_size, str(device), scoring.max_length)
        pairs = iter(stream)
        scored = sum(1 for _ in islice(pairs, done * _PAIRS_PER_PART))
        with progress_bar("scoring", scored) as progress:
            while batch := list(islice(pairs, _PAIRS_PER_PART)):
                rows = [(pair.pair_id, *both) for pair, both in zip(batch, _rewards(model, batch), strict=True)]
                with atomic_file(parts.path(done)) as temporary:
                    temporary.write_text(json.dumps(rows), encoding="utf-8")
                done += 1
                progress.update(len(batch))
        model.tell_truncated()
        batches = (record_batch(json.loads(path.read_text(encoding="utf-8")), _SCHEMA) for path in parts)
        write_rows(folder, _FILES, _SCHEMA, batches, {})
        parts.remove()

    return cached("rewards", fingerprint(job), lambda folder: read_rows(folder, _FILES, _SCHEMA)[0], build)


def _rewards(model: RewardModel, pairs: Sequence[PreferencePair]) -> list[Rewards]:
    """Return the rewards of each pair, none for a tool call."""
    texts: dict[tuple[int, int], tuple[Prompt, str]] = {}  # by the number of the pair, and that of the side
    for number, pair in enumerate(pairs):
        if "tool_calls" not in {**pair.chosen_fields, **pair.rejected_fields} and model.takes(pair.prompt):
            texts |= {(number, 0): (pair.prompt, pair.chosen), (number, 1): (pair.prompt, pair.rejected or "")}
    # texts of similar length need little padding
    order = sorted(texts, key=lambda place: (len(str(texts[place])), place))
    rewards = model.rewards([texts[place][0] for place in order], [texts[place][1] for place in order])
    found = dict(zip(order, rewards, strict=True))
    return [(found.get((number, 0)), found.get((number, 1))) for number in range(len(pairs))]


def with_rewards(table: PairTable, rewards: pa.Table) -> PairTable:
    """Return the table of one source with the rewards of `reward_scores`, in any order, as labels."""
    places = pc.index_in(table.columns.column("pair_id"), value_set=rewards.column("pair_id").combine_chunks())
    if places.null_count:
        raise ValueError(f"{places.null_count} pairs were not scored")
    return table.with_labels(**{name: rewards.column(name).take(places) for name in COLUMNS})


def rows_with_reward(table: PairTable, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return those `rows` that have rewards, and a note if others are left out. UserError if none remains."""
    kept = rows[table.columns.column(COLUMNS[0]).is_valid().to_numpy()[rows]]
    if len(rows) and not len(kept):
        raise UserError(
            "data.reward_model: its chat template refuses the prompts of all pairs, or their answers call tools: "
            "take another reward model."
        )
    why = "its chat template refuses their prompts, or their answers call tools"
    left_out = len(rows) - len(kept)
    return kept, [f"data.reward_model: {left_out} of {len(rows)} pairs are left out: {why}"] * bool(left_out)


class RewardModel:
    """A reward model r(y; x): a sequence classifier with one output, run in float32 without dropout.

    The arguments are those of `RewardScoring`. If its tokenizer has no padding token, texts are scored one by one.
    Raises UserError when the model cannot be loaded or is no trained classifier with one output.
    """

    def __init__(self, name: str, batch_size: int = 32, device: str | None = None, max_length: int | None = None):
        self.name = name
        if Path(name, "adapter_config.json").is_file():
            raise UserError(f"{name} holds adapters: merge them into their model by peft's merge_and_unload.")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        refuse_absent("--model", "reward model", name)
        with refused(f"There is no reward model at {name!r}"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False, truncation_side="left"
            )
            model, missing = AutoModelForSequenceClassification.from_pretrained(
                name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
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
        """Yield the reward of each response as soon as its batch is done. Raises UserError unless it is finite."""
        texts = zip(prompts, responses, strict=True)
        while batch := list(islice(texts, self.batch_size)):
            encoded = [self._encode(prompt, response) for prompt, response in batch]
            inputs: Any
            if len(encoded) == 1:
                inputs = {name: torch.tensor([column]) for name, column in encoded[0].items()}
            else:
                inputs = self.tokenizer.pad(encoded, return_tensors="pt", padding_side="right")
            with torch.no_grad():
                logits = self.model(**{name: column.to(self.device) for name, column in inputs.items()}).logits
            for reward, (prompt, _) in zip(logits[:, 0].double().tolist(), batch, strict=True):
                if not math.isfinite(reward):
                    raise UserError(
                        f"{self.name} gives an answer to the prompt {str(prompt)[:60]!r} the reward {reward}: "
                        "leave that prompt out, or take another model."
                    )
                yield reward

    def tell_truncated(self) -> None:
        if self.truncated:
            log.warning("%s: %d texts cut to their last %d tokens", self.name, self.truncated, self.limit)

    def _encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        """Return the ids of prompt and response; a text longer than the limit is cut at the front and counted."""
        if self.tokenizer.chat_template:  # which has added the special tokens
            encode = partial(self.tokenizer, self._chat(prompt, response), add_special_tokens=False)
        elif isinstance(prompt, str):
            encode = partial(self.tokenizer, prompt, response)
        else:
            raise UserError(f"{self.name} has no chat template: it cannot score prompts in chat messages.")
        whole = encode(verbose=False)
        if len(whole["input_ids"]) <= self.limit:
            return dict(whole)
        self.truncated += 1
        part: bool | str = True  # which cuts the longer text of a prompt and a response
        if not self.tokenizer.chat_template:
            rest = len(whole["input_ids"]) - len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            part = "only_first" if rest < self.limit else True
        return dict(encode(truncation=part, max_length=self.limit))

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
