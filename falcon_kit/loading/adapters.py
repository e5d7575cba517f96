"""LoRA adapters on disk, and the state dict of a checkpoint with adapters added.

An adapter is added before a weight is rounded, quantised or divided among ranks.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

RECORD = "tuning.json"
"""A file in the folder of an adapter that `fk.tune` trained: its settings, figures and base."""
WEIGHTS = "adapter_model.safetensors"
_MERGEABLE_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "revision"),
    *("peft_type", "peft_version", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    *("lora_alpha", "lora_dropout", "r", "use_rslora"),
}
"""LoraConfig fields that do not change the merged weight, W + scale * B A; any other needs PEFT."""


def record(adapter: Path) -> dict[str, Any]:
    """What `fk.tune` wrote about an adapter; empty for an adapter from elsewhere."""
    file = adapter / RECORD
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def digest(adapter: Path) -> str:
    """The start of the SHA-256 of an adapter's weights."""
    with (adapter / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint(norm: Mapping[str, Tensor], adapters: Iterable[str] = ()) -> str:
    """A hash of the last LayerNorm and of the adapters added to a model.

    The LayerNorm is rounded to bfloat16, so that quantisation does not change the hash; LoRA never changes a LayerNorm.
    norm: its weight and bias. adapters: the digests of the adapters.
    """
    values = torch.cat([norm["weight"], norm["bias"]]).detach().to("cpu", torch.bfloat16)
    sha = hashlib.sha256(values.view(torch.uint8).numpy().tobytes())
    sha.update("".join(adapters).encode())
    return sha.hexdigest()[:16]


def merged_adapters(config: Any) -> list[str]:
    """The digests of the adapters that were added to a model's weights, in that order."""
    return list(getattr(config, "merged_adapters", ()))


def record_merged(model: Any, adapters: Iterable[Path]) -> None:
    """Writes the digests of the adapters added to the weights into the model's config, which is saved with it."""
    model.config.merged_adapters = [*merged_adapters(model.config), *map(digest, adapters)]


def check_base(adapter: Path, name: str, shapes: Mapping[str, tuple[int, ...]], base_fingerprint: str) -> None:
    """Raises ValueError where an adapter was made for another model than the one called `name`.

    shapes: of the model's weights by name; empty for a quantised model, whose weights have other shapes.
    """
    refused = f"the adapter in {adapter} was made for {base_name(adapter)}, not for {name}"
    if record(adapter).get("base_fingerprint") not in (None, base_fingerprint):
        raise ValueError(f"{refused}, which has other weights: load the model that it was tuned from")
    for key, shape in _lora_shapes(adapter).items():
        weight = shapes.get(f"{_layer(key)}.weight")
        side = 1 if ".lora_A." in key else 0
        if shapes and (weight is None or shape[side] != weight[side]):
            layer = f"a weight of {weight} there" if weight else "no such layer"
            raise ValueError(f"{refused}: its {key} is {shape}, but the model has {layer}")


def base_name(adapter: Path) -> str:
    """The base model's name in an adapter's config; FileNotFoundError where there is no adapter."""
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json: give the folder of an adapter")
    return str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)


def weights_file(adapter: Path) -> Path:
    """The file with an adapter's matrices; FileNotFoundError where it is missing."""
    if not (file := adapter / WEIGHTS).is_file():
        raise FileNotFoundError(f"{adapter} has no {WEIGHTS}: the adapter was not saved completely")
    return file


def fields_beyond_lora(adapter: Path) -> list[str]:
    """The fields of an adapter's config that only PEFT can merge: use_dora, bias, modules_to_save and others."""
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        return [str(config.peft_type)]
    defaults = vars(LoraConfig())
    fields = {name: value for name, value in vars(config).items() if name not in _MERGEABLE_FIELDS}
    if isinstance(fields.get("init_lora_weights"), bool):
        del fields["init_lora_weights"]  # True and False leave the base as it is; "pissa" and others change it
    return [name for name, value in fields.items() if value != defaults.get(name) and (value or defaults.get(name))]


def _lora_shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(weights_file(adapter), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if ".lora_" in name}  # noqa: SIM118  # it is no dict


def _layer(key: str) -> str:
    """The name of the layer that a LoRA matrix belongs to."""
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]


# An adapter added to weights


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


def merged_weights(weights: Mapping[str, Any], adapter: Path) -> dict[str, LazyMergedWeight]:
    """The weights that a plain LoRA adapter changes, by name. Raises ValueError for more than plain LoRA."""
    if fields := fields_beyond_lora(adapter):
        raise ValueError(
            f"the adapter in {adapter} is more than plain LoRA ({', '.join(fields)}): fk.merge(adapter, base) merges "
            "it through PEFT"
        )
    config: Any = PeftConfig.from_pretrained(str(adapter))
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    matrices = load_file(adapter / WEIGHTS)
    return {
        f"{layer}.weight": LazyMergedWeight(
            weights[f"{layer}.weight"],
            matrices[f"base_model.model.{layer}.lora_A.weight"],
            matrices[f"base_model.model.{layer}.lora_B.weight"],
            scale,
        )
        for layer in {_layer(key) for key in matrices}
    }


def lazy_state_dict(
    files: Iterable[Path], adapters: Iterable[Path], name: str, config: Any, open_files: ExitStack
) -> dict[str, Any]:
    """The state dict of a checkpoint with adapters added; each weight is read when it is sliced.

    name, config: of the checkpoint. open_files: closes the files. Raises ValueError for an adapter of another model and
    for more than plain LoRA.
    """
    weights: dict[str, Any] = {}
    for path in files:
        if path.suffix == ".safetensors":
            file = open_files.enter_context(safe_open(path, framework="pt"))
            weights |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        else:
            weights |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    merged = merged_adapters(config)
    for adapter in adapters:
        norm = {side: weights[f"transformer.ln_f.{side}"][...] for side in ("weight", "bias")}
        shapes = {key: _shape(weight) for key, weight in weights.items()}
        check_base(adapter, name, shapes, fingerprint(norm, merged))
        weights |= merged_weights(weights, adapter)
        merged.append(digest(adapter))
    return weights


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape if isinstance(weight, Tensor) else weight.get_shape())
