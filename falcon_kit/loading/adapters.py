"""LoRA adapters on disk, and the state dict of a checkpoint with adapters added.

An adapter is added before a weight is rounded, quantised or divided among ranks.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from falcon_kit.display.errors import printable
from falcon_kit.display.reading import UNEXPECTED, named_errors, read_json
from falcon_kit.loading.lora_checks import check_finite, check_known_fields, check_lora, check_targets, check_used

RECORD = "tuning.json"
"""A file in the folder of an adapter that `fk.tune` trained: its settings, figures and base."""
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
"""As PEFT saved adapters in 2023."""
KEY_MAPPING = {r"^(h|ln_f|word_embeddings)\.": r"transformer.\1."}
"""For PEFT: names of weights as in AutoModel, which has no head, become those of AutoModelForCausalLM."""
_EMBEDDING, _HEAD = "transformer.word_embeddings", "lm_head"
_IN_COMMON = {"A.weight": (1, 1), "B.weight": (0, 0), "embedding_A": (1, 0), "embedding_B": (0, 1)}
"""The dimension that a LoRA matrix and its layer's weight (out, in) have in common: its number in each."""
_MERGEABLE_FIELDS = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying inference_mode revision peft_type peft_version task_type "
    "exclude_modules layers_pattern layers_to_transform target_modules lora_alpha lora_dropout r use_rslora".split()
)
"""LoraConfig fields that do not change the merged weight, W + scale * B A; any other needs PEFT."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; each of its files is read once."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @cached_property
    def config(self) -> Any:
        """Its PeftConfig. Raises FileNotFoundError where the folder holds no adapter."""
        from peft import PeftConfig

        file = self.folder / "adapter_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self} holds no adapter_config.json: give the folder of an adapter")
        read_json(file)
        with named_errors(file, "correct it, or save the adapter again"):
            return PeftConfig.from_pretrained(str(self.folder))

    @property
    def base_name(self) -> str:
        """The base model's name in its config."""
        return str(self.config.base_model_name_or_path)

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """Its tensors, by their names in the model: transformer.h.0.mlp.dense_h_to_4h.lora_A.weight."""
        file = weights_file(self.folder)
        try:
            stored = load_file(file) if file.suffix == ".safetensors" else load_pickled(file)
        except SafetensorError as error:
            raise ValueError(damaged(file, error)) from error
        names = {key: key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in stored}
        return {with_prefix(names[key]): tensor for key, tensor in stored.items()}

    @property
    def full_weights(self) -> list[str]:
        """The names of the base model's own weights that it replaces: saved embeddings, biases."""
        own = (".lora_", f".{self.config.peft_type.lower()}_")  # as in oft_R.weight
        return [key for key in self.matrices if key.endswith((".weight", ".bias")) and not any(map(key.count, own))]

    @property
    def lora_layers(self) -> set[str]:
        """The names of the layers that it has LoRA matrices for."""
        return {key.rpartition(".lora_")[0] for key in self.matrices if ".lora_" in key}

    @property
    def changes_tied_weight(self) -> bool:
        """Whether it has LoRA on the embedding or the head: merged, they are no longer the same weight."""
        return not self.lora_layers.isdisjoint((_EMBEDDING, _HEAD))


def record(adapter: Path) -> dict[str, Any]:
    """What `fk.tune` wrote about an adapter; empty for an adapter from elsewhere."""
    file = adapter / RECORD
    return read_json(file, "delete it, and the adapter counts as one from elsewhere") if file.is_file() else {}


