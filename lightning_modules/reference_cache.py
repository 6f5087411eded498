"""The cache of reference log-probabilities on disk, scored once for every later run from the same model."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from app.core.cache import cache_root, fingerprint, lock_of
from app.core.errors import UserError
from app.core.files import Lock, atomic_file
from app.method.batch import OptimizerBatch
from lightning_modules.layout_check import CHECKED_PAIRS, TOLERANCE
from lightning_modules.measuring import PairMeasurer, Ranks
from lightning_modules.pretrained import model_identity
from lightning_modules.sharding import ShardedStrategy

Batches = Sequence[Collection[OptimizerBatch]]

log = logging.getLogger(__name__)

VERSION = 2  # raise when the stored values or the keys of pairs change
_ROW = np.dtype([("key", np.int64), ("chosen", np.float64), ("rejected", np.float64)])
_BATCHES_PER_PART = 32  # an interruption loses at most this many batches
_WAIT_SECONDS = 5.0  # for the lock, between collectives, so that no collective times out


class ReferenceCache:
    """A store of log π_ref(y_w|x) and log π_ref(y_l|x) by pair, in a folder of atomically written parts.

    The key of a pair is a hash of its tokens, so it covers tokenizer, truncation and template, and the same pair in
    another mixture of data is found. A part that does not match its name, a hash of its content, is skipped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.load()

    def load(self) -> None:
        rows = np.concatenate([np.zeros(0, _ROW), *map(_read_part, sorted(self.folder.glob("*.npy")))])
        self._rows = rows[np.unique(rows["key"], return_index=True)[1]]  # sorted by key

    def __len__(self) -> int:
        return len(self._rows)

    def knows(self, keys: np.ndarray) -> np.ndarray:
        """Return which of the pairs `keys` [n] int64 are stored, [n] bool."""
        return np.isin(keys, self._rows["key"])

    def logps(self, keys: np.ndarray) -> Tensor:
        """Return log-probabilities [n, 2] float64 of the pairs `keys` [n]. Raises UserError if one is missing."""
        # all were scored when the model was set up, so only a further command of one process can have others
        if unknown := int((~self.knows(keys)).sum()):
            said = f"cached scored the pairs of the command of its set-up, and {unknown} pairs of this one are new"
            raise UserError(f"model.reference: {said}: take a new model for this command, or set it to frozen.")
        rows = self._rows[np.searchsorted(self._rows["key"], keys)]
        return torch.from_numpy(np.stack([rows["chosen"], rows["rejected"]], 1))

    def add(self, keys: np.ndarray, logps: np.ndarray) -> None:
        """Write log-probabilities [n, 2] of the pairs `keys` [n], if any, as a new part; `load` reads it."""
        if not len(keys):
            return
        rows = np.zeros(len(keys), _ROW)
        rows["key"], rows["chosen"], rows["rejected"] = keys, logps[:, 0], logps[:, 1]
        content = io.BytesIO()  # numpy's own writing hides the reason of the operating system
        np.save(content, rows)
        with atomic_file(self.folder / f"{_content_hash(rows)}.npy") as temporary:
            temporary.write_bytes(content.getvalue())


def _content_hash(rows: np.ndarray) -> str:
    return hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()


def _read_part(path: Path) -> np.ndarray:
    with suppress(OSError, ValueError, EOFError):
        rows = np.load(path, allow_pickle=False)
        if rows.dtype == _ROW and _content_hash(rows) == path.stem:
            return rows
    log.warning("%s is damaged: its pairs are scored again.", path)
    return np.zeros(0, _ROW)


def reference_fingerprint(name: str, measurer: PairMeasurer, dtype: torch.dtype) -> str:
    """Return the cache key of a reference: weights, compute dtype, and kernel, whose rounding looks like gaps."""
    scorer, ranks = measurer.policy, measurer.ranks
    kernel = [ranks.device.type, scorer.attention, str(scorer.layout)]
    if scorer.compiled:
        kernel.append("compiled")
    # a sharded model computes more than its products in bfloat16
    if dtype == torch.bfloat16 and isinstance(ranks.strategy, ShardedStrategy):
        kernel.append(f"sharded, split {ranks.size // ranks.shares}")
    if (quantised := getattr(scorer.model.config, "quantization_config", None)) is not None:
        kernel.append(quantised.to_json_string())
    model = model_identity(name, scorer.model.config)
    return fingerprint({"version": VERSION, "model": model, "dtype": str(dtype), "kernel": kernel})


