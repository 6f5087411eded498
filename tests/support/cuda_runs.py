"""Runs of the product on the stand-in for a CUDA device: Trainer, loading, FlexAttention by plain operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cuda_stand_in import CUDA, StandIn
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_runs import quiet_trainer
from torch import Tensor
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode
from varlen_reference import varlen_reference

from lightning_modules import base
from lightning_modules.flex import packed_flex
from lightning_modules.pretrained import load_model


def plain_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_aux: Any = None,
    return_lse: bool = False,
    **_: Any,
) -> Any:
    """What FlexAttention computes, in ordinary operations; takes its arguments."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (states.to(torch.bfloat16) for states in (query, key, value))
    assert query.device == block_mask.kv_num_blocks.device, "the block mask lies on another device"
    # not by arange: a recomputation in the backward pass is out of the mode's sight
    place = torch.ones_like(query[0, 0, :, 0], dtype=torch.int64).cumsum(0) - 1
    row = torch.ones_like(query[:, 0, 0, 0], dtype=torch.int64).cumsum(0) - 1
    row, zero = row[:, None, None, None], row.new_zeros(())
    allowed = block_mask.mask_mod(row, zero, place[None, None, :, None], place[None, None, None, :])
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    scores = (query.float() @ key.float().transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
    if score_mod is not None:
        scores = score_mod(scores, row, zero, place[None, None, :, None], place[None, None, None, :])
    scores = scores.masked_fill(~allowed, -1e30)
    out = (torch.softmax(scores, -1) @ value.float()).to(value.dtype)
    lse = scores.logsumexp(-1)
    if return_aux is not None:
        return out, type("Aux", (), {"lse": lse})
    return (out, lse) if return_lse else out


def compile_in_name(module: torch.nn.Module, **_: Any) -> None:
    """What `Module.compile` leaves behind, without the compiler."""
    module._compiled_call_impl = module._call_impl


# what is compiled, by dotted name, and what stands there on the stand-in
COMPILED = {
    "lightning_modules.flex.compiled_flex": packed_flex,
    "lightning_modules.flex.flex_attention": plain_flex,
    "lightning_modules.attention.varlen_attn": varlen_reference,
    "torch.nn.Module.compile": compile_in_name,
}


@contextmanager
def cuda_stand_in() -> Iterator[StandIn]:
    """The stand-in, with what a run needs beside it; where there is a GPU, the GPU, on which nothing is counted."""
    if torch.cuda.is_available():
        yield StandIn()  # not entered
        return
    with ExitStack() as patches:
        for name, replacement in COMPILED.items():
            patches.enter_context(mock.patch(name, replacement))
        patches.enter_context(mock.patch.object(base, "load_model", _load_model))
        yield patches.enter_context(StandIn())


def _load_model(*args: Any, **settings: Any) -> Any:
    """transformers loads in threads, where no mode is on: load on the CPU, then move as asked."""
    here = torch.empty(0).device
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        model = load_model(*args, **settings)
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
    return model.to(here)


class StandInAccelerator(CPUAccelerator):
    """Lightning's CPU accelerator, which does not mind the device."""

    def setup_device(self, device: torch.device) -> None:
        pass


def cuda_trainer(
    folder: Path, callbacks: Sequence[Callback] = (), precision: str = "32-true", **settings: Any
) -> Trainer:
    """`quiet_trainer` on the stand-in, in `32-true` or `bf16-mixed`."""
    if torch.cuda.is_available():
        real = {"accelerator": "gpu", "precision": precision, "inference_mode": False}
        return quiet_trainer(folder, callbacks, **(real | settings))
    plugin = MixedPrecision("bf16-mixed", "cuda") if precision == "bf16-mixed" else Precision()
    strategy = SingleDeviceStrategy(CUDA, accelerator=StandInAccelerator(), precision_plugin=plugin)
    defaults = {"strategy": strategy, "accelerator": "auto", "inference_mode": False}
    return quiet_trainer(folder, callbacks, **(defaults | settings))


class Window(Callback):
    """What happened on the device within the last step: `waits`, `pinned` copies and the number of `operations`."""

    def __init__(self, device: StandIn) -> None:
        self.device = device

    def on_train_batch_start(self, *_: object) -> None:
        self._mark = len(self.device.waits), len(self.device.pinned), self.device.operations.total()

    def on_train_batch_end(self, *_: object) -> None:
        waits, pinned, operations = self._mark
        self.waits = self.device.waits[waits:]
        self.pinned = self.device.pinned[pinned:]
        self.operations = self.device.operations.total() - operations
