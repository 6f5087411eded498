"""A stand-in for a CUDA device on a machine without one.

`CudaTensor` wraps a CPU tensor and says that it lies on `cuda:0`. Every operation passes `__torch_dispatch__`; it
refuses what CUDA refuses (a CPU tensor among CUDA tensors, but for 0-dim operands and the indices of `x[i]`) and
counts what makes the host wait: `.item()`, `nonzero`, boolean masks, copies to the host, and copies to the device
from memory that is not pinned. `StandIn` is the mode in which `device="cuda"` and `.to("cuda")` make such tensors:

    with StandIn() as device:
        ...
    device.violations, device.waits      # lists of `Event`

Limits: no `torch.inference_mode` (its tensors cannot be wrapped), no compiler, no streams; within `torch.vmap` (and
so within `create_block_mask`) C++ takes the device to be the CPU, so indices on the host are not counted there. A
tensor is pickled as a CPU tensor, as `torch.load(map_location="cpu")` gives it back from a real device.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.utils.clip_grad
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import return_and_correct_aliasing

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("app", "lightning_modules", "datamodules", "callbacks")
aten = torch.ops.aten


class Event(NamedTuple):
    """A refused operation, a wait of the host, or a copy from pinned memory, which does not wait."""

    kind: str  # "mixed", "wait", "to host", "to device" or "pinned"
    operation: str
    where: str  # the innermost function of the project, `file:function`


# the size of the result, or a Python value, depends on the data
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "bool",
    aten.masked_select.default: "masked_select",
    aten.nonzero.default: "nonzero",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.unique_consecutive.default: "unique",
    aten.unique_dim.default: "unique",
    aten._unique2.default: "unique",
}
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
# elsewhere a 0-dim tensor of the host stands for a number; these want every tensor on the device
NO_SCALARS = (
    *("bmm", "cat", "embedding", "gather", "index_add", "index_copy", "index_select", "linear", "mm"),
    *("scatter", "stack", "topk"),
)

_current: StandIn | None = None


def _where() -> str:
    """The innermost function of the project that is running, else of whatever called."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    innermost = frame
    while frame is not None:
        if file := _of_the_project(frame.f_code.co_filename):
            return f"{file}:{frame.f_code.co_name}"
        frame = frame.f_back
    return f"{innermost.f_code.co_filename}:{innermost.f_code.co_name}"


@cache
def _of_the_project(file: str) -> str | None:
    """The path of a file of the project's packages from their root."""
    path = Path(file)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
        return str(path.relative_to(ROOT))
    return None


def _inside_vmap() -> bool:
    """Whether `torch.vmap` is running, in which indices are made where C++ takes the device to be: on the CPU."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith("_functorch/vmap.py"):
        frame = frame.f_back
    return frame is not None


def note(kind: str, operation: str) -> None:
    """Write an event down for the `StandIn` that is on."""
    if _current is not None and not (operation == "index" and _inside_vmap()):
        event = Event(kind, operation, _where())
        {"mixed": _current.violations, "pinned": _current.pinned}.get(kind, _current.waits).append(event)


class CudaTensor(Tensor):
    """A CPU tensor, `on_host`, that says it lies on a CUDA device."""

    on_host: Tensor

    @staticmethod
    def __new__(cls: type[CudaTensor], inner: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
            requires_grad=False,
        )
        made.on_host = inner.detach() if inner.requires_grad else inner
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own do

    def __repr__(self) -> str:  # type: ignore[override]  # nobody passes the contents
        return f"CudaTensor({self.on_host!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.on_host.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares what switches it off
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _current is not None and func.namespace == "aten":
            _current.operations[str(func)] += 1
        refuse_mixed_devices(func, args, kwargs)
        if func in WAITS:
            note("wait", WAITS[func])
        if func in INDEXED and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            note("wait", "boolean mask")
        if kwargs.get("device") is not None:
            # asked by C++, to which these tensors lie on the CPU: Python's own asking does not come here
            kwargs["device"] = torch.device("cpu")
        if func is aten.mm.dtype:  # which CPUs lack: the factors as they are, sums that are not rounded
            made = torch.mm(*(factor.on_host.to(args[2]) for factor in args[:2]))
        else:
            made = func(*mapped(_unwrap, args), **mapped(_unwrap, kwargs))
        written = kwargs["out"] if func is aten.mul.out else args[0] if func is aten.copy_.default else None
        if _current is not None and func is aten._to_copy.default:
            source = args[0]
            key = isinstance(source, torch.nn.Parameter), source.shape[-1] if source.ndim else 0
            _current.converted[key] += source.nbytes + made.nbytes
        if written is not None and not isinstance(written, CudaTensor):
            return written
        return return_and_correct_aliasing(func, args, kwargs, mapped(_wrap, made))


# torch's tree_map and tree_leaves, which know every kind of node, take longer than most operations


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every leaf of its lists, tuples and dicts changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(change, one) for one in value])
    if isinstance(value, dict):
        return {name: mapped(change, one) for name, one in value.items()}
    return change(value)


def leaves(*values: Any) -> Iterator[Any]:
    """Every leaf of lists, tuples and dicts, in order."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves(*value)
        elif isinstance(value, dict):
            yield from leaves(*value.values())
        else:
            yield value


