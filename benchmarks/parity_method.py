"""Comparison of the β-DPO steps of a real run with NumPy, with plain PyTorch and with this project's default.

The NumPy functions compute β-DPO in float64 as the authors' released code does, from its description. They share no
code with `app.method`, so agreement is evidence. The result is NaN where the released code would crash.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.parity_runs import ALPHA, BETA0, KEEP_RATIO, LEARNING_RATE, MAX_GRAD_NORM, Bench, Run, token_ids

STEPS, BATCH_SIZE = 24, 16
SHOWN = (1, 2, 10)  # steps in the table of `differences`
Floats = NDArray[np.float64]


@dataclass
class AuthorsStatistics:
    """M0 and σ as exponential averages that start at zero, without bias correction, used after the update."""

    momentum: float = 0.9
    mean: float = 0.0
    std: float = 0.0

    def update(self, gaps: Floats) -> None:
        """Update with the gaps [n] of a batch; a batch of one pair makes σ NaN from then on, like the authors'."""
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt(np.sum((gaps - gaps.mean()) ** 2) / np.float64(len(gaps) - 1))
        self.mean = self.momentum * self.mean + (1 - self.momentum) * float(gaps.mean())
        self.std = self.momentum * self.std + (1 - self.momentum) * float(spread)


def selection_probabilities(gaps: Floats, mean: float, std: float) -> Floats:
    """Return the normalised normal densities of the gaps [n]; NaN if σ is 0 or every density underflows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        density = np.exp(-0.5 * ((gaps - mean) / np.float64(std)) ** 2) / (np.float64(std) * np.sqrt(2 * np.pi))
        return density / density.sum()


def number_kept(n: int, keep_ratio: float) -> int:
    """Return ⌊n·ρ⌋, which is 0 for a very small batch."""
    return int(n * keep_ratio)


def batch_beta(beta0: float, alpha: float, kept_gaps: Floats, mean: float, floor: float = 1e-3) -> float:
    """Return β0·(1 + α·(mean gap of the kept pairs − M0)), but at least `floor`."""
    return max(floor, beta0 * (1 + alpha * (float(kept_gaps.mean()) - mean)))


def dpo_loss(kept_gaps: Floats, beta: float) -> float:
    """Return the mean of −log σ(β·h) over the kept pairs."""
    return float(np.logaddexp(0.0, -beta * kept_gaps).mean())


def micro_batch_betas(statistics: AuthorsStatistics, gaps: Floats, size: int, rng: np.random.Generator) -> Floats:
    """Return β of micro-batches of `size` pairs that select their own; NaN where the released code would stop."""
    betas = np.full(len(gaps) // size, np.nan)
    for number, part in enumerate(np.split(gaps, len(betas))):
        statistics.update(part)
        p = selection_probabilities(part, statistics.mean, statistics.std)
        if np.isfinite(p).all():
            kept = rng.choice(size, number_kept(size, KEEP_RATIO), replace=False, p=p)
            betas[number] = batch_beta(BETA0, ALPHA, part[kept], statistics.mean)
    return betas


def step_differences(run: Run) -> dict[str, float]:
    """Return the largest difference over all steps between a run of configs/method/authors_code.yaml and NumPy.

    NumPy gets only the gaps and the kept pairs of every step. Selection probabilities are not compared while σ is
    0, because the released code then has none.
    """
    statistics, apart = AuthorsStatistics(), []
    for step in run.steps:
        statistics.update(step.gaps)
        mean, std = statistics.mean, statistics.std
        kept = step.gaps[step.kept]
        beta = batch_beta(BETA0, ALPHA, kept, mean)
        ours = np.exp(step.log_weights) / np.exp(step.log_weights).sum()
        expected = selection_probabilities(step.gaps, mean, std)
        apart.append(
            {
                "M0": step.mean - mean,
                "σ": step.std - std,
                "β": step.beta - beta,
                "loss": step.loss - dpo_loss(kept, beta),
                "selection probabilities": np.abs(ours - expected).max() if std > 0 else 0.0,
                "pairs kept": float(step.kept.sum() - number_kept(len(step.gaps), KEEP_RATIO)),
            }
        )
    # NumPy's max, because that of Python may drop a NaN
    return {name: float(np.max([abs(each[name]) for each in apart])) for name in apart[0]}


def replay(bench: Bench, run: Run) -> tuple[list[Floats], dict[str, Tensor]]:
    """Train again with the kept pairs and β of every step, without the package; return gaps and parameters."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    file, measured = bench.rows, []
    for step in run.steps:
        sides = itertools.product(("chosen", "rejected"), step.pair_ids)
        texts = [token_ids(file[pair_id], side, tokenizer) for side, pair_id in sides]
        with torch.no_grad():
            base = response_logps(reference, texts)
        chosen, rejected = (response_logps(policy, texts) - base).chunk(2)
        gaps = chosen - rejected
        measured.append(gaps.detach().numpy())
        loss = F.softplus(-step.beta * gaps[torch.tensor(step.kept)]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    return measured, {name: value.detach() for name, value in policy.named_parameters()}


def response_logps(model: Any, rows: Sequence[tuple[Any, Any]]) -> Tensor:
    """Return the summed log-probabilities [n] float64 of the responses of n rows of tokens (prompt, response).

    One padded row per response, and logits of its own positions only.
    """

    def padded(parts: list[Tensor]) -> Tensor:
        return pad_sequence(parts, batch_first=True).to(model.device)

    sizes = [(len(prompt), len(prompt) + len(response)) for prompt, response in rows]
    ids = padded([torch.from_numpy(np.concatenate((prompt, response))) for prompt, response in rows])
    mask = padded([torch.ones(end, dtype=torch.int64) for _, end in sizes])
    wanted = padded([torch.arange(end) >= begin for begin, end in sizes])[:, 1:]
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    tokens = [
        -F.cross_entropy(model.lm_head(some).float(), targets, reduction="none").double()
        for some, targets in zip(hidden[wanted].split(1024), ids[:, 1:][wanted].split(1024), strict=True)
    ]
    total = torch.zeros(len(rows), dtype=torch.float64, device=model.device)
    return total.index_add(0, wanted.nonzero()[:, 0], torch.cat(tokens))


def differences(authors: Run, default: Run) -> list[list[str]]:
    """Return rows of step, setting, gap, M0, σ, β (a range over micro-batches) and kept pairs."""
    statistics, rng, rows = AuthorsStatistics(), np.random.default_rng(0), []
    for number, (theirs, ours) in enumerate(zip(authors.steps, default.steps, strict=True), start=1):
        betas = micro_batch_betas(statistics, theirs.gaps, BATCH_SIZE // 4, rng)
        if number not in SHOWN:
            continue
        released: tuple[str, object] = ("stops: σ = 0", "none")
        if np.isfinite(betas).all():
            released = f"{betas.min():.4f} … {betas.max():.4f}", 4 * number_kept(BATCH_SIZE // 4, KEEP_RATIO)
        for setting, step, moments, (beta, kept) in (
            ("released code, 4 micro-batches", theirs, statistics, released),
            ("authors_code.yaml", theirs, theirs, (f"{theirs.beta:.4f}", theirs.kept.sum())),
            ("beta_dpo.yaml (default)", ours, ours, (f"{ours.beta:.4f}", ours.kept.sum())),
        ):
            figures = (f"{each:.4f}" for each in (step.gaps.mean(), moments.mean, moments.std))
            rows.append([str(number), setting, *figures, beta, str(kept)])
    return rows
