"""8-bit and 4-bit weights through bitsandbytes: chosen, counted after loading, and saved without harm.

Two faults are mended here. transformers' own Falcon has linear layers of a class that bitsandbytes passes over: it
loads "in 4 bits" and every weight is still in 16, so the kit counts. And bitsandbytes 0.50 re-packs 4-bit weights for
the CPU in the first forward pass and unpacks them wrongly when they are saved: the file holds another model, and so
does memory from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.parallel.ranks import own


def _import_bitsandbytes() -> Any:
    """The package, without its warning on a faster kernel that it would download from the hub."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
    return bitsandbytes


_BNB = _import_bitsandbytes()
_KINDS = {_BNB.nn.Linear8bitLt: "int8", _BNB.nn.Linear4bit: "nf4"}


def bitsandbytes_config(dtype: str) -> BitsAndBytesConfig:
    """The settings of "int8", "nf4" or "nf4-double"; computes in bfloat16, on GPUs without it in float16."""
    if dtype == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=dtype == "nf4-double",
        bnb_4bit_compute_dtype=compute_dtype(),
    )


def hush_casts() -> None:
    """Drops bitsandbytes' warning, at each 8-bit product, that it rounds bfloat16 to float16: it always does."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_not_a_cast)


def _not_a_cast(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg


def stored_quantisation(config: Any) -> str | None:
    """The word for how a checkpoint's weights are already quantised, None where they are not.

    Raises ValueError for another method than bitsandbytes' int8 and nf4.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    how = given if isinstance(given, dict) else given.to_dict()
    if how.get("quant_method") == "bitsandbytes" and how.get("load_in_8bit"):
        return "int8"
    if how.get("quant_method") == "bitsandbytes" and how.get("bnb_4bit_quant_type") == "nf4":
        return "nf4-double" if how.get("bnb_4bit_use_double_quant") else "nf4"
    raise ValueError(
        f"the checkpoint is quantised by {how.get('quant_method')!r}; the kit reads bitsandbytes' int8 and nf4: load "
        "the original weights, with dtype='nf4' or another"
    )


def compute_dtype() -> torch.dtype:
    """What quantised weights are multiplied in, and what is not quantised is kept in."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def kept_as(module: nn.Module) -> str:
    """The word for how a module's weights are kept: "int8", "nf4", "nf4-double", "bfloat16", ..."""
    kind = next((word for cls, word in _KINDS.items() if isinstance(module, cls)), None)
    if kind == "nf4":
        state = getattr(module.weight, "quant_state", None)
        return "nf4-double" if state is not None and _nested(state) else "nf4"
    return kind or str(next(module.parameters(recurse=False)).dtype).removeprefix("torch.")


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """What a module itself keeps in this process: parameters, and the scales that bitsandbytes keeps beside them."""
    for parameter in module.parameters(recurse=False):
        yield own(parameter)
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        moved = getattr(module, "state", None)  # where the first forward pass moves int8's scales
        scales = (getattr(parameter, "SCB", None), getattr(moved, "SCB", None))
        beside = (*scales, getattr(state, "absmax", None), getattr(nested, "absmax", None))
        yield from (each for each in beside if each is not None)


@dataclass(frozen=True)
class Kept:
    """How the modules of one kind are kept."""

    part: str
    """Their name, such as "query_key_value"."""
    count: int
    """How many there are."""
    kept_as: str
    """"nf4", "bfloat16" and so on."""
    bytes: int
    """Together, scales included; what is shared with another part counts there."""


@dataclass(frozen=True, repr=False)
class Weights:
    """How a model's weights are kept, counted in the model itself; a table in Jupyter."""

    rows: tuple[Kept, ...]
    """By part, in the order of the model."""

    @property
    def total_bytes(self) -> int:
        """All weights, tied ones once."""
        return sum(row.bytes for row in self.rows)

    @property
    def quantised(self) -> int:
        """Modules that are kept in 8 or 4 bits."""
        return sum(row.count for row in self.rows if row.kept_as in QUANTISED)

    def __repr__(self) -> str:
        parts = ", ".join(f"{row.part} {row.kept_as}" for row in self.rows)
        return f"Weights({format_bytes(self.total_bytes)}: {parts})"

    def _repr_html_(self) -> str:
        rows = [(row.part, row.count, row.kept_as, format_bytes(row.bytes)) for row in self.rows]
        title = f"{format_bytes(self.total_bytes)} of weights"
        return html_table(title, ("part", "modules", "kept as", "bytes"), rows)


def weights(model: nn.Module) -> Weights:
    """Counts what a model holds, part by part. Weights that lie on disk or are yet to be loaded count as nothing."""
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        own = [each for each in tensors(module) if each.device.type != "meta" and each.data_ptr() not in seen]
        if next(module.parameters(recurse=False), None) is not None:
            found.append((name.rpartition(".")[2], kept_as(module), sum(each.nbytes for each in own)))
            seen |= {each.data_ptr() for each in own}
    order = {part: at for at, (part, _, _) in reversed(list(enumerate(found)))}
    found.sort(key=lambda each: (order[each[0]], each[1]))
    grouped = ((key, list(rows)) for key, rows in groupby(found, key=lambda each: each[:2]))
    return Weights(tuple(Kept(part, len(rows), how, sum(row[2] for row in rows)) for (part, how), rows in grouped))


def check_quantised(model: nn.Module, dtype: str) -> None:
    """Raises RuntimeError where a linear layer of the blocks is not kept as `dtype`: nothing else would say so."""
    linear = [(name, kept_as(each)) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    inside = [(name, how) for name, how in linear if ".h." in name]
    missed = [name for name, how in inside if how != dtype]
    if missed or not inside:
        raise RuntimeError(
            f"{len(missed)} of {len(inside)} linear layers were not quantised to {dtype}, such as "
            f"{missed[0] if missed else 'all'}: load with attention='grouped', whose layers bitsandbytes recognises"
        )


def make_savable(model: Any) -> None:
    """Has 4-bit layers unpacked rightly whenever their state is read, so that what is saved is what computes."""
    for module in model.modules():
        if isinstance(module, _BNB.nn.Linear4bit):
            module.register_state_dict_pre_hook(_unpack)


def _unpack(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Undoes bitsandbytes' packing for the CPU, which the next forward pass does again.

    bitsandbytes' own way back leaves the scales (K / 64, N) as packed, where (N x K / 64) is read afterwards, unless
    they are quantised too. They were rounded to bfloat16 in packing: the model that computes, and the one saved, have
    these.
    """
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    weight.data, weight.quant_state = _BNB.functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not weight.quant_state.nested:
        weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Keeps 4-bit layers as training needs them for the time of a `with` block.

    Packed for the CPU, which bitsandbytes does in the first forward pass without gradients, a layer hands no gradient
    back, and says so only in a warning: adapters before it would learn nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, _BNB.nn.Linear4bit)]
    packing = [layer.support_avx512bf16_for_cpu for layer in layers]
    for layer in layers:
        _unpack(layer, "", False)
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer, packs in zip(layers, packing, strict=True):
            layer.support_avx512bf16_for_cpu = packs


def _nested(state: Any) -> bool:
    return bool(state.nested or getattr(state, "original_nested", False))
