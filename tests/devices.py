"""Several accelerators that are not there: "sim:0", "sim:1", ... behave like GPUs and compute on the CPU.

They are torch's PrivateUse1 backend, written in Python. A tensor on such a device holds a tensor of the CPU. Each
operation checks that its tensors are on one device, computes on the CPU, and returns tensors on the device, so that
results are real and can be compared with those of a model on the CPU. Each device has a random state of its own.

`simulate` changes torch for the whole process, so tests call it in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend

NAME, COUNT = "sim", 3
READ: list[str] = []
"""What was read from the devices, for which a GPU is waited for."""
_LIBRARY = torch.library.Library("aten", "IMPL")
_GENERATORS = [torch.Generator() for _ in range(COUNT)]


def simulate() -> None:
    """Adds the devices to this process."""
    _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    _LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
    _LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
    _LIBRARY.impl("_to_copy", _to_copy, "PrivateUse1")
    torch.Generator = _Generator
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.autograd._engine_run_backward = _in_one_thread(torch.autograd._engine_run_backward)


class Simulated(torch.Tensor):
    """A tensor on a simulated device."""

    raw: torch.Tensor
    """Its values, on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device | str) -> Simulated:
        device = torch.device(device)
        index = 0 if device.index is None else device.index
        if not 0 <= index < COUNT:
            raise RuntimeError(f"invalid device ordinal {index}: there are {COUNT} devices")
        with torch.inference_mode(False):  # a view that inference mode takes of a parameter is no inference tensor
            made = torch.Tensor._make_wrapper_subclass(
                cls, raw.size(), strides=raw.stride(), dtype=raw.dtype, device=torch.device(NAME, index)
            )
        made.raw = raw
        return made

    @property
    def data(self) -> Simulated:
        return self.detach()

    @data.setter
    def data(self, value: Simulated) -> None:
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        READ.append("a list")
        return self.raw.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.device} tensor to numpy: use Tensor.cpu() first")

    def __format__(self, form: str) -> str:
        return format(self.raw, form)

    def __repr__(self, **options: Any) -> str:
        return f"Simulated({self.raw!r}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            READ.append("a scalar")
        if _is_composed(func):  # in inference mode torch leaves it to the backend
            return func.decompose(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            return _copied(func, args, kwargs)
        device = _common_device(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if _draws(func) and kwargs.get("generator") is None:
            kwargs["generator"] = _GENERATORS[device.index]
        wrapped = {id(each.raw): each for each in _tensors(args, kwargs) if isinstance(each, Simulated)}
        result = func(*_mapped(_raw, args), **{name: _mapped(_raw, value) for name, value in kwargs.items()})

        def on_device(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if (given := wrapped.get(id(value))) is None:
                return Simulated(value, device)
            if (given.shape, given.stride()) != (value.shape, value.stride()):  # resized in place
                given.data = Simulated(value, device)
            return given

        return _mapped(on_device, result)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A value, or the elements of a list or tuple, after a function."""
    return type(value)(_mapped(function, each) for each in value) if type(value) in (list, tuple) else function(value)


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operation's arguments, also in lists."""
    values = [*args, *kwargs.values()]
    each = [inner for value in values for inner in (value if isinstance(value, list | tuple) else [value])]
    return [value for value in each if isinstance(value, torch.Tensor)]


@cache
def _is_composed(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _draws(func: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags and any(
        each.name == "generator" for each in func._schema.arguments
    )


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Simulated) else value


def _common_device(func: Any, args: Any, kwargs: Any) -> torch.device:
    """The device of an operation. Raises RuntimeError for tensors on two devices; a scalar of the CPU may be used."""
    tensors = _tensors(args, kwargs)
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        tensors = [each for each in tensors if each is args[0] or each.device.type != "cpu"]  # as on a GPU
    devices = {each.device for each in tensors if each.ndim or each.device.type != "cpu"}
    asked = kwargs.get("device")
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got {', '.join(map(str, devices))}"
        )
    if asked is not None:
        return torch.device(asked)
    return devices.pop()


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Copies, which alone may be between devices."""
    if func.overloadpacket is torch.ops.aten.copy_:
        _raw(args[0]).copy_(_raw(args[1]))
        return args[0]
    device = torch.device(kwargs.pop("device", None) or args[0].device)
    kwargs.pop("pin_memory", None)
    copy = func(_raw(args[0]), **kwargs)
    if device.type == NAME:
        return Simulated(copy, device)
    READ.append("a copy")
    return copy


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Simulated:
    return Simulated(torch.empty(size, dtype=dtype), device)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Simulated:
    return Simulated(torch.empty_strided(size, stride, dtype=dtype), device)


def _to_copy(tensor: torch.Tensor, *, dtype: Any = None, device: Any = None, **options: Any) -> Simulated:
    return Simulated(tensor.to(dtype) if dtype else tensor.clone(), device)


class _Generator(torch.Generator):
    """A generator, which a backend without C++ cannot make: for a simulated device it draws the numbers of a CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)


def _in_one_thread(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass in its caller's thread: torch has a thread for the first device of a backend in Python only."""

    def run(*args: Any, **options: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return backward(*args, **options)

    return run


class _Hook(_DummyPrivateUse1Hook):
    """What torch's C++ code asks a backend."""

    def device_count(self) -> int:
        return COUNT


class _Module:
    """`torch.sim`, as `torch.cuda` is: the devices, and the random state of each."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        for each in _GENERATORS:
            each.manual_seed(seed)

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return _GENERATORS[_index(device)].get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        _GENERATORS[_index(device)].set_state(state)


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0
