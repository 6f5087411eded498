"""The command `beta-dpo generate`, which samples responses from a model outside training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from tqdm.auto import tqdm

from app.cli.mistakes import checked_command
from app.commands.benchmarks import ENDINGS, Form, answer_file, further_turns, read_questions
from app.commands.sampling import Batch, LocalSampler, Sampler, ServedSampler, generator_state, restore_generator
from app.core.errors import UserError, renamed
from app.core.files import Parts, atomic_file, locked, refuse_place
from app.core.samples import SAMPLE_FIELDS, sample_line
from app.judges.endpoint import SamplingServer
from app.method.ranges import NonNegativeFloat, PositiveInt, PositiveShare, Seed
from datamodules.controlled_task import prompts as controlled_prompts
from datamodules.records import PreferencePair
from datamodules.sources.pairs import read_pairs
from datamodules.tokenisation import Tokenisation

HERE = SamplingServer()
PROMPT_LENGTH = 256
ELSEWHERE = "name another file by out"
# options of the data in errors → ours
OWN_NAMES = {f"data.{name}": name for name in ("split", "subset", "max_prompt_length", "chat_template")}
OWN_NAMES |= {"data.path": "prompts", "data.tokenizer": "the model's tokenizer"}


@checked_command
@renamed(OWN_NAMES)
def generate(
    model: str,
    out: str,
    prompts: str = "controlled",
    split: str = "train",
    subset: str | None = None,
    count: PositiveInt | None = 1024,
    samples: PositiveInt = 1,
    seed: Seed = 0,
    temperature: NonNegativeFloat | list[NonNegativeFloat] = 1.0,
    top_p: PositiveShare = 1.0,
    max_new_tokens: PositiveInt = 256,
    max_prompt_length: PositiveInt = PROMPT_LENGTH,
    batch_size: PositiveInt = 128,
    chat_template: bool | Literal["auto"] = "auto",
    chat_template_kwargs: dict[str, Any] | None = None,
    reference: str | None = None,
    columns: list[str] | None = None,
    format: Form = "jsonl",
    name: str | None = None,
    endpoint: SamplingServer = HERE,
) -> None:
    """Sample responses to each prompt from MODEL and write them to OUT, one JSON object per line.

    If the command is stopped, the same command resumes it and gives the same bytes: finished batches are kept in
    the folder OUT.parts until OUT is complete.

    Args:
        model: folder or Hub id of the model, sampled on CUDA if available; with endpoint.url, its name there.
        out: the file to write, .jsonl (for alpaca_eval .json); it appears only when complete.
        prompts: `controlled` for held-out prompts of the controlled task, or a file, dataset folder or Hub id of
            preference pairs, demonstrations or prompts alone (`prompt`, `instruction`, `question` or `messages`).
        split: split of a Hub id or dataset folder.
        subset: subset of a Hub id or dataset folder, as data.subset.
        count: number of prompts, the first of a file; null takes all.
        samples: responses to each prompt, at each temperature.
        seed: seed of the sampling and of the controlled task's prompts.
        temperature: 0 takes the most likely token each time; a list samples at each temperature.
        top_p: probability mass of nucleus sampling.
        max_new_tokens: length limit of a response, with the token that ends it: EOS, the chat template's
            end-of-turn or a stop id of the model's generation config. A response without one is not `finished`.
        max_prompt_length: length limit of a prompt; a longer one is cut, whole old turns first, and counted.
        batch_size: responses per generation call.
        chat_template: `auto` puts chat messages into the tokenizer's chat template; true puts text there too.
        chat_template_kwargs: options of the template, as data.chat_template_kwargs.
        reference: a model that scores the samples too; the mean of logp − reference_logp is the KL.
        columns: further columns of the prompts, with numbers or text, to copy into OUT.
        format: `jsonl` writes samples; `alpaca_eval`, `arena_hard` and `mt_bench` read the questions of that
            benchmark, ask them as chats and write its file of answers.
        name: name of the model in the file of a benchmark; by default the last part of MODEL.
        endpoint: the server that samples, with OpenAI's API, such as vLLM; without endpoint.url this process does.
    """
    place = Path(f"{out}.parts")
    if place.is_dir():  # so that a second command does not load its model in vain
        with locked(place / ".lock", out, ELSEWHERE, waits=False):
            pass
    temperatures = [float(one) for one in (temperature if isinstance(temperature, list) else [temperature])]
    replaced = refuse_place("out", out, (ENDINGS[format],), prompts)
    served, controlled = endpoint.url is not None, format == "jsonl" and prompts == "controlled"
    for told, wrong in {
        "temperature must be a number from 0, or a list of different ones.": (
            len(set(temperatures)) < max(len(temperatures), 1)
        ),
        "temperature: below 1e-6 logits overflow; give 0, which takes the most likely token.": (
            any(0 < one < 1e-6 for one in temperatures)
        ),
        "samples: at temperature 0 they would all be equal; give a higher one.": samples > 1 and 0 in temperatures,
        "reference needs the model in this process: leave it out, or endpoint.url.": served and reference,
        "max_prompt_length needs the model in this process: leave it out, or endpoint.url.": (
            served and max_prompt_length != PROMPT_LENGTH
        ),
        "endpoint: its settings are for a server: give endpoint.url.": not served and endpoint != HERE,
        "name: a file of samples has none; it is for the file of a benchmark (format).": name and format == "jsonl",
        f"format: {format} takes one answer to a question: no samples, columns or list of temperatures.": (
            format != "jsonl" and (samples > 1 or len(temperatures) > 1 or columns)
        ),
        "prompts: the controlled task has no split, subset or columns; leave them out.": (
            controlled and (split != "train" or subset or columns)
        ),
        "count: the controlled task makes any number of prompts; give one.": controlled and count is None,
    }.items():
        if wrong:
            raise UserError(told)
    if format == "jsonl":
        items = read_prompts(prompts, split, subset, count, seed, columns or [])
    else:
        items = read_questions(format, prompts, split, subset, count)
    sampling = {"top_p": top_p, "max_new_tokens": max_new_tokens}
    lengths, kwargs = (max_prompt_length + max_new_tokens, max_prompt_length), chat_template_kwargs or {}
    own = Tokenisation(*lengths, chat_template=chat_template, chat_template_kwargs=kwargs), seed, sampling
    sampler = ServedSampler(model, endpoint, *own) if served else LocalSampler(model, reference, *own)
    job: dict[str, Any] = {
        "columns": columns,
        "seed": seed,
        "temperature": temperatures,
        "samples": samples,
        "format": format,
        "prompts": sampler.read(items, prompts),
        "batch_size": batch_size,
        **sampling,
        **sampler.job,
    }
    with locked(place / ".lock", out, ELSEWHERE, waits=False):
        parts, first = Parts(place, job), 0
        while items:
            batches = batches_of(items, temperatures, samples, batch_size, first)
            sample_parts(batches, parts, sampler)
            first += len(batches)
            # a further round asks the next turn of the questions that have one
            rows = (json.loads(line) for batch in batches for line in part_of(parts, batch.number)["lines"])
            items = further_turns(items, rows) if format == "mt_bench" else []
            if items:
                sampler.read(items, prompts)
        write_out(out, format, name or Path(model).name, parts, f"{model}: {out}{replaced}", max_new_tokens)


def batches_of(
    items: Sequence[PreferencePair], temperatures: Sequence[float], samples: int, size: int, first: int
) -> list[Batch]:
    """Return the batches of a round; `first` is the number of the first."""
    each = [(item, copy) for item in items for copy in range(samples)]
    parts = [(warmth, each[start : start + size]) for warmth in temperatures for start in range(0, len(each), size)]
    return [Batch(number, *part) for number, part in enumerate(parts, first)]


def sample_parts(batches: Sequence[Batch], parts: Parts, sampler: Sampler) -> None:
    """Write the batches that are not done yet, each with the state of the sampler after it."""
    done = [batch for batch in batches if parts.path(batch.number).exists()]
    if done:
        print(f"{parts.folder}: continuing after {len(done)} of {len(batches)} batches")
        restore_generator(part_of(parts, done[-1].number)["generator"], sampler.device)
    with tqdm(desc="sampling", unit=" samples", total=sum(len(b.items) for b in batches), disable=None) as progress:
        progress.update(sum(len(batch.items) for batch in done))
        for batch in batches[len(done) :]:
            lines, refused = [], Counter[str]()
            for (item, copy), answer in zip(batch.items, sampler.answers(batch), strict=True):
                if isinstance(answer, str):
                    refused[answer] += 1
                else:
                    more = {"temperature": batch.temperature, "sample": copy, **answer, **item.labels}
                    lines.append(sample_line(item.pair_id, item.prompt, **more))
            part = {"lines": lines, "refused": refused, "generator": generator_state(sampler.device)}
            with atomic_file(parts.path(batch.number)) as temporary:
                temporary.write_text(json.dumps(part), encoding="utf-8")
            progress.update(len(batch.items))


def part_of(parts: Parts, number: int) -> dict[str, Any]:
    return dict(json.loads(parts.path(number).read_text(encoding="utf-8")))


def write_out(out: str, format: Form, name: str, parts: Parts, told: str, limit: int) -> None:
    """Join the parts to the file `out`, remove them, and print what is in it. Raises UserError if nothing is."""
    finished, refused, answers, gaps = Counter[bool](), Counter[str](), [], []
    with atomic_file(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number in range(len(parts)):
            part = part_of(parts, number)
            rows = [json.loads(line) for line in part["lines"]]
            finished.update(row["finished"] for row in rows)
            refused.update(part["refused"])
            gaps += [row["logp"] - row["reference_logp"] for row in rows if "reference_logp" in row]
            if format == "jsonl":
                file.writelines(part["lines"])
            else:
                answers += rows
        if not finished:
            parts.remove()  # the same command asks again
            raise UserError(f"{told}: the endpoint refused every prompt ({next(iter(refused))}).")
        if answers:
            file.write(answer_file(format, name, answers))
    parts.remove()
    print(f"{finished.total()} samples of {told}; {finished[True]} are finished")
    if gaps:
        error = f" ± {stdev(gaps) / len(gaps) ** 0.5:.2g} (standard error)" if len(gaps) > 1 else ""
        mean = f"{fmean(gaps):.3g}{error} nats a sample"
        print(f"mean of logp − reference_logp: {mean}, at temperature 1 and top_p 1 the KL")
    if finished[False]:
        print(f"{finished[False]} of them are cut at max_new_tokens = {limit}")
    for reason, count in refused.items():
        print(f"{count} samples were refused by the endpoint: {reason}")


def read_prompts(
    prompts: str, split: str, subset: str | None, count: int | None, seed: int, columns: Sequence[str]
) -> list[PreferencePair]:
    """Return the prompts to answer, with `columns` as labels and without the records' responses."""
    if taken := [name for name in columns if name in SAMPLE_FIELDS]:
        raise UserError(f"columns: {taken[0]} is a field of every sample; rename that column of {prompts}.")
    if prompts == "controlled":
        texts = enumerate(controlled_prompts(count or 0, seed))
        return [PreferencePair(f"held-out-{seed}-{number:06d}", text, "", None) for number, text in texts]
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
