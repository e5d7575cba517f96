"""8-bit and 4-bit weights: the method chosen, counted after loading, and saved correctly.

int4 uses the layers of `packed.py`, and on a CPU int8 does too, since bitsandbytes is slow there. int8 on a GPU and nf4
are bitsandbytes'.

Two faults of the libraries are corrected here. transformers' own Falcon has linear layers of a class that bitsandbytes
skips: it loads "in 4 bits" and every weight is still in 16, so the kit counts quantised layers. And bitsandbytes 0.50
packs 4-bit weights for the CPU in the first forward pass and unpacks them wrongly when they are saved: the saved model
is another one, and so is the model in memory from then on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.display.errors import shown
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.loading.packed import PackedLinear
from falcon_kit.loading.quantizer import METHOD, PackedConfig
from falcon_kit.model.products import has_products
from falcon_kit.parallel.ranks import local_tensor
from falcon_kit.planning.environment import native_bfloat16


def _kinds() -> dict[type[nn.Module], str]:
    """The dtypes of bitsandbytes' layers by class; none before its import, when no model has such layers."""
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    return {} if layers is None else {layers.Linear8bitLt: "int8", layers.Linear4bit: "nf4"}


def quantisation_config(dtype: str, on_cpu: bool) -> BitsAndBytesConfig | PackedConfig:
    """The settings for `from_pretrained`; on_cpu: whether the layers are computed on a CPU."""
    if dtype == "int4" or (dtype == "int8" and on_cpu):
        return PackedConfig(dtype)
    return bitsandbytes_config(dtype, on_cpu)


def bitsandbytes_config(dtype: str, on_cpu: bool) -> BitsAndBytesConfig:
    """The settings for "int8", "nf4" or "nf4-double"; on_cpu: whether the layers are computed on a CPU.

    Products are in the dtype of the other weights; on CPUs without instructions for bfloat16 in float32. Raises
    ImportError where bitsandbytes is missing.
    """
    try:
        import bitsandbytes  # noqa: F401  # on first use, since it takes a quarter of a second
    except ImportError:
        raise ImportError(
            f"dtype={dtype!r} needs bitsandbytes, which is not installed here: pip install bitsandbytes, or use "
            "dtype='int4', which needs no other package"
        ) from None
    if dtype == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    slow = on_cpu and not has_products(torch.bfloat16)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=dtype == "nf4-double",
        bnb_4bit_compute_dtype=torch.float32 if slow else compute_dtype(on_cpu),
    )


def stored_quantisation(config: Any) -> str | None:
    """The dtype that a checkpoint's weights are already quantised to: int8, int4, nf4 or nf4-double; None for none.

    Raises ValueError for a method other than the kit's own and bitsandbytes' int8 and nf4.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = settings.get("quant_method")
    if method == METHOD:
        return PackedConfig(**settings).dtype
    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        return "int8"
    if method == "bitsandbytes" and settings.get("bnb_4bit_quant_type") == "nf4":
        return "nf4-double" if settings.get("bnb_4bit_use_double_quant") else "nf4"
    raise ValueError(
        f"{config.name_or_path or 'the checkpoint'} is quantised by {shown(method)}; the kit reads bitsandbytes' int8 "
        "and nf4, and its own int4: load the original weights, with dtype='nf4' for example"
    )


def is_quantised(model: Any) -> bool:
    """Whether a model has quantised weights, by any method."""
    return bool(getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None))


def compute_dtype(on_cpu: bool) -> torch.dtype:
    """The dtype of the weights that are not quantised, and on GPUs of the products with those that are."""
    return torch.bfloat16 if on_cpu or native_bfloat16() else torch.float16


def kept_as(module: nn.Module) -> str:
    """The dtype of a module's weights: "int8", "int4", "nf4", "nf4-double", "bfloat16", ..."""
    if isinstance(module, PackedLinear):
        return module.kind
    kind = next((name for cls, name in _kinds().items() if isinstance(module, cls)), None)
    if kind == "nf4":
        state = getattr(module.weight, "quant_state", None)
        double = getattr(state, "nested", False) or getattr(state, "original_nested", False)
        return "nf4-double" if double else "nf4"
    return kind or str(next(module.parameters(recurse=False)).dtype).removeprefix("torch.")


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters in this process, and the scales of quantised ones."""
    for parameter in module.parameters(recurse=False):
        yield local_tensor(parameter)
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        matmul_state = getattr(module, "state", None)  # the first forward pass moves int8's scales into it
        int8_scales = (getattr(parameter, "SCB", None), getattr(matmul_state, "SCB", None))
        scales = (*int8_scales, getattr(state, "absmax", None), getattr(nested, "absmax", None))
        yield from (each for each in scales if each is not None)


@dataclass(frozen=True)
class Kept:
    """The weights of all modules of one name and dtype."""

    part: str
    """The modules' name, such as "query_key_value"."""
    count: int
    kept_as: str
    """The dtype: "nf4", "bfloat16" and so on."""
    bytes: int
    """Bytes of all these modules, scales included; a tied weight counts in the first part that has it."""


