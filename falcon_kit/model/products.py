"""How a CPU multiplies rows by a weight matrix: the way that is fastest for the dtype, the rows and the instructions.

`python -m benchmarks cpu` measures all ways. Milliseconds of one thread for a matrix of 8192 x 2048, on a CPU with
AVX512-BF16, and on the same CPU with its instructions limited to AVX2:

                              1      4      8     16     32    128 rows
float32                     3.4    7.4    7.7   10.7   20.1   53.4
float32 in slabs            3.5    6.3    7.2    9.8   15.1   47.0
bfloat16, oneDNN            2.3    2.1    2.5    3.0    4.1   10.6
bfloat16, torch's own       1.6    5.8   11.8   20.9   39.0    147
AVX2: bfloat16              1.4    5.6   11.3   20.3   39.0    148
AVX2: bfloat16 in slabs     3.1    4.8    5.8    8.4   13.9   46.5

**In slabs.** Outputs are computed 4 MiB of weights at a time, which stay in the cache of a core. float32 gains by that
alone. Where the CPU has no instruction for 16-bit products, a slab is first copied to float32, which is exact. A copy
of the whole matrix takes 35 ms, nearly all for new pages of memory; a slab's memory is used again, and takes 2 ms.
With fewer than 128 rows, each thread has its share of a slab's outputs, since torch divides such a product badly: with
two threads, 8 rows of float32 take 10.2 ms by torch and 5.5 in slabs.

**Single rows.** A decoding step of one text reads every weight once, and reading limits its speed. oneDNN, torch's
default, is optimised for many rows. On some CPUs torch's own kernel reads 16-bit weights faster for a single row.
`faster_without_onednn` measures both.

**In integers.** Where the CPU has VNNI, instructions for integers (Intel's Cascade Lake of 2019 and Alder Lake of 2021,
AMD's Zen 4 of 2022), oneDNN multiplies weights of 8 bits by rows of two bytes a value, which lose next to nothing.
`packed.py` in `loading/` has the times, and the other ways of weights in 8 and 4 bits.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from falcon_kit.catalogue.memory import SLAB

_MANY_ROWS = {torch.float32: 2, torch.bfloat16: 4, torch.float16: 4}
"""Rows from which slabs are faster; 16 bits only without instructions for their products."""
_LEAST_IN_INTEGERS = SLAB
"""Weights from which a row is multiplied faster in integers: its two bytes take about 0.05 ms to make."""
_AT_ONCE_IN_INTEGERS = 128
"""Rows that are multiplied in integers at once, so that their bytes and products take little memory."""
_ZERO, _UNITS = 128, 32512
"""The byte that stands for zero, and the units of a row's largest value: 127 of the high byte."""
_DIVIDED_WELL = 128
"""Rows from which torch itself divides a product well among threads; it needs no second copy of the product."""
_MKLDNN: Any = torch.backends.mkldnn  # the old name of oneDNN; torch does not type its properties
_SAMPLE = 128 * 2**20  # bytes of weights to time: more than the caches of a CPU hold
_ROUNDS = 5
_MARGIN = 0.9  # torch's own kernel must be 10% faster, so that noise does not change the choice


def fastest_products(
    rows: int, head: Tensor, single_rows_without_onednn: bool, largest: int
) -> AbstractContextManager[Any]:
    """The context for a step of so many rows on a CPU. head: the output head, in the dtype of the step.

    largest: the weights of the largest layer. A model of small layers loses nothing: it gets no context.
    """
    if rows == 1:
        return without_onednn() if single_rows_without_onednn and head.dtype.itemsize == 2 else nullcontext()
    return ProductsInSlabs() if _gains_by_slabs(rows, largest, head.dtype) else nullcontext()


# In slabs


def _gains_by_slabs(rows: int, weights: int, dtype: torch.dtype) -> bool:
    """Whether slabs are faster for so many rows and a matrix of so many weights on a CPU."""
    if rows < _MANY_ROWS.get(dtype, 2**31):
        return False
    return 4 * weights > SLAB if dtype == torch.float32 else not has_products(dtype)