@contextmanager
def write_errors() -> Iterator[None]:
    """Replaces the error of safetensors about a file that cannot be written by OSError, as other writers raise it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def digest(adapter: Path) -> str:
    """The start of the SHA-256 of an adapter's weights."""
    with weights_file(adapter).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint(norm: Mapping[str, Tensor], adapters: Iterable[str] = ()) -> str:
    """A hash of the last LayerNorm and of the adapters added to a model.

    The LayerNorm is rounded to bfloat16, so that quantisation does not change the hash; LoRA never changes a LayerNorm.
    An adapter that plain PEFT merged is not seen: what it changes is what quantisation changes too.
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


def model_fingerprint(decoder: Any) -> str:
    """A hash of a FalconModel that quantisation does not change; see `fingerprint`."""
    norm = {"weight": decoder.ln_f.weight, "bias": decoder.ln_f.bias}
    return fingerprint(norm, merged_adapters(decoder.config))


def check_base(
    adapter: Adapter, name: str, shapes: Mapping[str, tuple[int, ...]], norm: Mapping[str, Tensor], merged: list[str]
) -> None:
    """Raises ValueError where an adapter is in the model called `name` already, or was made for another model.

    shapes: of the model's weights by name; empty for a quantised model, whose weights have other shapes. norm, merged:
    its last LayerNorm and the digests of the adapters in its weights.
    """
    refused = f"the adapter in {adapter} was made for {printable(adapter.base_name)}, not for {name}"
    check_contents(adapter)
    if record(adapter.folder).get("base_fingerprint") not in (None, fingerprint(norm, merged)):
        raise ValueError(f"{refused}, which has other weights: load the model that it was tuned from")
    if merged and digest(adapter.folder) in merged:
        raise ValueError(f"the adapter in {adapter} is in {name} already, and would count twice: use {name} as it is")
    fitting = [*adapter.full_weights, *(key for key in adapter.matrices if ".lora_" in key)]
    for key in fitting if shapes else ():
        matrix = adapter.matrices[key]
        if problem := _misfit(key, tuple(matrix.shape), shapes):
            weight = f"base_model.model.{printable(key)}"
            raise ValueError(f"{refused}: its {weight} is {tuple(matrix.shape)}, but the model has {problem}")
    if adapter.config.peft_type == "LORA":
        file = adapter.folder / "adapter_config.json"
        check_targets(file, weights_file(adapter.folder), adapter.config, adapter.lora_layers)


def _misfit(key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why a tensor of an adapter does not fit a model with weights of these shapes; empty where it fits."""
    layer, lora, side = key.rpartition(".lora_")
    name = f"{layer}.weight" if lora else key
    weight = shapes.get(name, shapes.get(f"{_EMBEDDING}.weight") if name == f"{_HEAD}.weight" else None)
    if weight is None:
        return "no such layer"
    if not lora and shape != weight:
        resize = "falcon = fk.load(base); falcon.model.resize_token_embeddings"
        rows = f": resize its vocabulary first, {resize}({shape[0]}); fk.merge(adapter, falcon)"
        return f"a weight of {weight} there{rows if name.startswith((_EMBEDDING, _HEAD)) else ''}"
    own, of_weight = _IN_COMMON.get(side, (0, 0))
    fits = side not in _IN_COMMON or (len(shape) == 2 and shape[own] == weight[of_weight])
    return "" if fits else f"a weight of {weight} there"


