"""Operations are counted as torch counts them, matrix product by matrix product."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from test_packed_forward import SIDES, random_pairs
from tiny_runs import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from datamodules.batches import pack
from lightning_modules.measuring import forward_operations, peak_operations, step_operations
from lightning_modules.scorer import ResponseScorer


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_pass_is_counted_but_for_its_attention(tied: bool) -> None:
    model, pairs = tiny_model("llama", tie_word_embeddings=tied), random_pairs()
    scorer = ResponseScorer(model)
    (rows,) = pack(pairs, range(len(pairs)), SIDES, "packed", 1000, math.inf)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        scorer(rows)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if "mm" in name)
    # the rotary angles are a product too, of one frequency per half head and token
    angles = products - forward_operations(model, rows.input_ids.numel(), len(rows.target_ids))
    assert 0 <= angles < 0.01 * products


def test_a_step_counts_what_it_cannot_avoid() -> None:
    model = tiny_model("llama")
    once = forward_operations(model, 100, 30)
    assert step_operations(model, model, 100, 30, 1.0) == 4 * once
    assert step_operations(model, None, 100, 30, 0.5) == 2 * once


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_operations(torch.device("cpu"), torch.float32) is None


def test_the_peak_of_a_gpu_is_the_dense_one_of_its_datasheet(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {"H100 80GB HBM3": 989.5e12, "H100 NVL": 835.5e12, "H200": 989.5e12, "B200": 2250e12, "Z1000": None}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {list(peaks)[device.index]}")
    peak_operations.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            found = [peak_operations(torch.device("cuda", number), torch.bfloat16) for number in range(len(peaks))]
            assert found == list(peaks.values())
    peak_operations.cache_clear()
    (said,) = caplog.messages
    assert "NVIDIA Z1000" in said