@dataclass(frozen=True, repr=False)
class Weights:
    """The dtype and bytes of a model's weights by part, counted in the model itself; a table in Jupyter."""

    rows: tuple[Kept, ...]
    """By part, in the order of the model."""

    @property
    def total_bytes(self) -> int:
        """All weights, tied ones once."""
        return sum(row.bytes for row in self.rows)

    @property
    def quantised(self) -> int:
        """The number of modules in 8 or 4 bits."""
        return sum(row.count for row in self.rows if row.kept_as in QUANTISED)

    def __repr__(self) -> str:
        parts = ", ".join(f"{row.part} {row.kept_as}" for row in self.rows)
        return f"Weights({format_bytes(self.total_bytes)}: {parts})"

    def _repr_html_(self) -> str:
        rows = [(row.part, row.count, row.kept_as, format_bytes(row.bytes)) for row in self.rows]
        title = f"{format_bytes(self.total_bytes)} of weights"
        return html_table(title, ("part", "modules", "kept as", "bytes"), rows)


def weights(model: nn.Module) -> Weights:
    """The weights that a model has in memory, by part: a GPU's and the host's. Those on disk count as zero bytes."""
    counted: set[int] = set()
    sizes: dict[str, dict[str, list[int]]] = {}  # by part and dtype, of each module
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            new = [each for each in _in_memory(module) if _address(each) not in counted]
            part = sizes.setdefault(name.rpartition(".")[2], {})
            part.setdefault(kept_as(module), []).append(sum(each.nbytes for each in new))
            counted |= {_address(each) for each in new}
    rows = ((part, *row) for part, dtypes in sizes.items() for row in sorted(dtypes.items()))
    return Weights(tuple(Kept(part, len(modules), dtype, sum(modules)) for part, dtype, modules in rows))


def _in_memory(module: nn.Module) -> Iterator[Tensor]:
    """A module's `tensors` that are in memory, with those that are offloaded to host memory."""
    yield from (each for each in tensors(module) if not each.is_meta)
    yield from (kept[name] for kept, name in in_host_memory(module))


def in_host_memory(module: nn.Module) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Where accelerate keeps a module's offloaded weights between two steps, and their names there; none on disk."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (map := getattr(each, "weights_map", None)) is not None:
            kept = getattr(map.dataset, "state_dict", map.dataset)
            names = (f"{map.prefix}{name}" for name, own in module.named_parameters(recurse=False) if own.is_meta)
            yield from ((kept, name) for name in names if name in kept)


def _address(tensor: Tensor) -> int:
    """What tied weights share. A tensor in oneDNN's layout, which is never tied, has no address."""
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def check_quantised(model: nn.Module, dtype: str) -> None:
    """Raises RuntimeError where a linear layer of the blocks is not in `dtype`; the libraries raise nothing."""
    linear = {name: each for name, each in model.named_modules() if ".h." in name and isinstance(each, nn.Linear)}
    missed = [name for name, each in linear.items() if kept_as(each) != dtype]
    if missed or not linear:
        raise RuntimeError(
            f"{len(missed)} of {len(linear)} linear layers were not quantised to {dtype}, such as "
            f"{missed[0] if missed else 'all'}: load with attention='grouped', whose layers are recognised"
        )


def make_savable(model: Any) -> None:
    """Makes `state_dict()` unpack 4-bit layers correctly, so that the saved weights are those that compute."""
    for module in _four_bit_layers(model):
        module.register_state_dict_pre_hook(_unpack)


def _four_bit_layers(model: nn.Module) -> list[Any]:
    """bitsandbytes' 4-bit layers of a model."""
    kinds = _kinds()
    return [module for module in model.modules() if kinds.get(type(module)) == "nf4"]


def _unpack(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Undoes bitsandbytes' packing for the CPU; the next forward pass packs again.

    bitsandbytes' own inverse leaves the scales as packed, (K / 64, N), and reads them as (N x K / 64) afterwards,
    unless they are quantised too. Packing rounds the scales to bfloat16, in memory and so in what is saved.
    """
    weight: Any = module.weight
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not weight.quant_state.nested:
        weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Keeps 4-bit layers unpacked in a `with` block, as training needs them.

    bitsandbytes packs a layer for the CPU in the first forward pass without gradients. A packed layer passes no
    gradient back, with no more than a warning, so adapters before it would not be trained.
    """
    layers = _four_bit_layers(model)
    packing = [layer.support_avx512bf16_for_cpu for layer in layers]
    for layer in layers:
        _unpack(layer, "", False)
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer, packs in zip(layers, packing, strict=True):
            layer.support_avx512bf16_for_cpu = packs