def check_contents(adapter: Adapter) -> None:
    """Raises ValueError for an adapter that cannot be added to weights: incomplete, or of another kind."""
    config, file = adapter.config, adapter.folder / "adapter_config.json"
    attach = "which no weight can hold; attach it: peft.PeftModel.from_pretrained(fk.load(base).model, adapter)"
    if config.is_prompt_learning:
        # transformers' own Falcon caches a key for each query head, and the prefixes of its adapters have that shape
        own = ", or to fk.load(base, attention='transformers').model if it was trained on that"
        raise ValueError(
            f"the adapter in {adapter} is of the type {config.peft_type.value}: it adds virtual tokens to the text, "
            f"{attach}{own if config.peft_type == 'PREFIX_TUNING' else ''}"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(f"the adapter in {adapter} is an aLoRA: it begins at certain tokens of the text, {attach}")
    check_known_fields(file, config)
    if not adapter.matrices:
        raise ValueError(
            f"{weights_file(adapter.folder)} holds no weights: the adapter was not saved completely, save it again"
        )
    check_finite(weights_file(adapter.folder), adapter.matrices)
    if config.peft_type == "LORA":
        check_lora(file, weights_file(adapter.folder), config, adapter.matrices, adapter.lora_layers)
        if not _fields_beyond_lora(adapter):
            check_used(file, weights_file(adapter.folder), [*set(adapter.matrices) - {*adapter.full_weights}])


def weights_file(adapter: Path) -> Path:
    """The file with an adapter's matrices, chosen as by PEFT; FileNotFoundError where it is missing."""
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if (file := adapter / name).is_file():
            return file
    raise FileNotFoundError(f"{adapter} has no {WEIGHTS}: the adapter was not saved completely")


def with_prefix(name: str) -> str:
    """The name of a weight in FalconForCausalLM; AutoModel saves it without the prefix."""
    return f"transformer.{name}" if name.split(".")[0] in ("h", "ln_f", "word_embeddings") else name


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file. Raises ValueError for a damaged one, and for other objects, which run code."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(refused_pickle(file)) from error
    except (RuntimeError, EOFError, *UNEXPECTED) as error:
        raise ValueError(damaged(file, error)) from error
    if not (isinstance(stored, Mapping) and all(isinstance(each, Tensor) for each in stored.values())):
        raise ValueError(refused_pickle(file))
    return dict(stored)


def damaged(file: Path, cause: object) -> str:
    """The error text for a weight file that cannot be read."""
    reason = str(cause).partition(". ")[0]  # torch adds paragraphs of advice
    return f"{file} is cut off or damaged ({file.stat().st_size:,} bytes; {reason}): fetch it again"


def refused_pickle(file: Path) -> str:
    """The error text for a pickled file that holds more than tensors."""
    return (
        f"{file} is a pickle with other objects than tensors, which can run any code when they are read, so it is not "
        "read: get the weights as safetensors, or as a file that torch.save wrote of a state_dict()"
    )


def fields_beyond_lora(adapter: Adapter) -> list[str]:
    """What only PEFT can merge: fields of an adapter's config (use_dora, bias and others), else its saved weights."""
    on_ends = [name for name in (_EMBEDDING, _HEAD) if name in adapter.lora_layers]  # one weight where they are tied
    ends = [*(f"LoRA on {name}" for name in on_ends), *(f"saved {name}" for name in adapter.full_weights)]
    return _fields_beyond_lora(adapter) or ends


def _fields_beyond_lora(adapter: Adapter) -> list[str]:
    from peft import LoraConfig

    if not isinstance(adapter.config, LoraConfig):
        return [str(adapter.config.peft_type)]
    defaults = vars(LoraConfig())
    fields = {name: value for name, value in vars(adapter.config).items() if name not in _MERGEABLE_FIELDS}
    if fields.get("init_lora_weights") in (True, False, "gaussian"):
        del fields["init_lora_weights"]  # these leave the base as it is; "pissa" and others change it
    return [name for name, value in fields.items() if value != defaults.get(name) and (value or defaults.get(name))]


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


def merged_weights(weights: Mapping[str, Any], adapter: Adapter) -> dict[str, LazyMergedWeight]:
    """The weights that a plain LoRA adapter changes, by name. Raises ValueError for more than plain LoRA."""
    if fields := fields_beyond_lora(adapter):
        raise ValueError(
            f"the adapter in {adapter} is more than plain LoRA ({', '.join(fields)}): fk.merge(adapter, base) merges "
            "it through PEFT"
        )
    config, matrices = adapter.config, adapter.matrices
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return {
        f"{layer}.weight": LazyMergedWeight(
            weights[f"{layer}.weight"],
            matrices[f"{layer}.lora_A.weight"],
            matrices[f"{layer}.lora_B.weight"],
            scale,
        )
        for layer in adapter.lora_layers
    }


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