def _unwrap(value: Any) -> Any:
    return value.on_host if isinstance(value, CudaTensor) else value


def _wrap(value: Any) -> Any:
    return CudaTensor(value) if isinstance(value, Tensor) and not isinstance(value, CudaTensor) else value


def refuse_mixed_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Raise RuntimeError where CUDA would; note the copies that it makes instead where it does not."""
    tensors = [leaf for leaf in leaves(args, kwargs) if isinstance(leaf, Tensor)]
    host = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if not host or len(host) == len(tensors):
        return
    name = str(func)
    if func is aten.mul.out and len(host) == 1 and host[0] is kwargs["out"]:
        return  # DDP's buckets, which C++ allocates where it takes the device to be
    if func in COPIES:
        if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            note("to host", "copy_")
        elif not getattr(host[0], "_stand_in_pinned", False):
            note("to device", "copy_")
    elif (
        func in INDEXED and isinstance(args[0], CudaTensor) and not any(t.dim() for t in host if t is _value(args))
    ):
        note("to device", "index")
    elif any(tensor.dim() for tensor in host) or any(part in name for part in NO_SCALARS):
        note("mixed", f"{name} {[(tensor.device.type, *tensor.shape) for tensor in tensors]}")
        raise RuntimeError(f"Expected all tensors to be on the same device ({name})")


def _value(args: Any) -> Any:
    """What `index_put` writes."""
    return args[2] if len(args) > 2 else None


class _ToCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return CudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _unwrap(gradient).clone()


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: CudaTensor) -> Tensor:
        return tensor.on_host.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return CudaTensor(gradient.clone())


def to_cuda(tensor: Tensor) -> Tensor:
    if isinstance(tensor, CudaTensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _ToCuda.apply(tensor)
    return CudaTensor(tensor.detach().clone())


def to_host(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, CudaTensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _ToHost.apply(tensor)
    return tensor.on_host.detach().clone()


def names_cuda(device: Any) -> bool:
    """Whether `device`, in any of the ways torch takes it, is a CUDA device; a bare number is one."""
    if device is None or isinstance(device, bool):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


# --- what Python's side of torch does -----------------------------------------------------------------------


def _move(tensor: Tensor, device: Any, dtype: torch.dtype | None = None, copy: bool = False) -> Tensor:
    if device is not None and names_cuda(device) and not isinstance(tensor, CudaTensor):
        if tensor.numel():
            note("pinned" if getattr(tensor, "_stand_in_pinned", False) else "to device", "to")
        tensor = to_cuda(tensor)
    elif device is not None and not names_cuda(device) and isinstance(tensor, CudaTensor):
        note("to host", "to")
        tensor = to_host(tensor)
    return tensor.to(dtype, copy=copy) if dtype is not None else tensor.clone() if copy else tensor


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` in all its forms."""
    device, dtype, other = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")
    for value in args:
        if isinstance(value, Tensor):
            other = value
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool)):
            device = value
    if other is not None:
        device, dtype = other.device, other.dtype
    return _move(tensor, device, dtype, kwargs.get("copy", False))


def _to_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, CudaTensor):
        note("mixed", "numpy")
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return Tensor.numpy(tensor, *args, **kwargs)


def _to_list(tensor: Tensor) -> Any:
    if isinstance(tensor, CudaTensor):
        note("wait", "tolist")
    return _unwrap(tensor).tolist()


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, CudaTensor):
        raise RuntimeError("cannot pin 'torch.cuda.LongTensor' only dense CPU tensors can be pinned")
    pinned: Any = tensor.clone()
    pinned._stand_in_pinned = True
    return pinned


def _set_data(tensor: Tensor, value: Tensor) -> None:
    if isinstance(tensor, CudaTensor):
        tensor.on_host = _unwrap(value)
    Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]


