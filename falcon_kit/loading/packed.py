"""Linear layers with 8-bit and 4-bit weights on torch's own kernels.

bitsandbytes is built for GPUs and for training: on CPUs its 8 and 4 bits take several times as long as 16. These layers
call `torch._weight_int8pack_mm` and `torch._weight_int4pack_mm`, which read the small weights and little else, and
which torch.compile understands. torchao's int4 on CUDA calls the same kernel; its layer for CPUs is a prototype, and
what it saves on one kind of device does not load on another.

int8: W = q s, with one scale for each output. int4: W = (q - 8) s + z, with a scale and a zero for each group of 64
inputs of an output; q is from 0 to 15.

Where a CPU has instructions for integers, a large layer of int8 is in oneDNN's layout and multiplied in integers, see
`model/products.py`. Otherwise, from some number of rows, the weights are unpacked and multiplied in slabs. A matrix of
8192 x 2048 in milliseconds of one thread, with AVX512-BF16 and VNNI, and on the same CPU limited to AVX2:

                           1      8     16     32    128 rows
bfloat16                 2.3    2.5    3.0    4.1   10.6
int8 in integers         1.2    1.7    2.4    3.6   10.5
int4, kernel             0.6    1.9    3.4    6.8   25.3
int4 in slabs           10.1   11.0   11.1   12.6   19.7
AVX2: bfloat16           1.4   11.3   20.3   39.0    148
AVX2: bfloat16 in slabs  3.1    5.8    8.4   13.9   46.5
AVX2 and VNNI: int8      1.6    2.7    4.1    7.0   22.2
AVX2: int8, kernel       1.4    5.1    9.2   19.6   73.8
AVX2: int8 in slabs      2.5    5.9    8.0   14.0   46.3
AVX2: int4, kernel       1.9    3.9    7.2   14.7   57.5
AVX2: int4 in slabs      8.1   11.6   14.1   19.8   55.1
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from falcon_kit.catalogue.memory import INT4_GROUP
from falcon_kit.model import products
from falcon_kit.model.products import by_threads, has_products

GROUP = INT4_GROUP
_PANEL = 64
"""Rows that the kernels' layouts keep together, a multiple of theirs."""
_MANY_ROWS = {("int8", True): 14, ("int8", False): 24, ("int4", True): 96, ("int4", False): 96}
"""Rows from which a CPU with (True) or without instructions for bfloat16 is faster with unpacked weights than with the
kernel."""
_MANY_ON_GPU = 64
"""The same of a GPU."""
_ALIGNMENT = 64
"""Bytes: torch._weight_int8pack_mm of torch 2.13 crashes on a CPU where its input or weight starts elsewhere."""
_INNER_TILES = 4
"""Tiles of 16 inputs that CUDA's kernel keeps together: with 4, the inputs are a multiple of 64."""


def check_shape(out: int, into: int, name: str) -> None:
    """Raises ValueError for a matrix that int4's kernels cannot hold."""
    if out % _PANEL or into % GROUP:
        raise ValueError(
            f"dtype='int4' needs matrices of multiples of {GROUP}; {name} is {out} x {into}: use dtype='nf4' or 'int8'"
        )


