"""The command `beta-dpo generate`, which samples responses from a model outside training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from app.cli.mistakes import checked_command
from app.commands.sampling import generator_state, restore_generator, sample, score
from app.core.errors import UserError
from app.core.files import Parts, atomic_file, folder_hash
from app.core.samples import SAMPLE_FIELDS, sample_line
from app.method.ranges import NonNegativeFloat, PositiveInt, PositiveShare, Seed
from datamodules.controlled_task import prompts as controlled_prompts
from datamodules.records import PreferencePair
from datamodules.sources.reader import read_pairs
from datamodules.tokenisation import Tokenisation, tokenise_prompts
from datamodules.tokenizer import read_tokenizer, stop_ids
from lightning_modules.pretrained import load_model, refuse_beyond


@checked_command
def generate(
    model: str,
    out: str,
    prompts: str = "controlled",
    split: str = "train",
    subset: str | None = None,
    count: PositiveInt | None = 1024,
    seed: Seed = 0,
    temperature: NonNegativeFloat | list[NonNegativeFloat] = 1.0,
    top_p: PositiveShare = 1.0,
    max_new_tokens: PositiveInt = 256,
    max_prompt_length: PositiveInt = 256,
    batch_size: PositiveInt = 128,
    chat_template: bool | Literal["auto"] = "auto",
    chat_template_kwargs: dict[str, Any] | None = None,
    reference: str | None = None,
    columns: list[str] | None = None,
) -> None:
    """Sample a response to each prompt from MODEL and write them to OUT, one JSON object per line.

    If the command is stopped, the same command resumes it and gives the same bytes: finished batches are kept in
    the folder OUT.parts until OUT is complete.

    Args:
        model: folder or Hub id of the model to sample from; CUDA is used if available.
        out: the .jsonl file to write; it appears only when complete.
        prompts: `controlled` for held-out prompts of the controlled task, or a file, dataset folder or Hub id of
            preference pairs, demonstrations or prompts alone (`prompt`, `instruction`, `question` or `messages`).
        split: split of a Hub id or dataset folder.
        subset: subset of a Hub id or dataset folder, as data.subset.
        count: number of prompts, the first of a file; null takes all.
        seed: seed of the sampling and of the controlled task's prompts.
        temperature: 0 takes the most likely token each time; a list samples once at each temperature.
        top_p: probability mass of nucleus sampling.
        max_new_tokens: length limit of a response, with the token that ends it. A response ends at EOS, at the
            chat template's end-of-turn and at the stop ids of the model's generation config; then `finished` is
            true.
        max_prompt_length: length limit of a prompt; a longer one is cut, whole old turns first, even where training
            leaves it whole, because prompt and responses fit data.max_length together.
        batch_size: prompts per generation call.
        chat_template: `auto` puts chat messages into the tokenizer's chat template and leaves text as it is; true
            puts text there too.
        chat_template_kwargs: options of the template, as data.chat_template_kwargs.
        reference: a model that scores the samples too; the mean of logp − reference_logp is the KL.
        columns: further columns of the prompts, with numbers or text, to copy into OUT.
    """
    temperatures = [float(one) for one in (temperature if isinstance(temperature, list) else [temperature])]
    if not out.endswith(".jsonl"):
        raise UserError(f"out must end in .jsonl, not {out!r}.")
    if not temperatures or min(temperatures) < 0 or len(set(temperatures)) < len(temperatures):
        raise UserError("temperature must be a number from 0, or a list of different ones.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [model] if reference is None else [model, reference]
    models = [load_model(name).eval().to(device) for name in names]
    tokenizer = read_tokenizer(model, "model")
    items = read_prompts(prompts, split, subset, count, seed, columns or [])
    settings = Tokenisation(
        max_prompt_length + max_new_tokens,
        max_prompt_length,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs or {},
    )
    encoded = encode_prompts(items, tokenizer, settings, prompts)
    for name, loaded in zip(names, models, strict=True):
        longest = max(map(len, encoded), default=0) + max_new_tokens
        largest = max((int(ids.max()) for ids in encoded), default=-1)
        refuse_beyond(loaded, longest, largest, f"The tokenizer of {name}", "max_prompt_length + max_new_tokens")
    stops = stop_ids(tokenizer, settings, models[0].generation_config.eos_token_id)
    batches = [
        Batch(warmth, items[start : start + batch_size], encoded[start : start + batch_size])
        for warmth in temperatures
        for start in range(0, len(items), batch_size)
    ]
    job = {
        "models": [model_content(name, loaded) for name, loaded in zip(names, models, strict=True)],
        "prompts": prompts_hash(items, encoded),
        "columns": columns,
        "seed": seed,
        "temperature": temperatures,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "stops": stops,
        "batch_size": batch_size,
        "device": device.type,  # another kind of device draws other numbers
    }
    parts = Parts(Path(f"{out}.parts"), job)
    sample_parts(batches, parts, models, tokenizer, stops, seed, {"top_p": top_p, "max_new_tokens": max_new_tokens})
    finished = 0
    with atomic_file(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for path in parts:
            lines = json.loads(path.read_text(encoding="utf-8"))["lines"]
            finished += sum(json.loads(line)["finished"] for line in lines)
            file.writelines(lines)
    parts.remove()
    total = len(items) * len(temperatures)
    print(f"{total} samples of {model}: {out}; {finished} are finished")
    if finished < total:
        print(
            f"{total - finished} of them are cut at max_new_tokens = {max_new_tokens}: the model had not ended them"
        )


class Batch(NamedTuple):
    """The prompts of one generation call, with their temperature."""

    temperature: float
    items: Sequence[PreferencePair]
    prompts: Sequence[np.ndarray]


def sample_parts(
    batches: Sequence[Batch],
    parts: Parts,
    models: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    seed: int,
    settings: dict[str, Any],
) -> None:
    """Write the batches that are not done yet, each with the state of the random generator after it.

    `models` has the model to sample from, and the reference if there is one.
    """
    done, device = len(parts), models[0].device
    torch.manual_seed(seed)
    if done:
        print(f"{parts.folder}: going on behind {done} of {len(batches)} batches")
        restore_generator(json.loads(parts.path(done - 1).read_text(encoding="utf-8"))["generator"], device)
    total = sum(len(batch.items) for batch in batches)
    with tqdm(desc="sampling", unit=" samples", total=total, disable=None) as progress:
        progress.update(sum(len(batch.items) for batch in batches[:done]))
        for number, batch in enumerate(batches[done:], done):
            warm = {"temperature": batch.temperature, "top_k": 0} if batch.temperature > 0 else {"top_p": None}
            sampling = {**settings, "do_sample": batch.temperature > 0, **warm}
            responses = sample(models[0], batch.prompts, stops, sampling)
            logps = [score(model, batch.prompts, responses) for model in models]
            part = {"lines": list(lines_of(batch, responses, logps, tokenizer, stops))}
            with atomic_file(parts.path(number)) as temporary:
                text = json.dumps(part | {"generator": generator_state(device)})
                temporary.write_text(text, encoding="utf-8")
            progress.update(len(batch.items))


def lines_of(
    batch: Batch,
    responses: Sequence[np.ndarray],
    logps: Sequence[Sequence[float]],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
) -> Iterator[str]:
    """Yield the lines of the sample file for one batch."""
    for index, (item, response) in enumerate(zip(batch.items, responses, strict=True)):
        finished = int(response[-1]) in stops
        text = tokenizer.decode(response[:-1] if finished else response, skip_special_tokens=True)
        yield sample_line(
            item.pair_id,
            item.prompt,
            str(text),
            finished,
            temperature=batch.temperature,
            tokens=len(response),
            **{name: column[index] for name, column in zip(("logp", "reference_logp"), logps, strict=False)},
            **item.labels,
        )


def model_content(name: str, model: Any) -> str:
    """Return an identifier of a model's weights: a hash of its folder, or the commit of its Hub id."""
    return folder_hash(name) if Path(name).is_dir() else f"{name}@{model.config._commit_hash}"


