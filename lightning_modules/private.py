"""Every private or undocumented part of other packages, and of glibc, that this package uses.

They may change in any release. The default tests passed with torch 2.13.0, transformers 5.23.0, lightning 2.6.6 and
bitsandbytes 0.50.2, and `tests/test_cuda_runs.py::test_trains_as_on_the_cpu` with torch 2.11.0 and transformers
5.17.0. `checkpoint` also names classes that the index of a sharded checkpoint may hold, without their import.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.tensor_parallel import apply_tensor_parallelism, replace_layer_number_by_wildcard

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST = -1, -3, 2**31 - 1  # malloc.h


def compile_modules(modules: Iterable[nn.Module], compiled: bool) -> None:
    """Compile `modules` for any size of their inputs or, without `compiled`, undo it."""
    # grad mode, training mode and kinds of layers each need a graph of the same code; torch keeps only 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in modules:
        if compiled:
            module.compile(dynamic=True)
        else:
            module._compiled_call_impl = None


def mark_dynamic(tensor: Tensor, dimensions: list[int]) -> None:
    """Let the compiler expect any size of these dimensions, without an error if one size is all it sees."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimensions)


def storage_id(tensor: Tensor) -> int:
    """Return a number that tensors, also fake ones, share if they share memory."""
    return tensor.untyped_storage()._cdata


def dtensor_like(local: Tensor, like: DTensor) -> DTensor:
    """Return `local` as this rank's part of a DTensor laid out as `like`, as FSDP2 makes them."""
    # DTensor.from_local would move the shards of an offloaded model to the device of the mesh
    return DTensor(local, like._spec, requires_grad=False)


def attention_of(config: Any) -> str:
    return str(config._attn_implementation)


def takes_attentions(model: Any) -> bool:
    """Return whether the model calls its attention through `AttentionInterface`."""
    return bool(model._supports_attention_backend)


def hub_commit(config: Any) -> str | None:
    """Return the commit of the Hub that a model came from; None for a folder."""
    return getattr(config, "_commit_hash", None)


def keep_packing(model: Any) -> None:
    """Keep layers in 4 bits from the inference kernel of AVX512-BF16, which rounds scales and has no gradient."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def start_method(strategy: Any) -> str | None:
    """Return how a strategy starts processes: `popen`, `spawn`, `fork`; None if it starts none."""
    return getattr(strategy, "_start_method", None)


def load_state_of_loader(trainer: Any) -> None:
    """Give the training loader its state, which Lightning does not when a finished run gets more epochs."""
    loop = trainer.fit_loop
    states, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
    if states:
        loop._combined_loader._load_state_dicts(states)


def leave_signals(trainer: Any) -> None:
    """Take away Lightning's handlers of signals: they call collectives while ranks may be at different points."""
    trainer._signal_connector.register_signal_handlers = lambda: None


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory, unless the user has settings; return whether it accepted."""
    # glibc returns blocks above 32 MB to the system, which clears the same pages at every step (docs/benchmarks.md)
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    return (
        mallopt is not None
        and not own
        and all(mallopt(option, LARGEST) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
    )