class PackedLinear(nn.Linear):
    """A linear layer with weights in 8 or 4 bits, in memory as the kernel of their device needs them.

    A forward pass changes nothing, so several threads may share the layer: it is packed when weights are read or moved.
    Before `pack`, int4's weight is (out, in / 2): two values in a byte, the first in the low bits. So it is in a state
    dict, in host memory, where int8's is (out, in, 1): plain transformers would take (out, in) for the weight itself.
    int8's parameter in oneDNN's layout has no storage: torch reads it by `to_dense`, which is (in, out).
    """

    def __init__(self, out: int, into: int, kind: str, bias: Tensor | None, device: Any = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = into, out, kind
        self.packed_for: str | None = None
        """Whose layout the weight has: int4 of a kind of device, int8 "onednn"; None as read from a checkpoint."""
        if kind == "int4":
            weight = torch.empty(out, into // 2, dtype=torch.uint8, device=device)
            scales = torch.empty(into // GROUP, out, 2, dtype=torch.bfloat16, device=device)
        else:
            weight = torch.empty(out, into, dtype=torch.int8, device=device)
            scales = torch.empty(out, dtype=torch.bfloat16, device=device)
        self.weight, self.scales = frozen(weight), frozen(scales)
        self.register_parameter("bias", None if bias is None else frozen(bias))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of the input."""
        rows = input.reshape(-1, self.in_features)
        product: Tensor = cast(Any, _Product).apply(rows, self) if rows.requires_grad else self.product(rows)
        product = product.reshape(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def product(self, rows: Tensor) -> Tensor:
        """(rows, in) to (rows, out), without the bias. Raises RuntimeError for a layer that was left unpacked."""
        if self.kind == "int4" and self.packed_for is None:  # the kernel would read the values in another order
            raise RuntimeError(
                f"an int4 layer on {self.weight.device} is in the layout of no kernel (of CPUs or of CUDA), as after "
                "a move that was interrupted: move the model again, falcon.model.to('cpu') or .to('cuda')"
            )
        if self.packed_for == "onednn":
            return self.in_integers(rows)
        on_cpu = rows.device.type == "cpu"
        many = len(rows) >= (_MANY_ROWS[self.kind, has_products(torch.bfloat16)] if on_cpu else _MANY_ON_GPU)
        if many and on_cpu and (self.kind == "int8" or block(self.in_features)):
            return self.in_slabs(rows)
        if not on_cpu and (many or self.kind == "int8"):  # on a GPU, int8 is for layers that were moved there
            return self.in_whole(rows)
        return self.by_kernel(rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a weight in oneDNN's layout cannot be traced
    def in_integers(self, rows: Tensor) -> Tensor:
        """int8's product by instructions for integers."""
        return products.integer_product(rows, self.weight, self.scales)

    def by_kernel(self, rows: Tensor) -> Tensor:
        """The product by torch's kernel for few rows, which reads the small weights and little else."""
        # bfloat16 is the dtype that each of the kernels computes fast; a copy is aligned
        few = rows.to(torch.bfloat16, copy=self.kind == "int8")
        if self.kind == "int8":
            product = torch._weight_int8pack_mm(few, self.weight, self.scales)
        elif self.packed_for == "cuda":
            product = torch._weight_int4pack_mm(few, self.weight, GROUP, self.scales)
        else:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(few, self.weight, GROUP, self.scales)
        return product.to(rows.dtype)

    def in_whole(self, rows: Tensor) -> Tensor:
        """The product with weights that are unpacked all at once."""
        dtype = products_dtype(rows)
        return functional.linear(rows.to(dtype), self.dequantised(dtype)).to(rows.dtype)

    def in_slabs(self, rows: Tensor) -> Tensor:
        """The product with weights that are unpacked a slab at a time."""
        dtype = products_dtype(rows)
        multiply = by_threads if dtype == torch.float32 else functional.linear
        product, rows = rows.new_empty(len(rows), self.out_features), rows.to(dtype)
        if self.kind == "int8":  # the values are exact in bfloat16
            for outputs, values in products.slabs_of(self.weight, dtype):
                product[:, outputs] = multiply(rows, values) * self.scales[outputs].to(dtype)
            return product
        parts = list(products.slabs(self.out_features, self.in_features, torch.float32))
        memory = rows.new_empty(self.in_features * parts[0].stop)  # of the first slab, the largest; all use it
        for outputs in parts:
            product[:, outputs] = torch.mm(rows, self._columns(outputs, memory))
        return product

    def _columns(self, outputs: slice, memory: Tensor) -> Tensor:
        """int4's weights (in, outputs), from the layout of the kernel, in memory of the dtype of the product."""
        width = block(self.in_features)
        packed = self.weight.data.view(torch.uint8)[outputs].view(-1, self.in_features, width // 2).transpose(0, 1)
        nibbles = torch.cat([packed & 15, packed >> 4], -1).view(torch.int8).sub_(8)
        values = memory[: nibbles.numel()].copy_(nibbles.flatten()).view(-1, GROUP, outputs.stop - outputs.start)
        scale, zero = self.scales[:, None, outputs].to(memory.dtype).movedim(-1, 0).contiguous()
        torch.addcmul(zero, values, scale, out=values)  # computed in float32, rounded once
        return values.view(self.in_features, -1)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the layer computes with."""
        if self.kind == "int8":
            weight = products.unpacked(self.weight.data) if self.packed_for == "onednn" else self.weight
            return weight.to(dtype).mul_(self.scales.to(dtype)[:, None])
        # in place where possible: a matrix of the 40B has up to 268 million values; torch.compile needs equal strides
        values = self._values().view(torch.int8).sub_(8).to(dtype).view(self.out_features, -1, GROUP)
        scale, zero = (each.T.to(dtype).contiguous()[..., None] for each in self.scales.unbind(-1))
        return torch.addcmul(zero, values, scale, out=values).view(self.out_features, self.in_features)

    def pack(self) -> None:
        """Puts the weight into the layout of its device's kernel, at an address that the kernel accepts."""
        device, shape = self.weight.device.type, (self.out_features, self.in_features)
        if self.kind == "int8":
            self.weight, self.packed_for = frozen(self.canonical().view(shape)), None
        if self.kind == "int8" and device == "cpu" and products.multiplies_in_integers(*shape):
            self.weight, self.packed_for = frozen(products.packed_for_integers(self.weight.data)), "onednn"
        elif self.kind == "int4" and device in ("cpu", "cuda"):
            self.weight, self.packed_for = frozen(_kernel_layout(halves(self.canonical()))), device
        elif self.weight.data_ptr() % _ALIGNMENT:  # a tensor in a file that is mapped into memory
            self.weight = frozen(self.weight.clone())

    def canonical(self) -> Tensor:
        """The weight as it was read, int4's as in a state dict: (out, in / 2)."""
        if self.packed_for == "onednn":
            return products.unpacked(self.weight.data).contiguous()
        if self.packed_for is None:
            return self.weight.data
        return joined(self._values())

    def _values(self) -> Tensor:
        """int4's values (out, in), from 0 to 15, in memory of their own."""
        if self.packed_for is None:
            return halves(self.weight.data)
        where = _order(self.in_features, str(self.weight.device))
        nibbles = halves(self.weight.data.view(torch.uint8).reshape(-1, _PANEL * self.in_features // 2))
        return nibbles[:, where].reshape(self.out_features, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        self.weight, self.packed_for = frozen(self.canonical()), None
        scales = self.scales.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = frozen(scales.to(self.weight.device))  # a change of dtype is not theirs
        self.pack()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.canonical()
        if self.packed_for is not None:  # it is a copy, and a GPU need not have room for those of all layers
            weight = weight.cpu()
        destination[f"{prefix}weight"] = weight[..., None] if self.kind == "int8" else weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (key := f"{prefix}weight") not in state_dict:  # as of an adapter: the weight stays packed
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self.weight, self.packed_for = frozen(self.canonical()), None
        if self.kind == "int8":
            state_dict[key] = state_dict[key].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pack()

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: oneDNN's layout cannot be."""
        return self.__dict__ | {
            "_parameters": self._parameters | {"weight": frozen(self.canonical())},
            "packed_for": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """The product with a packed weight, whose gradient goes to the input alone, as QLoRA needs it."""

    @staticmethod
    def forward(context: Any, rows: Tensor, layer: PackedLinear) -> Tensor:
        context.layer = layer
        return layer.product(rows)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        dtype = products_dtype(gradient)
        return (gradient.to(dtype) @ context.layer.dequantised(dtype)).to(gradient.dtype), None


def products_dtype(rows: Tensor) -> torch.dtype:
    """The dtype in which many rows are multiplied: float32 on CPUs whose bfloat16 products are slow."""
    return torch.bfloat16 if rows.device.type != "cpu" or has_products(torch.bfloat16) else torch.float32


def frozen(values: Tensor) -> nn.Parameter:
    """A parameter that is never trained."""
    return nn.Parameter(values, requires_grad=False)


# Quantising


def quantised8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values (out, in) and bfloat16 scales (out,). The scales are rounded before the values."""
    values, scales = zip(*map(_slab_in_int8, _slabs(weight)), strict=True)
    return torch.cat(values), torch.cat(scales)


def quantised4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int4 values (out, in / 2) as in a state dict, and bfloat16 scales and zeros (in / 64, out, 2)."""
    values, scales = zip(*map(_slab_in_int4, _slabs(weight)), strict=True)
    return torch.cat(values), torch.cat(scales, 1)


def _slabs(weight: Tensor) -> Iterator[Tensor]:
    """A few outputs of a weight at a time: their copies in float32 take little memory, and a fifth of the time."""
    return (weight[outputs] for outputs in products.slabs(len(weight), weight.shape[1], torch.float32))


def _slab_in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.abs().amax(1).float() / 127).clamp(min=1e-12).to(torch.bfloat16)
    values = weight.to(torch.float32, copy=True).div_(scales.float()[:, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales


def _slab_in_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.to(torch.float32, copy=True).view(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-12).to(torch.bfloat16)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    values = groups.sub_(zero.float()[..., None]).div_(scale.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return joined(values.to(torch.uint8).flatten(1)), torch.stack([scale.T, zero.T], -1)


def halves(packed: Tensor) -> Tensor:
    """(..., n) bytes to (..., 2 n) values of four bits, the low bits first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def joined(values: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return values[..., ::2] | values[..., 1::2] << 4


# The layouts of the kernels


def _kernel_layout(values: Tensor) -> Tensor:
    """Values of four bits (out, in) in the layout of the kernel of their device."""
    if values.device.type == "cuda":
        high_first = values[:, ::2] << 4 | values[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(high_first, _INNER_TILES)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile looks through a cache
def _order(into: int, device: str) -> Tensor:
    """`_layout`, which a compiled step takes as it is, and does not find anew."""
    return _layout(into, device)


@lru_cache(maxsize=16)
def _layout(into: int, device: str) -> Tensor:
    """Where the kernel's layout keeps each value of 64 rows of `into` inputs; the order of its values, flat.

    Each device and instruction set has its own order, which torch does not describe and cannot undo. It is found by
    packing the positions themselves, four bits at a time.
    """
    positions = torch.arange(_PANEL * into, device=device)
    found = torch.zeros_like(positions)
    for shift in range(0, positions.numel().bit_length(), 4):
        digits = (positions >> shift & 15).to(torch.uint8).view(_PANEL, into)
        found |= halves(_kernel_layout(digits).view(torch.uint8).flatten()).long() << shift
    return found.argsort()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile looks through a cache
def block(into: int) -> int:
    """The outputs that the CPU kernel's layout keeps together for each input, a half of them in the low bits.

    64 with AVX-512, 32 with AVX2; 0 for a layout that is ordered in another way.
    """
    return _block(into)


@lru_cache(maxsize=16)
def _block(into: int) -> int:
    found, order = _layout(into, "cpu"), torch.arange(_PANEL * into, device="cpu")
    blocks = {size: order.view(-1, into, size // 2, 2).permute(0, 3, 2, 1).flatten() for size in (64, 32)}
    return next((size for size, expected in blocks.items() if torch.equal(found, expected)), 0)