def _new_tensor(tensor: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    made = _unwrap(tensor).new_tensor(*args, **kwargs)
    on_cuda = isinstance(tensor, CudaTensor) if device is None else names_cuda(device)
    return _move(made, CUDA) if on_cuda else made


_OWN: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: lambda tensor, *_, **__: _move(tensor, CUDA),
    Tensor.cpu: lambda tensor, *_, **__: _move(tensor, "cpu"),
    Tensor.numpy: _to_numpy,
    Tensor.__array__: _to_numpy,
    Tensor.tolist: _to_list,
    Tensor.pin_memory: _pin,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.new_tensor: _new_tensor,
    Tensor.data_ptr: lambda tensor: Tensor.data_ptr(_unwrap(tensor)),
}
_FROM_THE_HOST = (torch.tensor, torch.as_tensor, torch.asarray)


class StandIn(TorchFunctionMode):
    """Within the block, CUDA is there: see the head of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.violations: list[Event] = []
        self.waits: list[Event] = []
        self.pinned: list[Event] = []
        self.operations: Counter[str] = Counter()
        # bytes read and written by conversions of type, by whether of a parameter, and by the last dimension
        self.converted: Counter[tuple[bool, int]] = Counter()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> StandIn:
        global _current
        _current = self
        # `Module.to` would swap the data of a parameter, which keeps its type; a new Parameter takes the type along
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        for place in (torch, torch.amp, torch.amp.autocast_mode):
            self._patches.enter_context(mock.patch.object(place, "autocast", _Autocast))
        fork = torch.random.fork_rng
        for place, name, value in (
            (torch.random, "fork_rng", lambda devices=(), *args, **kwargs: fork([], *args, **kwargs)),
            (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)),
            (torch.cuda, "get_device_name", lambda device=None: _H100.name),
            (torch.cuda, "get_device_properties", lambda device=None: _H100),
            (torch.cuda, "get_device_capability", lambda device=None: (_H100.major, _H100.minor)),
            (torch.utils.checkpoint, "_infer_device_type", lambda *args: "cpu"),
            (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", _grouped),
        ):
            self._patches.enter_context(mock.patch.object(place, name, value))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        global _current
        _current = None
        super().__exit__(*error)
        self._patches.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        if func is Tensor.backward:
            # what backward passes call (recomputation, custom functions) shall see the mode as well
            with _Same(self):
                names = {"gradient": "grad_tensors"}
                options = {names.get(name, name): value for name, value in kwargs.items()}
                return torch.autograd.backward(args[0], *args[1:], **options)
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        if not names_cuda(device):  # zeros_like(cuda, device="cpu")
            return func(*mapped(_unwrap, args), **kwargs)
        del kwargs["device"]
        if any(isinstance(leaf, CudaTensor) for leaf in leaves(args)):
            return func(*args, **kwargs)
        gradient = kwargs.pop("requires_grad", False)
        made = func(*args, device="cpu", **kwargs)
        if func in _FROM_THE_HOST and made.numel():
            note("to device", func.__name__)
        moved = mapped(lambda value: to_cuda(value) if isinstance(value, Tensor) else value, made)
        return moved.requires_grad_() if gradient else moved


class _Same(TorchFunctionMode):
    """`mode` once more, inside of its own `__torch_function__`, where torch has switched it off."""

    def __init__(self, mode: StandIn) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.mode.__torch_function__(func, types, args, kwargs)


def _grouped(tensors: Any) -> Any:
    """The gradients by device, which C++ takes to be the CPU."""
    groups: dict[Any, Any] = _group_tensors_by_device_and_dtype(tensors)
    return {(lists[0][0].device, dtype): (lists, places) for (_, dtype), (lists, places) in groups.items()}


class _Autocast(torch.autocast):
    """Autocast to a CUDA type happens on the CPU, and is asked for as CUDA's."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        self.cuda = str(device_type).startswith("cuda")
        super().__init__("cpu" if self.cuda else device_type, *args, **kwargs)

    def __enter__(self) -> Any:
        entered = super().__enter__()
        if self.cuda:
            self.before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
            torch.set_autocast_enabled("cuda", self._enabled)
            torch.set_autocast_dtype("cuda", self.fast_dtype)
        return entered

    def __exit__(self, *error: Any) -> Any:
        if self.cuda:
            torch.set_autocast_enabled("cuda", self.before[0])
            torch.set_autocast_dtype("cuda", self.before[1])
        return super().__exit__(*error)


class _H100:
    name = "NVIDIA H100 80GB HBM3"
    major, minor, multi_processor_count = 9, 0, 132
    total_memory = 85 * 10**9


def counted(events: list[Event]) -> Counter[tuple[str, str, str]]:
    """How often each kind of event happened at each place."""
    return Counter(events)
