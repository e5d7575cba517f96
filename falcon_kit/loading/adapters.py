"""LoRA adapters as they lie on disk, and the weights of a checkpoint with one added to them as they are read.

The adapter is added before anything else happens to a weight: before it is rounded, quantised, or divided among ranks.
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
"""Beside an adapter that the kit trained: the settings, figures and base it was made with."""
WEIGHTS = "adapter_model.safetensors"
_PLAIN = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "revision"),
    *("peft_type", "peft_version", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    *("lora_alpha", "lora_dropout", "r", "use_rslora"),
}
"""Options of PEFT that leave an adapter one product for each layer. With others there is more to it: DoRA's magnitudes,
biases, whole layers, a base that PiSSA changed."""


def record(adapter: Path) -> dict[str, Any]:
    """What the kit wrote down beside an adapter; empty for one from elsewhere."""
    file = adapter / RECORD
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def digest(adapter: Path) -> str:
    """Tells adapters apart by their weights."""
    with (adapter / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint(norm: Mapping[str, Tensor], adapters: Iterable[str] = ()) -> str:
    """Tells models apart by their last LayerNorm, rounded to bfloat16, which neither quantisation nor LoRA touches.

    norm: its weight and bias. adapters: the digests of what was added to the model.
    """
    values = torch.cat([norm["weight"], norm["bias"]]).detach().to("cpu", torch.bfloat16)
    seen = hashlib.sha256(values.view(torch.uint8).numpy().tobytes())
    seen.update("".join(adapters).encode())
    return seen.hexdigest()[:16]


def added_to(config: Any) -> list[str]:
    """The digests of the adapters that a model has in its weights, in the order in which they were added."""
    return list(getattr(config, "merged_adapters", ()))


def mark(model: Any, adapters: Iterable[Path]) -> None:
    """Writes into the config which adapters were added to the weights; a saved model keeps it."""
    model.config.merged_adapters = [*added_to(model.config), *map(digest, adapters)]


def check(adapter: Path, name: str, shapes: Mapping[str, tuple[int, ...]], base_fingerprint: str) -> None:
    """Raises ValueError for an adapter that was made for another model than the one called `name`.

    shapes: of the model's weights, by their names; empty where they are kept in another form.
    """
    refused = f"the adapter in {adapter} was made for {made_for(adapter)}, not for {name}"
    if record(adapter).get("base_fingerprint") not in (None, base_fingerprint):
        raise ValueError(f"{refused}, whose weights are others: load the model that it was tuned from")
    for key, shape in _shapes(adapter).items():
        weight = shapes.get(f"{_module(key)}.weight")
        side = 1 if ".lora_A." in key else 0
        if shapes and (weight is None or shape[side] != weight[side]):
            there = f"a weight of {weight} there" if weight else "no such layer"
            raise ValueError(f"{refused}: its {key} is {shape}, but the model has {there}")


def made_for(adapter: Path) -> str:
    """The base's name, as the adapter has it; FileNotFoundError where there is no adapter."""
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json: give the folder of an adapter")
    return str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)


def weights_file(adapter: Path) -> Path:
    """The file with an adapter's matrices; FileNotFoundError where it is not there."""
    if not (file := adapter / WEIGHTS).is_file():
        raise FileNotFoundError(f"{adapter} has no {WEIGHTS}: the adapter was not saved completely")
    return file


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(weights_file(adapter), framework="pt") as held:
        return {name: tuple(held.get_slice(name).get_shape()) for name in held.keys() if ".lora_" in name}  # noqa: SIM118


def _module(key: str) -> str:
    """The name of the layer that a matrix of an adapter belongs to."""
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]


# Added while the weights are read


@dataclass(frozen=True)
class LazyMergedWeight:
    """A weight on disk and what an adapter adds to it, (out, in), computed in float32 when it is asked for."""

    weight: Any
    """A slice of safetensors, a tensor that is mapped from disk, or another `LazyMergedWeight`."""
    down: Tensor
    """A of the adapter, (rank, in)."""
    up: Tensor
    """B of the adapter, (out, rank)."""
    scale: float

    def __getitem__(self, index: Any) -> Tensor:
        whole: Tensor = self.weight[...].float()
        return torch.addmm(whole, self.up.float(), self.down.float(), alpha=self.scale)[index]

    def get_shape(self) -> list[int]:
        """As of a slice of safetensors."""
        return list(_shape(self.weight))

    def get_dtype(self) -> str:
        """As of a slice of safetensors."""
        return "F32"


def read_with(
    files: Iterable[Path], adapters: Iterable[Path], name: str, config: Any, held: ExitStack
) -> dict[str, Any]:
    """The weights of a checkpoint with adapters added, none of them read yet, for transformers to read one by one.

    name, config: of the checkpoint. held: keeps the files open meanwhile. Raises ValueError for an adapter of another
    model, or one that is more than plain LoRA.
    """
    weights: dict[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            opened = held.enter_context(safe_open(file, framework="pt"))
            weights |= {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # it is no dict
        else:
            weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    added = added_to(config)
    for adapter in adapters:
        norm = {side: weights[f"transformer.ln_f.{side}"][...] for side in ("weight", "bias")}
        shapes = {key: _shape(weight) for key, weight in weights.items()}
        check(adapter, name, shapes, fingerprint(norm, added))
        weights |= _added(weights, adapter)
        added.append(digest(adapter))
    return weights


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape if isinstance(weight, Tensor) else weight.get_shape())


def _beyond_lora(config: PeftConfig) -> list[str]:
    """The options in use that make an adapter more than a product for each layer."""
    usual = vars(LoraConfig())
    given = {name: value for name, value in vars(config).items() if name not in _PLAIN}
    if isinstance(given.get("init_lora_weights"), bool):
        del given["init_lora_weights"]  # how training started, and no more
    return [name for name, value in given.items() if value != usual.get(name) and (value or usual.get(name))]


def _added(weights: Mapping[str, Any], adapter: Path) -> dict[str, LazyMergedWeight]:
    config = PeftConfig.from_pretrained(str(adapter))
    more = _beyond_lora(config)
    if more or not isinstance(config, LoraConfig):
        raise ValueError(
            f"the adapter in {adapter} is more than plain LoRA ({', '.join(more) or config.peft_type}): "
            "fk.merge(adapter, base) lets PEFT merge it"
        )
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    sides = load_file(adapter / WEIGHTS)
    layers = {_module(key) for key in sides}
    return {
        f"{layer}.weight": LazyMergedWeight(
            weights[f"{layer}.weight"],
            sides[f"base_model.model.{layer}.lora_A.weight"],
            sides[f"base_model.model.{layer}.lora_B.weight"],
            scale,
        )
        for layer in layers
    }
