"""`model.reference: cached` trains like `frozen`, scores a pair once, and is not fooled by what it finds."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_runs import cuda_stand_in, cuda_trainer
from tiny_runs import (
    Recorder,
    beta_dpo,
    controlled,
    preference,
    quiet_trainer,
    rarest_token,
    relative_difference,
    tiny_model,
    weights,
)

from app.core.cache import cache_root
from app.core.errors import UserError
from lightning_modules import reference_cache
from lightning_modules.measuring import Ranks
from lightning_modules.reference_cache import ReferenceCache, reference_fingerprint, reload
from lightning_modules.sharding import ShardedStrategy


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))


def run(
    folder: Path, name: str, reference: str, tokens: int = 300, pairs: int = 40, steps: int = -1
) -> tuple[Any, Any, Any]:
    recorder = Recorder()
    module = preference(name, reference=reference)
    trainer = quiet_trainer(folder, [*beta_dpo(), recorder], limit_val_batches=1.0, max_steps=steps)
    trainer.fit(module, controlled(pairs, micro_batch_tokens=tokens))
    return module, recorder.decisions, trainer


def parts() -> list[Path]:
    return sorted(cache_root("references").glob("*/*.npy"))


@pytest.mark.parametrize("tokens", [8192, 300])
def test_trains_as_with_the_frozen_reference(tiny_llama: str, tmp_path: Path, tokens: int) -> None:
    frozen, expected, first = run(tmp_path, tiny_llama, "frozen", tokens)
    cached, seen, second = run(tmp_path, tiny_llama, "cached", tokens)
    assert cached.measurer.reference is None  # no second model
    assert len(seen) == len(expected) == 4
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours.gaps, theirs.gaps, rtol=0, atol=2e-5)
        assert torch.equal(ours.kept, theirs.kept)
    assert relative_difference(weights(frozen), weights(cached)) < 1e-5
    for name, value in first.callback_metrics.items():
        if name.startswith("val/"):
            torch.testing.assert_close(second.callback_metrics[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_runs_share_it_whatever_their_settings(
    tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, tiny_llama, "cached")
    before = parts()
    with pytest.MonkeyPatch.context() as patch:  # nothing to write, so the folder may be read-only
        patch.delattr("lightning_modules.reference_cache.Lock")
        run(tmp_path, tiny_llama, "cached", steps=1)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning_modules"):
        module = preference(tiny_llama, reference="cached", beta0=0.3)
        quiet_trainer(tmp_path, max_steps=1).fit(module, controlled(40, batch_size=8, micro_batch_tokens=115))
        assert "scoring the pairs" not in caplog.text
        assert parts() == before
        # pairs that are new are scored, and only those
        run(tmp_path, tiny_llama, "cached", pairs=60, steps=1)
        assert "scoring the pairs" in caplog.text
    (added,) = set(parts()) - set(before)
    assert len(np.load(added)) == 20
    # and another model is another reference
    other = str(tmp_path / "other")
    retrained, _, _ = run(tmp_path, tiny_llama, "frozen", steps=2)
    retrained.policy.model.save_pretrained(other)
    run(tmp_path, other, "cached", steps=1)
    assert len({path.parent for path in parts()}) == 2


def test_another_type_is_another_reference(tiny_llama: str, tmp_path: Path) -> None:
    for precision in ("32-true", "64-true"):
        module = preference(tiny_llama, reference="cached")
        quiet_trainer(tmp_path, max_steps=1, precision=precision).fit(module, controlled(10))
    assert len({path.parent for path in parts()}) == 2


def test_what_was_scored_before_an_interruption_stays(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_modules.reference_cache._BATCHES_PER_PART", 1)
    added: list[int] = []
    original = ReferenceCache.add

    def interrupted(self: ReferenceCache, keys: np.ndarray, logps: np.ndarray) -> None:
        if len(added) == 2:
            added.append(0)
            raise KeyboardInterrupt
        original(self, keys, logps)
        added.append(len(keys))

    monkeypatch.setattr(ReferenceCache, "add", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path, tiny_llama, "cached")
    assert len(parts()) == 2
    run(tmp_path, tiny_llama, "cached", steps=1)
    assert added == [10, 10, 0, 10, 10, 7]


def test_pairs_of_another_command_are_refused_in_a_sentence(tiny_llama: str, tmp_path: Path) -> None:
    module, data = preference(tiny_llama, reference="cached"), controlled(20)
    trainer = quiet_trainer(tmp_path, limit_val_batches=1.0, max_steps=1)
    for _ in range(2):
        trainer.validate(module, data, verbose=False)
    with pytest.raises(UserError, match=r"model\.reference: cached scored the pairs of the command"):
        trainer.fit(module, data)


def test_a_damaged_part_is_scored_anew(tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, expected, _ = run(tmp_path, tiny_llama, "cached")
    (part,) = parts()
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    _, seen, _ = run(tmp_path, tiny_llama, "cached")
    assert f"{part} is damaged" in caplog.text
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.equal(ours.gaps, theirs.gaps)


@pytest.mark.parametrize("spoil", [lambda chosen: chosen - 1, lambda chosen: chosen * np.nan])
def test_log_probabilities_of_another_model_are_scored_again(
    spoil: Any, tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, tiny_llama, "cached", steps=1)
    (part,) = parts()
    rows = np.load(part)
    part.unlink()
    ReferenceCache(part.parent).add(rows["key"], np.stack([spoil(rows["chosen"]), rows["rejected"]], 1))
    run(tmp_path, tiny_llama, "cached", steps=1)
    assert caplog.text.count("every pair is scored again") == 1
    assert parts() == [part]  # the same content, hence the same name
    caplog.clear()
    run(tmp_path, tiny_llama, "cached", steps=1)
    assert "scored again" not in caplog.text


def test_a_pair_that_is_not_finite_does_not_stand_in_the_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[rarest_token()] = torch.inf
    model.save_pretrained(tmp_path / "spoilt")
    found = []
    for _ in range(2):  # the second run finds the pair stored
        _, decisions, _ = run(tmp_path, str(tmp_path / "spoilt"), "cached", pairs=20)
        found.append([decision.eligible.sum().item() for decision in decisions])
    assert "scored again" not in caplog.text
    assert found[0] == found[1]
    assert sum(found[0]) == 19


def test_another_attention_is_another_reference(tiny_llama: str, tmp_path: Path) -> None:
    for attention in ("pairwise", "sdpa", "auto"):  # auto is pairwise here
        module = preference(tiny_llama, reference="cached", attention=attention)
        quiet_trainer(tmp_path, max_steps=1).fit(module, controlled(10))
    assert len({path.parent for path in parts()}) == 2


def test_another_layout_or_device_is_another_reference(tiny_llama: str, tmp_path: Path) -> None:
    for layout in ("auto", "separate"):
        module = preference(tiny_llama, reference="cached", attention="sdpa", layout=layout)
        quiet_trainer(tmp_path, max_steps=1).fit(module, controlled(10))
    assert len({path.parent for path in parts()}) == 2
    with cuda_stand_in():
        module = preference(tiny_llama, reference="cached", attention="sdpa")
        cuda_trainer(tmp_path, max_steps=1).fit(module, controlled(10))
    assert len({path.parent for path in parts()}) == 3


def test_whatever_rounds_otherwise_is_another_reference(tmp_path: Path) -> None:
    def key(
        strategy: Any = None, compiled: bool = False, dtype: torch.dtype = torch.bfloat16, shares: int = 2
    ) -> str:
        scorer = SimpleNamespace(attention="varlen", layout="packed", compiled=compiled, model=tiny_model("llama"))
        ranks = SimpleNamespace(device=torch.device("cuda"), strategy=strategy, size=2, shares=shares)
        return reference_fingerprint(str(tmp_path), SimpleNamespace(policy=scorer, ranks=ranks), dtype)  # type: ignore[arg-type]

    sharded = ShardedStrategy()
    assert len({key(), key(compiled=True), key(sharded), key(sharded, shares=1), key(dtype=torch.float32)}) == 5
    assert key(sharded, dtype=torch.float32) == key(dtype=torch.float32)


def two_ranks(other: float) -> Ranks:
    """Ranks of which the other one holds the number `other`; the strategy reduces in place, as Lightning's do."""

    def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return value.clamp_(min=other) if reduce_op == "max" else value.add_(other).div_(2)

    ranks = object.__new__(Ranks)
    ranks.strategy = SimpleNamespace(reduce=reduce, barrier=lambda: None)  # type: ignore[assignment]
    ranks.size, ranks.number, ranks.shares, ranks.device = 2, 0, 2, torch.device("cpu")
    return ranks


