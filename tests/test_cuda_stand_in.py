"""The stand-in for a CUDA device refuses what CUDA refuses, passes what CUDA takes, and computes as the CPU."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from cuda_stand_in import CudaTensor, StandIn
from torch import Tensor

REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "operands": lambda cuda, host: cuda + host,
    "an index on the device for a tensor on the host": lambda cuda, host: host[cuda[:2, 0].long() * 0],
    "index_copy": lambda cuda, host: cuda.index_copy(0, torch.tensor([0]), cuda[:1]),
    "numpy": lambda cuda, host: cuda.numpy(),
    "cat": lambda cuda, host: torch.cat([cuda, host]),
    "matrix product": lambda cuda, host: cuda @ host.t(),
    "a default device": lambda cuda, host: host + _in_context(lambda: torch.ones(4, 3)),
    "index_put of values on the host": lambda cuda, host: cuda.index_put((torch.tensor([0]),), host[:1]),
}
PASSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a 0-dim operand": lambda cuda, host: cuda + host.sum(),
    "a number": lambda cuda, host: cuda * 2,
    "an index on the host": lambda cuda, host: cuda[torch.tensor([1, 2])],
    "zeros": lambda cuda, host: torch.zeros(4, 3, device="cuda") + cuda,
    "cpu": lambda cuda, host: cuda.cpu() + host,
    "new_zeros": lambda cuda, host: cuda.new_zeros(3) + cuda,
    "where": lambda cuda, host: torch.where(cuda > 0, cuda, torch.tensor(0.0)),
    "zeros_like on the host": lambda cuda, host: torch.zeros_like(cuda, device="cpu") + host,
}
WAITS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "item": ("wait", lambda cuda: cuda.sum().item()),
    "float": ("wait", lambda cuda: float(cuda.sum())),
    "bool": ("wait", lambda cuda: bool((cuda > 0).all())),
    "tolist": ("wait", lambda cuda: cuda.tolist()),
    "nonzero": ("wait", lambda cuda: torch.nonzero(cuda)),
    "boolean mask": ("wait", lambda cuda: cuda[cuda > 0]),
    "cpu": ("to host", lambda cuda: cuda.cpu()),
    "copy_": ("to host", lambda cuda: torch.zeros(4, 3).copy_(cuda)),
    "tensor": ("to device", lambda cuda: torch.tensor([1.0], device="cuda")),
    "to": ("to device", lambda cuda: torch.ones(2).to("cuda", non_blocking=True)),
    "index on the host": ("to device", lambda cuda: cuda[torch.tensor([1])]),
    "pinned": ("pinned", lambda cuda: torch.ones(2).pin_memory().to("cuda", non_blocking=True)),
}


def _in_context(make: Callable[[], Tensor]) -> Tensor:
    with torch.device("cuda"):
        return make()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_mixed_devices(name: str) -> None:
    host = torch.randn(4, 3)
    with StandIn() as device:
        with pytest.raises((RuntimeError, TypeError)):
            REFUSED[name](host.to("cuda"), host)
        assert len(device.violations) == 1


@pytest.mark.parametrize("name", PASSED)
def test_lets_pass_what_cuda_does(name: str) -> None:
    host = torch.randn(4, 3)
    with StandIn() as device:
        PASSED[name](host.to("cuda"), host)
        assert device.violations == []


@pytest.mark.parametrize("name", WAITS)
def test_counts_what_the_host_waits_for(name: str) -> None:
    kind, work = WAITS[name]
    with StandIn() as device:
        cuda = torch.ones(4, 3).to("cuda")
        device.waits.clear()
        work(cuda)
        assert [event.kind for event in (*device.waits, *device.pinned)] == [kind]


def test_gradients_are_those_of_the_cpu_and_modules_move() -> None:
    host = torch.nn.Linear(3, 2)
    values = torch.randn(4, 3)
    with StandIn():
        module = copy.deepcopy(host).to("cuda")
        assert isinstance(module.weight, CudaTensor)
        assert isinstance(module.weight, torch.nn.Parameter)
        twin = copy.deepcopy(module)
        host(values).square().sum().backward()
        for each in (module, twin):
            each(values.to("cuda")).square().sum().backward()
            gradient = each.weight.grad
            assert gradient is not None
            torch.testing.assert_close(gradient.cpu(), host.weight.grad)
        with torch.autocast("cuda", torch.bfloat16):
            assert module(values.to("cuda")).dtype == torch.bfloat16
            assert torch.is_autocast_enabled("cuda")
        assert not torch.is_autocast_enabled("cuda")
        assert module.cpu().weight.is_cpu


def test_tensors_are_saved_and_come_back_on_the_cpu() -> None:
    with StandIn():
        module = torch.nn.Linear(3, 2).to("cuda")
        file = io.BytesIO()
        torch.save({"weights": module.state_dict(), "one": module.weight}, file)
        file.seek(0)
        found = torch.load(file, weights_only=True)
        assert not isinstance(found["one"], CudaTensor)
        assert torch.equal(found["weights"]["weight"], module.weight.cpu())
        module.load_state_dict(found["weights"])
        assert isinstance(module.weight, CudaTensor)