class ProductsInSlabs(TorchFunctionMode):
    """A context in which linear layers compute in slabs where that is faster, in this thread, without gradients.

    The layers stay `nn.Linear`, so that hooks, adapters and quantisation find them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and is_faster_in_slabs(*args[:2]):
            return linear_in_slabs(*args)
        return func(*args, **(kwargs or {}))


def is_faster_in_slabs(input: Tensor, weight: Tensor) -> bool:
    """Whether `linear_in_slabs` is the fastest way for an input (..., in) and a weight (out, in)."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu" or input.dtype != weight.dtype:
        return False
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return False
    return _gains_by_slabs(input.shape[:-1].numel(), weight.numel(), weight.dtype)


def linear_in_slabs(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` with products in float32, rounded once."""
    rows = input.reshape(-1, input.shape[-1]).float()
    product = input.new_empty(len(rows), len(weight))
    for outputs, values in slabs_of(weight, torch.float32):
        part = by_threads(rows, values)
        product[:, outputs] = part if bias is None else part + bias[outputs].float()
    return product.view(*input.shape[:-1], len(weight))


def by_threads(rows: Tensor, weight: Tensor) -> Tensor:
    """`functional.linear` in float32; for few rows as a batch of products, a share of the outputs for each thread."""
    if len(rows) >= _DIVIDED_WELL:
        return functional.linear(rows, weight)
    shares = gcd(len(weight), 1 << (torch.get_num_threads() - 1).bit_length())
    product = torch.bmm(rows.expand(shares, *rows.shape), weight.view(shares, -1, weight.shape[1]).mT)
    return product.transpose(0, 1).reshape(len(rows), len(weight))


def slabs_of(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The slabs of a weight (out, in): outputs, and their values in a dtype. Each uses the memory of the one before."""
    copy: Tensor | None = None
    out, into = weight.shape
    for outputs in slabs(out, into, dtype):
        part = weight[outputs]
        if weight.dtype != dtype:
            copy = torch.empty_like(part, dtype=dtype) if copy is None else copy[: len(part)]
            part = copy.copy_(part)
        yield outputs, part


def slabs(out: int, into: int, dtype: torch.dtype) -> Iterator[slice]:
    """The outputs of a matrix (out, in) in multiples of 64, at most `SLAB` bytes in a dtype at a time."""
    step = max(1, SLAB // dtype.itemsize // into // 64) * 64
    return (slice(first, min(out, first + step)) for first in range(0, out, step))


@torch.compiler.assume_constant_result  # torch.compile takes the answer and does not trace the questions
def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this dtype in instructions of its own; others take up to ten times as long."""
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if dtype != torch.bfloat16:
        return True
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported()) if supported else True


# In integers


def integer_product(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """rows (n, in) times int8 weights from `packed_for_integers`, whose outputs have scales (out,): (n, out).

    The product has the dtype of the rows. It is exact, but for the error of `two_bytes` and the rounding to that dtype.
    """
    middle = torch.zeros(1, dtype=torch.int64, device=rows.device)  # the weights' zero
    product = rows.new_empty(len(rows), len(scales))
    for part, into in zip(rows.split(_AT_ONCE_IN_INTEGERS), product.split(_AT_ONCE_IN_INTEGERS), strict=True):
        halves, unit = two_bytes(part)
        arguments: Any = halves, 1.0, _ZERO, weight, scales.float(), middle, None, 1.0, 0, torch.float32, "none", [], ""
        high, low = torch.ops.onednn.qlinear_pointwise(*arguments).view(2, *into.shape)
        torch.mul(low.add_(high, alpha=256), unit, out=into)
    return product


def two_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, in) as high and low bytes (2 n, in), and the unit (n, 1) of each.

    A row is (256 (high - 128) + low - 128) unit. The error is at most half a unit, 1/65,024 of the row's largest value,
    where bfloat16's is up to 1/512 of each value.
    """
    unit = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / _UNITS
    units = (rows / unit).add_(257 * _ZERO + 0.5).to(torch.int32)
    halves = torch.empty(2, *rows.shape, dtype=torch.uint8, device=rows.device)
    halves[1] = units  # takes the lowest bits
    halves[0] = units.bitwise_right_shift_(8)
    return halves.flatten(0, 1), unit


def packed_for_integers(weight: Tensor) -> Tensor:
    """int8 weights (out, in) in oneDNN's layout, which only oneDNN reads; `unpacked` undoes it."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def unpacked(weight: Tensor) -> Tensor:
    """The weights (out, in) that `packed_for_integers` was given; their inputs are not contiguous."""
    return weight.to_dense().T


def multiplies_in_integers(out: int, into: int) -> bool:
    """Whether the CPU multiplies by weights (out, in) fastest by `integer_product`; the sums must fit into 32 bits."""
    if out * into < _LEAST_IN_INTEGERS or into * 255 * 127 >= 2**31:
        return False
    return _has_integer_products(torch.backends.cpu.get_cpu_capability())


@cache
def _has_integer_products(capability: str) -> bool:
    """Whether oneDNN has instructions for integers, VNNI, and torch this operator.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which large ones exceed. That is what is tested: torch tells
    which instructions the CPU has, and not which ones oneDNN is limited to.
    """
    if capability not in ("AVX2", "AVX512"):
        return False
    row, weight = torch.ones(1, 64, device="cpu"), torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    try:
        return bool((integer_product(row, packed_for_integers(weight), row[0]) == 64 * 127).all())
    except (AttributeError, RuntimeError):  # torch without oneDNN, or with an operator that takes other arguments
        return False


# A single row


class Switch:
    """Turns a setting of the whole process off until the last of several users has left."""

    def __init__(self, read: Callable[[], bool], write: Callable[[bool], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._users = 0
        self._before = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context with the setting off. Several threads may enter it at once."""
        with self._lock:
            if self._users == 0:
                self._before = self._read()
                self._write(False)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and not self._read():  # other code may have turned it on: then it stays on
                    self._write(self._before)


_onednn = Switch(lambda: bool(_MKLDNN.enabled), partial(setattr, _MKLDNN, "enabled"))


def without_onednn() -> AbstractContextManager[None]:
    """A context in which torch uses its own CPU kernels instead of oneDNN. Several threads may enter it at once.

    The setting also affects other threads: their results stay correct, but may take longer. The context has no effect
    after `torch.backends.disable_global_flags`, which locks the setting.
    """
    return nullcontext() if torch.backends.flags_frozen() else _onednn.off()


def faster_without_onednn(weights: Sequence[Tensor]) -> bool:
    """Whether torch's own kernel multiplies one row by these weights at least 10% faster than oneDNN.

    `weights`: matrices (out, in). Only 16-bit weights on a CPU are timed, about 128 MiB of them, in about 0.1 seconds;
    without any, returns False. The kernels alternate, and their median times are compared.
    """
    sample = _sample(weights)
    if not sample or not _MKLDNN.is_available():
        return False
    with torch.inference_mode():
        rows = [torch.ones(1, weight.shape[1], dtype=weight.dtype, device="cpu") for weight in sample]
        onednn, own = [], []
        for _ in range(_ROUNDS):
            onednn.append(_seconds(rows, sample))
            with without_onednn():
                own.append(_seconds(rows, sample))
    return statistics.median(own) < _MARGIN * statistics.median(onednn)


def _sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """The first 16-bit weights on a CPU, up to about `_SAMPLE` bytes."""
    sample: list[Tensor] = []
    for weight in weights:
        if weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
            sample.append(weight)
            if sum(each.nbytes for each in sample) >= _SAMPLE:
                break
    return sample


def _seconds(rows: list[Tensor], weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for row, weight in zip(rows, weights, strict=True):
        functional.linear(row, weight)
    return time.perf_counter() - start