def filled_reference_cache(
    name: str, measurer: PairMeasurer, dtype: torch.dtype, batches_of: Callable[..., Batches]
) -> ReferenceCache:
    """Return the cache of the model `name`, the policy of `measurer`, with every pair of the stage.

    All ranks score together, while other runs from the same model wait for the lock. A few stored pairs are scored
    again as a check; if they differ, all are, with a warning. Raises UserError if the folder cannot be written or
    differs between ranks.
    """
    ranks = measurer.ranks
    own = reference_fingerprint(name, measurer, dtype) if ranks.number == 0 else ""
    folder = cache_root("references") / ranks.strategy.broadcast(own)
    cache = ReferenceCache(folder)

    missing = partial(batches_of, lambda keys: ~cache.knows(keys))
    few_known = partial(batches_of, cache.knows, CHECKED_PAIRS)
    # nothing to write is no reason for the lock, so a cache may be read-only; another run may write to it meanwhile
    to_score = torch.tensor(sum(map(len, missing())) if same_count(cache, ranks) else 1)
    if not ranks.reduce(to_score, "max") and _largest_error(measurer, cache, few_known()) <= TOLERANCE[dtype]:
        return cache
    with _lock(ranks, folder):
        reload(cache, ranks)
        if (apart := _largest_error(measurer, cache, few_known())) > TOLERANCE[dtype]:
            differ = f"in {folder} are not those of {name} (apart by {apart:.2g} nats per token)"
            log.warning("model.reference: log-probabilities %s: every pair is scored again.", differ)
            for path in folder.glob("*.npy") if ranks.number == 0 else ():
                path.unlink()
            reload(cache, ranks)
        _score(measurer, cache, missing())
        reload(cache, ranks)  # compares once more, because empty folders are alike
    return cache


def reload(cache: ReferenceCache, ranks: Ranks) -> None:
    """Read the cache again on all ranks. Raises UserError if they do not read the same number of pairs."""
    ranks.strategy.barrier()
    cache.load()
    if not same_count(cache, ranks):
        cure = "set BETA_DPO_CACHE to a folder that all nodes share"
        raise UserError(f"{cache.folder} differs from rank to rank: {cure}.")


def same_count(cache: ReferenceCache, ranks: Ranks) -> bool:
    count = torch.tensor(len(cache), dtype=torch.float64)
    return bool(ranks.reduce(count, "max") == ranks.reduce(count, "mean"))


@contextmanager
def _lock(ranks: Ranks, folder: Path) -> Iterator[None]:
    """Hold the folder's lock in rank 0; the other ranks wait in short collectives, which cannot time out."""
    lock = Lock(*lock_of("references", folder.name)) if ranks.number == 0 else None
    if lock is not None and not lock.acquire(0):
        log.info("%s scores the same reference into %s: waiting for it", lock.holder(), folder)
    while ranks.reduce(torch.tensor(float(lock is not None and not lock.held)), "max"):
        if lock is not None:
            lock.acquire(_WAIT_SECONDS)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _score(measurer: PairMeasurer, cache: ReferenceCache, loaders: Batches) -> None:
    """Score the pairs of `loaders` with the policy; every rank adds its own pairs to the cache in parts."""
    total = sum(map(len, loaders))
    if not total:
        return
    log.info("scoring the pairs under the reference, once for all runs from this model: %s", cache.folder)
    quiet = None if measurer.ranks.number == 0 else True  # None: tqdm is quiet without a terminal
    batches = tqdm(chain.from_iterable(loaders), "reference", total, unit=" batches", disable=quiet)
    scored = _scored(measurer, batches)
    while part := list(islice(scored, _BATCHES_PER_PART)):
        keys, logps, _ = zip(*part, strict=True)
        cache.add(np.concatenate(keys), torch.cat(logps).numpy())


def _largest_error(measurer: PairMeasurer, cache: ReferenceCache, loaders: Batches) -> float:
    """Score pairs again; return the largest difference in nats per token, infinite if one alone is not finite."""
    apart = [torch.zeros(1, dtype=torch.float64)]
    for keys, logps, tokens in _scored(measurer, chain.from_iterable(loaders)):
        stored = cache.logps(keys)
        error = ((logps - stored).abs() / tokens).nan_to_num(nan=torch.inf, posinf=torch.inf)
        apart.append(error.masked_fill(~logps.isfinite() & ~stored.isfinite(), 0).flatten())
    return float(measurer.ranks.reduce(torch.cat(apart).max(), "max"))


def _scored(
    measurer: PairMeasurer, batches: Iterable[OptimizerBatch]
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Yield keys [B], log-probabilities [B, 2] float64 and tokens [B, 2] of this rank's pairs, on the CPU."""
    for batch in batches:
        logps, _ = measurer.measure(batch, measurer.rows(batch))
        both = torch.stack([logps.policy_chosen, logps.policy_rejected], 1)
        tokens = torch.stack([logps.chosen_tokens, logps.rejected_tokens], 1)
        yield batch.pair_keys.numpy(), both.cpu(), tokens.cpu()
