"""Compile FlexAttention for an H100 without a GPU: `make codegen`, table in docs/benchmarks.md.

Dynamo captures the package's own call on the CPU, Inductor lowers it for fake CUDA tensors, and Triton and ptxas
assemble each kernel for sm_90. No kernel is launched. The result shows only that a kernel can be built, and its
shared memory, registers and spills. Needs a CUDA build of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.tables import ROOT, save, today

# head width, query heads, key heads, window, soft cap
CELLS: dict[str, tuple[int, int, int, int | None, float | None]] = {
    "64": (64, 4, 4, None, None),
    "80": (80, 4, 4, None, None),
    "96": (96, 4, 4, None, None),
    "128": (128, 4, 4, None, None),
    "64, GQA 3:1": (64, 9, 3, None, None),
    "128, GQA 4:1": (128, 8, 2, None, None),
    "128, GQA 4:1, window": (128, 8, 2, 200, None),
    "128, GQA 2:1, soft cap": (128, 4, 2, None, 50.0),
    "256, GQA 2:1": (256, 4, 2, None, None),
    "256, GQA 2:1, window, soft cap": (256, 4, 2, 200, 50.0),
}
SHARED_MEMORY = 232448  # most bytes for a thread block of an H100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=list(CELLS), help="compile one cell here and print its kernels")
    parser.add_argument("--limit", type=int, default=300, help="seconds for a cell")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(kernels_of(*CELLS[options.cell])))
        return
    import torch
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    entry: dict[str, Any] = {"date": today(), "versions": versions, "cells": {}}
    for name in CELLS:
        entry["cells"][name] = in_a_process(name, options.limit)
        print(name, entry["cells"][name], flush=True)
        save(entry, "codegen")


def in_a_process(name: str, limit: int) -> dict[str, Any]:
    """Compile one cell in a process of its own; return its kernels and seconds, or why it stopped."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.codegen", "--cell", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"stopped": f"not finished within {limit} s"}
    if done.returncode:
        return {"stopped": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return {"kernels": json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.monotonic() - started)}


def kernels_of(
    width: int, heads: int, key_heads: int, window: int | None, softcap: float | None
) -> list[dict[str, Any]]:
    """Return every kernel of the forward and backward pass of `flex.attend`, in bf16, on a row of three pairs."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch
    import torch.nn.attention.flex_attention as flex_attention
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    from app.method.batch import PairRun
    from lightning_modules import flex
    from lightning_modules.pair_runs import PairRuns

    def accepted(*_: Any) -> None:  # Dynamo traces it: a Mock would break the graph
        pass

    built: list[dict[str, Any]] = []
    collect_kernels(built)
    backend = aot_autograd(
        fw_compiler=for_an_h100("forward"),
        bw_compiler=for_an_h100("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    runs = PairRuns([PairRun(40, (20, 30)), PairRun(150, (70, 90)), PairRun(300, (100, 224))])  # 1024 tokens
    query, key, value = (
        torch.randn(1, n, 1024, width, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    )
    with (
        mock.patch.object(flex, "compiled_flex", flex.compile_flex(backend)),
        mock.patch.object(flex_attention, "_validate_device", accepted),
    ):
        flex.attend(query, key, value, runs, window, None, softcap).sum().backward()
    return built


def collect_kernels(built: list[dict[str, Any]]) -> None:
    """Make Inductor assemble every configuration of a kernel into `built`, without loading or launching it."""
    import torch
    import torch._inductor.config as settings
    import torch._inductor.runtime.triton_heuristics as heuristics
    import triton
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": SHARED_MEMORY, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            utils=SimpleNamespace(get_device_properties=lambda _: limits),
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _=0: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            set_current_device=lambda _: None,
            get_device_capability=lambda _=0: (9, 0),
            get_device_interface=lambda: torch.cuda,
            is_active=lambda: True,
            launcher_cls=None,
            map_python_to_cpp_type=lambda kind: kind,
        )
    )
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(settings, name):
            setattr(settings, name, False)

    def precompile(tuner: Any, *_: Any, **__: Any) -> None:
        for config in tuner.configs:
            kernel = tuner._precompile_config(config).kernel
            built.append(
                {"name": tuner.fn.__name__, "shared": kernel.metadata.shared} | assembled(kernel.asm["ptx"])
            )
        tuner.launchers, tuner.configs = [None], None

    heuristics.CachingAutotuner.precompile = precompile


def assembled(ptx: str) -> dict[str, Any]:
    """Return ptxas's registers and spilled bytes per thread, and whether Hopper's matrix instructions are used."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "-arch", architecture[1], file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas: {(done.stdout + done.stderr)[:500]}")
    told = done.stderr
    registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    return {
        "registers": int(registers[1]) if registers else None,
        "spilled": int(spilled[1]) if spilled else 0,
        "wgmma": "wgmma" in ptx,
    }


