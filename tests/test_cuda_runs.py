"""Every path of the product on the stand-in for a CUDA device: no mixed devices, the results of the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from cuda_runs import Window, cuda_stand_in, cuda_trainer
from tiny_runs import Recorder, beta_dpo, controlled, preference, quiet_trainer, relative_difference, weights


def test_a_step_is_that_of_the_cpu(tiny_llama: str, tmp_path: Path) -> None:
    """FlexAttention on the stand-in against attention pair by pair on the CPU, in several micro-batches."""
    data = {"micro_batch_tokens": 150}
    expected, seen = preference(tiny_llama), preference(tiny_llama)
    records = Recorder(), Recorder()
    quiet_trainer(tmp_path, [*beta_dpo(), records[0]], max_steps=3).fit(expected, controlled(40, **data))
    with cuda_stand_in() as device:
        cuda_trainer(tmp_path, [*beta_dpo(), records[1], Window(device)], max_steps=3).fit(
            seen, controlled(40, **data)
        )
        assert (seen.policy.attention, seen.layout) == ("flex_attention", "packed")
    assert device.violations == []
    for ours, theirs in zip(records[1].decisions, records[0].decisions, strict=True):
        torch.testing.assert_close(ours.gaps, theirs.gaps, rtol=0, atol=2e-5)
        assert torch.equal(ours.kept, theirs.kept)
    assert relative_difference(weights(expected), {name: t.cpu() for name, t in weights(seen).items()}) < 1e-5
