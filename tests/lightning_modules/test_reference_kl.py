"""KL(π‖π_ref) along the responses against plain whole distributions, over micro-batches; none without reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import controlled, preference, quiet_trainer, weights
from transformers import AutoModelForCausalLM

from app.method.losses import SimPOLoss
from app.method.pair_loss import token_kl


class Measured(Callback):
    """The KL of every step, and the weights that it was measured with."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.kl: list[torch.Tensor | None] = []

    def on_reward_gaps(self, trainer: Any, pl_module: Any, decision: Any) -> None:
        self.before.append(weights(pl_module))
        decision.eligible[0] = decision.kept[0] = decision.step != 2  # as if its gap were not finite
        self.kl.append(decision.measure_kl and decision.measure_kl())


@pytest.mark.parametrize("tokens", [8192, 115])
def test_it_equals_the_whole_distributions(tokens: int, tiny_llama: str, tmp_path: Path) -> None:
    seen = Measured()
    trainer = quiet_trainer(tmp_path, [seen], max_steps=3)
    trainer.fit(preference(tiny_llama, lr=0.1), controlled(40, micro_batch_tokens=tokens))
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(2))
    data = controlled(40, micro_batch_tokens=tokens)
    data.trainer = trainer
    data.setup("fit")
    for step, (batch, before, kl) in enumerate(zip(data.train_dataloader(), seen.before, seen.kl, strict=False)):
        policy.load_state_dict({name.removeprefix("model."): t for name, t in before.items()}, strict=False)
        expected = torch.tensor(
            [[plain_kl(policy, reference, p.prompt, r) for p in batch.share for r in (p[side],)] for side in (1, 2)]
        )
        if step == 1:
            expected[:, 0] = torch.nan
        assert kl is not None
        torch.testing.assert_close(kl, expected.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        assert (kl.nan_to_num() == 0).all() if step == 0 else (kl[:, 1:] > 1e-3).all()


def plain_kl(policy: Any, reference: Any, prompt: Any, response: Any) -> float:
    """Σ over the response's tokens of Σ_v π(v)·(log π(v) − log π_ref(v)), one plain row."""
    ids = torch.cat([torch.from_numpy(prompt), torch.from_numpy(response)])[None]
    with torch.no_grad():
        ours, fixed = (torch.log_softmax(m(input_ids=ids).logits.double(), -1) for m in (policy, reference))
    rows = slice(len(prompt) - 1, -1)
    return float((ours.exp() * (ours - fixed))[0, rows].sum())


def test_no_reference_no_kl(tiny_llama: str, tmp_path: Path) -> None:
    seen = Measured()
    quiet_trainer(tmp_path, [seen], max_steps=1).fit(preference(tiny_llama, loss=SimPOLoss()), controlled(10))
    assert seen.kl == [None]


def test_the_direction_by_hand() -> None:
    policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    # ½·log(½/¾) + ½·log(½/¼) = ½·log(4/3)
    assert token_kl(policy, reference).item() == pytest.approx(0.5 * torch.tensor(4 / 3).log().item())
    assert token_kl(policy + 3.0, policy).item() == pytest.approx(0, abs=1e-6)
