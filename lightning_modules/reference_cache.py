"""The cache of reference log-probabilities on disk, scored once for every later run from the same model."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from app.core.cache import cache_root, fingerprint, lock_of
from app.core.errors import UserError
from app.core.files import atomic_file
from app.core.locks import Lock
from app.method.batch import OptimizerBatch
from lightning_modules.layout_check import CHECKED_PAIRS, TOLERANCE
from lightning_modules.measuring import PairMeasurer
from lightning_modules.pretrained import model_identity
from lightning_modules.ranks import Ranks
from lightning_modules.strategy import ShardedStrategy

Batches = Sequence[Collection[OptimizerBatch]]

log = logging.getLogger(__name__)

VERSION = 2  # raise when the stored values or the keys of pairs change
_ROW = np.dtype([("key", np.int64), ("chosen", np.float64), ("rejected", np.float64)])
_BATCHES_PER_PART = 32  # an interruption loses at most this many batches
_WAIT_SECONDS = 5.0  # for the lock, between collectives, so that no collective times out


class ReferenceCache:
    """A store of log π_ref(y_w|x) and log π_ref(y_l|x) by pair, in a folder of atomically written parts.

    The key of a pair is a hash of its tokens (`OptimizerBatch.pair_keys`), so it covers tokenizer, truncation and
    template, and the same pair in another mixture of data is found. The name of a part is a hash of its content; a
    part that does not match is skipped with a warning, and its pairs are scored again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = np.zeros(0, _ROW)  # sorted by key
        self.load()

    def load(self) -> None:
        """Read every part in the folder."""
        parts = [rows for path in sorted(self.folder.glob("*.npy")) if (rows := _read_part(path)) is not None]
        rows = np.concatenate([np.zeros(0, _ROW), *parts])
        _, first = np.unique(rows["key"], return_index=True)
        self._rows = rows[first]

    def __len__(self) -> int:
        return len(self._rows)

    def knows(self, keys: np.ndarray) -> np.ndarray:
        """Return which of the pairs `keys` [n] int64 are stored, [n] bool."""
        place = np.searchsorted(self._rows["key"], keys)
        return np.append(self._rows["key"], 0)[place] == keys if len(self) else np.zeros(len(keys), bool)

    def logps(self, keys: np.ndarray) -> Tensor:
        """Return log-probabilities [n, 2] float64 of the pairs `keys` [n]. Raises UserError if one is missing.

        They were scored when the model was set up, so only a further command of one process can have others.
        """
        if unknown := int((~self.knows(keys)).sum()):
            raise UserError(
                "model.reference: cached scored the pairs of the command that this model was set up for, and this "
                f"one has others ({unknown} pairs here): give it a model of its own, or set it to frozen."
            )
        rows = self._rows[np.searchsorted(self._rows["key"], keys)]
        return torch.from_numpy(np.stack([rows["chosen"], rows["rejected"]], 1))

    def clear(self) -> None:
        """Delete every part."""
        for path in self.folder.glob("*.npy"):
            path.unlink()

    def add(self, keys: np.ndarray, logps: np.ndarray) -> None:
        """Write the log-probabilities [n, 2] of the pairs `keys` [n] as a new part; `load` reads it."""
        rows = np.zeros(len(keys), _ROW)
        rows["key"], rows["chosen"], rows["rejected"] = keys, logps[:, 0], logps[:, 1]
        content = io.BytesIO()  # numpy's own writing hides the reason of the operating system
        np.save(content, rows)
        with atomic_file(self.folder / f"{_content_hash(rows)}.npy") as temporary:
            temporary.write_bytes(content.getvalue())


def _content_hash(rows: np.ndarray) -> str:
    return hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()


def _read_part(path: Path) -> np.ndarray | None:
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.dtype == _ROW and _content_hash(rows) == path.stem:
            return rows
    except (OSError, ValueError, EOFError):
        pass
    log.warning("%s is damaged: its pairs are scored again.", path)
    return None


def reference_fingerprint(name: str, measurer: PairMeasurer, dtype: torch.dtype) -> str:
    """Return the cache key of a reference: weights, compute dtype and kernel.

    A folder counts by its content, a Hub model by its id and commit. The kernel (device type, attention, layout,
    compiled layers) is included because the rounding noise of another kernel would look like reward gaps. So is a
    sharded bfloat16 model, which computes all in bfloat16, while autocast does so for products alone.
    """
    scorer, ranks = measurer.policy, measurer.ranks
    kernel = [ranks.device.type, scorer.attention, str(scorer.layout)]
    kernel += ["compiled"] if scorer.compiled else []
    if dtype == torch.bfloat16 and isinstance(ranks.strategy, ShardedStrategy):
        kernel.append(f"sharded, split {ranks.size // ranks.shares}")
    quantised = getattr(scorer.model.config, "quantization_config", None)
    kernel += [] if quantised is None else [quantised.to_json_string()]
    model = model_identity(name, scorer.model.config)
    return fingerprint({"version": VERSION, "model": model, "dtype": str(dtype), "kernel": kernel})


