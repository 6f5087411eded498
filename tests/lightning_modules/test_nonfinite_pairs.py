"""A pair without a finite gap is named, counted and left out, and takes no other pair and no weight with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    Recorder,
    beta_dpo,
    controlled,
    predicted,
    preference,
    quiet_trainer,
    rarest_token,
    save_tiny_model,
    table_of,
    tiny_model,
    weights,
)
from transformers import AutoModelForCausalLM

from app.core.errors import UserError
from app.method.losses import AlphaDPOLoss
from datamodules import PreferenceData
from datamodules.controlled_task import build_tokenizer

PAIRS, BATCH = 20, 10


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model with an infinite embedding for a token that one training pair alone holds; and this pair's id."""
    table, rows = table_of(controlled(PAIRS))
    token = rarest_token(PAIRS)
    (row,) = (r for r in rows if any(token in ids for ids in table[int(r)] if ids is not None))
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.inf
    folder = tmp_path_factory.mktemp("spoilt")
    model.save_pretrained(folder)
    return str(folder), table.pair_ids([row])[0]


def train(folder: Path, name: str, tokens: int, layout: str = "auto", **settings: Any) -> tuple[Any, Recorder]:
    recorder = Recorder()
    module = preference(name, layout=layout, **settings)
    trainer = quiet_trainer(folder, [*beta_dpo(), recorder])
    trainer.fit(module, controlled(PAIRS, batch_size=BATCH, micro_batch_tokens=tokens))
    return module, recorder


def test_a_reference_that_is_not_finite_leaves_a_pair_out_though_the_gap_does_not_use_it(
    spoilt: tuple[str, str], tiny_llama: str, tmp_path: Path
) -> None:
    module, recorder = train(tmp_path, tiny_llama, 8192, reference_name=spoilt[0], loss=AlphaDPOLoss())
    left_out = [id for d in recorder.decisions for id, good in zip(d.pair_ids, d.eligible, strict=True) if not good]
    assert left_out == [spoilt[1]]
    assert all(weight.isfinite().all() for weight in weights(module).values())


@pytest.mark.parametrize("layout", ["auto", "separate"])
@pytest.mark.parametrize("tokens", [8192, 150])
def test_named_counted_and_left_out(
    layout: str, tokens: int, spoilt: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, bad = spoilt
    with caplog.at_level(logging.WARNING, logger="lightning_modules"):
        module, recorder = train(tmp_path, name, tokens, layout)
    assert module.policy.layout == ("packed" if layout == "auto" else "separate")
    assert module.nonfinite_pairs == 1
    assert caplog.text.count("no finite reward gap, left out") == 1
    assert f"left out: {bad}\n" in caplog.text
    eligible = {id: ok for d in recorder.decisions for id, ok in zip(d.pair_ids, d.eligible.tolist(), strict=True)}
    assert len(eligible) == PAIRS
    assert [id for id, ok in eligible.items() if not ok] == [bad]
    for decision in recorder.decisions:
        others = int(decision.eligible.sum())
        assert int(decision.kept.sum()) == int(others * 0.6 + 1e-9)
        assert not (decision.kept & ~decision.eligible).any()
        assert decision.moments is not None
        assert torch.isfinite(torch.tensor([decision.moments.mean, decision.beta_used])).all()
    clean = {n: t for n, t in weights(module).items() if "embed_tokens" not in n}
    assert all(torch.isfinite(tensor).all() for tensor in clean.values())
    assert module.trainer.callback_metrics["train/nonfinite_pairs"] == 1
    assert torch.isfinite(module.trainer.callback_metrics["train/loss"])


def test_too_many_stop_the_run_before_the_weights_move(spoilt: tuple[str, str], tmp_path: Path) -> None:
    name, bad = spoilt
    with pytest.raises(
        UserError, match=rf"1 of 10 pairs have no finite reward gap .*\({bad}\).*max_nonfinite_share"
    ):
        train(tmp_path, name, 8192, max_nonfinite_share=0.05)


def test_neighbours_keep_their_scores(spoilt: tuple[str, str], tmp_path: Path) -> None:
    # the same scores, whether the pairs lie in one row with the bad one or in rows of their own
    scores = []
    for layout in ("packed", "separate"):
        module = preference(spoilt[0], layout=layout)
        scores.append(predicted(quiet_trainer(tmp_path), module, controlled(PAIRS), "policy_chosen_logp"))
    assert int(torch.isnan(scores[0]).sum()) <= 1
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-3, equal_nan=True)


def test_the_count_survives_a_resume(spoilt: tuple[str, str], tmp_path: Path) -> None:
    module, _ = train(tmp_path, spoilt[0], 8192)
    module.trainer.save_checkpoint(tmp_path / "c.ckpt")
    again = preference(spoilt[0])
    trainer = quiet_trainer(tmp_path, beta_dpo(), max_epochs=2)
    trainer.fit(again, controlled(PAIRS, batch_size=BATCH), ckpt_path=str(tmp_path / "c.ckpt"))
    assert again.nonfinite_pairs == 2


@pytest.mark.parametrize(("number", "side"), [(1, "prompt"), (2, "chosen")])
def test_a_pair_that_is_not_finite_does_not_fail_the_start_up_check(
    number: int, side: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETA_DPO_CACHE", str(tmp_path / "cache"))
    name = save_tiny_model("llama", tmp_path / "m")
    model: Any = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[build_tokenizer().convert_tokens_to_ids(" wolf")] = torch.nan
    model.save_pretrained(name)
    rows = [{"prompt": " tell me" + " the" * n, "chosen": " red fox .", "rejected": " owl ."} for n in range(5)]
    rows[number][side] += " wolf ."
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), validation_path=str(tmp_path / "pairs.jsonl"))
    trainer = quiet_trainer(tmp_path, limit_val_batches=1.0)
    with caplog.at_level(logging.INFO, "lightning_modules"):
        (figures,) = trainer.validate(preference(name), data, verbose=False)
    assert (figures["val/pairs"], figures["val/nonfinite_pairs"]) == (4, 1)
    assert "start-up check passed (attention pairwise, packed rows): 3 pairs of the data" in caplog.text
    assert f"the longest possible one, {data.longest[0]} tokens" in caplog.text