def prompts_hash(items: Sequence[PreferencePair], encoded: Sequence[np.ndarray]) -> str:
    """Return a hash of the prompts' ids and tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for item, ids in zip(items, encoded, strict=True):
        digest.update(json.dumps([item.pair_id, ids.tolist()]).encode())
    return digest.hexdigest()


def encode_prompts(
    items: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, settings: Tokenisation, prompts: str
) -> list[np.ndarray]:
    """Return the tokens of the prompts and print what was cut. Raises UserError if a prompt cannot be tokenised."""
    found = tokenise_prompts(items, tokenizer, settings)
    lost = Counter(notes[0] for ids, notes in found if ids is None)
    if lost:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in lost.items())
        raise UserError(f"{lost.total()} prompts of {prompts} cannot be tokenised ({reasons}): take them out.")
    for note, count in Counter(note for _, notes in found for note in notes).items():
        limit = f" to {settings.max_prompt_length} tokens (max_prompt_length)" if "truncated" in note else ""
        print(f"{prompts}: {count} {note}{limit}")
    return [ids for ids, _ in found if ids is not None]


def read_prompts(
    prompts: str, split: str, subset: str | None, count: int | None, seed: int, columns: Sequence[str]
) -> list[PreferencePair]:
    """Return the prompts to answer, with `columns` as labels and without the records' responses."""
    if taken := [name for name in columns if name in SAMPLE_FIELDS]:
        raise UserError(f"columns: {taken[0]} is a field of every sample; rename that column of {prompts}.")
    if prompts == "controlled":
        if columns:
            raise UserError("columns: the prompts of the controlled task have none; leave it out.")
        if count is None:
            raise UserError("count: the controlled task has no end of prompts; give a number.")
        return [
            PreferencePair(f"held-out-{seed}-{number:06d}", text, "", None)
            for number, text in enumerate(controlled_prompts(count, seed))
        ]
    reader = read_pairs(prompts, split=split, subset=subset, on_bad_row="skip", prompts_only=True)
    items = []
    for pair in islice(reader, count):
        if absent := [name for name in columns if name not in pair.labels]:
            found = ", ".join(pair.labels) or "none"
            raise UserError(f"columns: {prompts} ({pair.pair_id}) has no {absent[0]!r} to copy; it has {found}.")
        labels = {name: pair.labels[name] for name in columns}
        items.append(replace(pair, chosen="", rejected=None, chosen_fields={}, rejected_fields={}, labels=labels))
    if not reader.report.complete or (count is not None and len(items) < count):
        asked = "all" if count is None else f"the {count}"
        print(f"{prompts}: {len(items)} prompts of {asked} asked for; {reader.report.summary()}")
    return items