def filled_reference_cache(
    name: str, measurer: PairMeasurer, dtype: torch.dtype, batches_of: Callable[..., Batches]
) -> ReferenceCache:
    """Return the cache of the model `name` with every pair of the stage; call it before the policy is trained.

    All ranks score together, while other runs from the same model wait for the lock. A few stored pairs are scored
    again as a check; if they differ, all pairs are scored again, with a warning. Raises UserError if the folder
    cannot be written or differs between ranks.

    Args:
        name: folder or Hub id of the model.
        measurer: that model (the policy that starts from it, or a model of its own), without a reference.
        dtype: of the forward pass.
        batches_of: the data's batches of the pairs whose keys are wanted (`PairDataModule.batches_of`).
    """
    ranks = measurer.ranks
    first = ranks.number == 0
    own = reference_fingerprint(name, measurer, dtype) if first else ""
    folder = cache_root("references") / ranks.strategy.broadcast(own)
    cache = ReferenceCache(folder)
    # nothing to write is no reason for the lock, so a cache may be read-only; another run may write to it meanwhile
    if same_count(cache, ranks) and len(cache):
        missing = sum(map(len, batches_of(lambda keys: ~cache.knows(keys))))
        if not ranks.reduce(torch.tensor(float(missing)), "max"):
            error = _largest_error(measurer, cache, batches_of(cache.knows, CHECKED_PAIRS))
            if error <= TOLERANCE[dtype]:
                return cache
    with _lock(ranks, folder):
        cache.load()
        refuse_apart(cache, ranks)
        error = _largest_error(measurer, cache, batches_of(cache.knows, CHECKED_PAIRS))
        if error > TOLERANCE[dtype]:
            log.warning(
                "model.reference: the log-probabilities in %s are not those of %s (apart by %.2g nats per token): "
                "they are deleted, and every pair is scored again.",
                *(folder, name, error),
            )
            if first:
                cache.clear()
            ranks.strategy.barrier()
            cache.load()
        _score(measurer, cache, batches_of(lambda keys: ~cache.knows(keys)))
        ranks.strategy.barrier()
        cache.load()
        refuse_apart(cache, ranks)  # once more, because empty folders are alike
    return cache


def refuse_apart(cache: ReferenceCache, ranks: Ranks) -> None:
    """Raise UserError on all ranks if they do not read the same number of pairs."""
    if not same_count(cache, ranks):
        raise UserError(
            f"{cache.folder} differs from rank to rank: set BETA_DPO_CACHE to a folder that all nodes share."
        )


def same_count(cache: ReferenceCache, ranks: Ranks) -> bool:
    """Return whether all ranks read the same number of pairs."""
    count = torch.tensor(len(cache), dtype=torch.float64)
    return bool(ranks.reduce(count, "max") == ranks.reduce(count, "mean"))


@contextmanager
def _lock(ranks: Ranks, folder: Path) -> Iterator[None]:
    """Hold the folder's lock in rank 0; the other ranks wait in short collectives, which cannot time out."""
    lock: Lock | None = None
    if ranks.number == 0:
        lock = Lock(*lock_of("references", folder.name))
        if not lock.acquire(0):
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
    scored: list[tuple[np.ndarray, np.ndarray]] = []
    quiet = None if measurer.ranks.number == 0 else True  # None: tqdm is quiet without a terminal
    batches = tqdm(chain.from_iterable(loaders), "reference", total, unit=" batches", disable=quiet)
    for number, batch in enumerate(batches, 1):
        logps, _ = measurer.measure(batch, measurer.rows(batch))
        both = torch.stack([logps.policy_chosen, logps.policy_rejected], 1)
        scored.append((batch.pair_keys.numpy(), both.cpu().numpy()))
        if number % _BATCHES_PER_PART == 0 or number == total:
            keys, values = (np.concatenate(column) for column in zip(*scored, strict=True))
            if len(keys):
                cache.add(keys, values)
            scored.clear()


def _largest_error(measurer: PairMeasurer, cache: ReferenceCache, loaders: Batches) -> float:
    """Score the pairs of `loaders` again and return the largest difference from the cache in nats per token.

    It is 0 for a value that is not finite in both, and infinite for a value that is finite in only one.
    """
    largest = torch.zeros((), dtype=torch.float64)
    for batch in chain.from_iterable(loaders):
        logps, _ = measurer.measure(batch, measurer.rows(batch))
        scored = torch.stack([logps.policy_chosen, logps.policy_rejected], 1).cpu()
        tokens = torch.stack([logps.chosen_tokens, logps.rejected_tokens], 1).cpu()
        stored = cache.logps(batch.pair_keys.numpy())
        apart = ((scored - stored).abs() / tokens).nan_to_num(nan=torch.inf, posinf=torch.inf)
        neither = ~torch.isfinite(scored) & ~torch.isfinite(stored)
        largest = torch.cat([largest[None], apart.masked_fill(neither, 0).flatten()]).max()
    return float(measurer.ranks.reduce(largest, "max"))