def for_an_h100(title: str) -> Callable[..., Any]:
    """Return a compiler for `aot_autograd` that builds the kernels of an H100 and runs the graph as it is."""
    import torch
    from torch._inductor.compile_fx import compile_fx_inner
    from torch.utils._pytree import tree_map

    def compiler(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        fake = torch._guards.detect_fake_mode(inputs)

        def on_cuda(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            with fake:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

        twin = copy.deepcopy(graph)
        with an_h100():
            for module in twin.modules():
                for node in getattr(module, "graph", torch.fx.Graph()).nodes:
                    if "val" in node.meta:
                        node.meta["val"] = tree_map(on_cuda, node.meta["val"])
                    node.meta.pop("tensor_meta", None)
                    if node.kwargs.get("device") is not None:
                        node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
                getattr(module, "recompile", lambda: None)()
            compile_fx_inner(twin, [on_cuda(value) for value in inputs], is_backward=title == "backward")
        return lambda *arguments: graph(*arguments)

    return compiler


@contextlib.contextmanager
def an_h100() -> Iterator[None]:
    """Make torch and Triton believe within the block that an H100 is present."""
    import torch
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.scheduler as scheduler
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton as triton_there
    from torch._dynamo.device_interface import CudaInterface

    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=85 * 10**9,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_MEMORY,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        is_integrated=False,
    )
    worker = CudaInterface.Worker
    says: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", True),
        (torch.cuda, "_lazy_init", None),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "device_count", 1),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", (9, 0)),
        (torch.cuda, "get_device_name", properties.name),
        (torch.cuda, "synchronize", None),
        (torch.cuda, "get_rng_state", torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", None),
        (torch.cuda, "set_device", None),
        (torch.cuda, "is_bf16_supported", True),
        (torch.cuda, "_exchange_device", 0),
        (torch.cuda, "_maybe_exchange_device", 0),
        (torch._C, "_cuda_getDevice", 0),
        (torch._C, "_cuda_setDevice", None),
        (torch._C, "_cuda_getCurrentRawStream", 0),
        (worker, "get_device_properties", properties),
        (worker, "current_device", 0),
        (CudaInterface, "get_device_properties", properties),
        (CudaInterface, "current_device", 0),
        (CudaInterface, "is_available", True),
        (CudaInterface, "get_compute_capability", 90),
        (CudaInterface, "device_count", 1),
        (fake_tensor, "init_gpu_context", None),
        (scheduler, "has_triton", True),
        (triton_there, "has_triton", True),
        (helpers, "set_driver_to_gpu", None),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, answer in says:

            def replacement(*_: Any, answer: Any = answer, **__: Any) -> Any:
                return answer

            of_class = place in (worker, CudaInterface)
            stack.enter_context(
                mock.patch.object(place, name, staticmethod(replacement) if of_class else replacement)
            )
        yield


if __name__ == "__main__":
    main()
