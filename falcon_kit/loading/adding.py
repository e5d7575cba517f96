"""The state dict of a checkpoint with adapters added, before a weight is rounded, quantised or divided among ranks."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from falcon_kit.loading.adapter_checks import check_base
from falcon_kit.loading.adapters import Adapter, digest, load_pickled, merged_adapters, with_prefix


@dataclass(frozen=True)
class LazyMergedWeight:
    """W + scale * B A in float32, computed when it is sliced."""

    weight: Any
    """W, (out, in): a slice of safetensors, a tensor, or another `LazyMergedWeight`."""
    lora_a: Tensor
    """(r, in)"""
    lora_b: Tensor
    """(out, r)"""
    scale: float

    def __getitem__(self, index: Any) -> Tensor:
        weight: Tensor = self.weight[...].float()
        lora_a, lora_b = (matrix.to(weight.device, torch.float32) for matrix in (self.lora_a, self.lora_b))
        return torch.addmm(weight, lora_b, lora_a, alpha=self.scale)[index]

    def get_shape(self) -> list[int]:
        """The same as a safetensors slice returns."""
        return list(_shape(self.weight))

    def get_dtype(self) -> str:
        """The same as a safetensors slice returns."""
        return "F32"


def merged_weights(weights: Mapping[str, Any], adapter: Adapter) -> dict[str, LazyMergedWeight]:
    """The weights that a plain LoRA adapter changes, by name. Raises ValueError for more than plain LoRA."""
    if fields := adapter.beyond_lora:
        raise ValueError(
            f"the adapter in {adapter} is more than plain LoRA ({', '.join(fields)}): fk.merge(adapter, base) merges "
            "it through PEFT"
        )
    config, merged = adapter.config, {}
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for layer in adapter.lora_layers:
        lora_a, lora_b = (adapter.matrices[f"{layer}.lora_{side}.weight"] for side in "AB")
        merged[f"{layer}.weight"] = LazyMergedWeight(weights[f"{layer}.weight"], lora_a, lora_b, scale)
    return merged


def lazy_state_dict(files: Iterable[Path], open_files: ExitStack) -> dict[str, Any]:
    """The state dict of a checkpoint; each weight is read when it is sliced. open_files: closes the files."""
    weights: dict[str, Any] = {}
    for path in files:
        if path.suffix == ".safetensors":
            file = open_files.enter_context(safe_open(path, framework="pt"))
            weights |= {with_prefix(key): file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        else:
            weights |= {with_prefix(key): weight for key, weight in load_pickled(path).items()}
    return weights


def with_adapters(weights: dict[str, Any], adapters: Iterable[Path], name: str, config: Any) -> dict[str, Any]:
    """The state dict of a checkpoint with adapters added, when a weight is sliced.

    name, config: of the checkpoint. Raises ValueError for an adapter of another model and for more than plain LoRA.
    """
    merged = merged_adapters(config)
    for adapter in map(Adapter, adapters):
        norm = {side: weights[f"transformer.ln_f.{side}"][...] for side in ("weight", "bias")}
        check_base(adapter, name, {key: _shape(weight) for key, weight in weights.items()}, norm, merged)
        weights |= merged_weights(weights, adapter)
        merged.append(digest(adapter.folder))
    return weights


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape if isinstance(weight, Tensor) else weight.get_shape())