def test_ranks_that_read_while_another_run_writes_wait_for_it(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, tiny_llama, "cached", steps=1)
    alike = iter([False])  # only the first look finds ranks apart
    real = reference_cache.same_count
    monkeypatch.setattr(reference_cache, "same_count", lambda *of: next(alike, None) is None and real(*of))
    run(tmp_path, tiny_llama, "cached", steps=1)
    assert next(alike, None) is None


def test_a_cache_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.add(np.array([4, -7]), np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    reload(cache, two_ranks(other=2.0))
    with pytest.raises(UserError, match="differs from rank to rank: set BETA_DPO_CACHE"):
        reload(cache, two_ranks(other=3.0))


def test_evaluation_of_a_checkpoint_keeps_the_first_weights_as_reference(tiny_llama: str, tmp_path: Path) -> None:
    module, _, trainer = run(tmp_path, tiny_llama, "cached")
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    found = {}
    for reference in ("frozen", "cached"):
        fresh = quiet_trainer(tmp_path, limit_val_batches=1.0)
        fresh.validate(
            preference(tiny_llama, reference=reference), controlled(40), ckpt_path=tmp_path / "trained.ckpt"
        )
        found[reference] = dict(fresh.callback_metrics)
    assert float(found["frozen"]["val/gap_mean"]) != 0
    for name, value in found["frozen"].items():
        torch.testing.assert_close(found["cached"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert module.reference == "cached"


def test_a_pair_that_is_not_stored_is_an_error(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    assert not cache.knows(np.array([3, 4])).any()
    cache.add(np.array([4, -7]), np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    cache.load()
    assert cache.knows(np.array([-7, 3, 4, 2**62])).tolist() == [True, False, True, False]
    assert cache.logps(np.array([4, -7, 4])).tolist() == [[-1, -2], [-3, -4], [-1, -2]]
    with pytest.raises(UserError, match="1 pairs"):
        cache.logps(np.array([4, 3]))
