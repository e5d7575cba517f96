"""LoRA adapters on disk: config, matrices and record, and what tells one adapter and one base from another."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from falcon_kit.display.errors import printable
from falcon_kit.display.reading import UNEXPECTED, named_errors, read_json

RECORD = "tuning.json"
"""A file in the folder of an adapter that `fk.tune` trained: its settings, figures and base."""
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
"""As PEFT saved adapters in 2023."""
PREFIX = "base_model.model."
"""What the names of an adapter's weights begin with."""
KEY_MAPPING = {r"^(h|ln_f|word_embeddings)\.": r"transformer.\1."}
"""For PEFT: names of weights as in AutoModel, which has no head, become those of AutoModelForCausalLM."""
EMBEDDING, HEAD = "transformer.word_embeddings", "lm_head"
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

    @property
    def config_file(self) -> Path:
        return self.folder / "adapter_config.json"

    @property
    def weights_file(self) -> Path:
        """The file of its tensors. Raises FileNotFoundError where it is missing."""
        return weights_file(self.folder)

    @cached_property
    def config(self) -> Any:
        """Its PeftConfig. Raises FileNotFoundError where the folder holds no adapter."""
        from peft import PeftConfig

        if not self.config_file.is_file():
            raise FileNotFoundError(f"{self} holds no adapter_config.json: give the folder of an adapter")
        read_json(self.config_file)
        with named_errors(self.config_file, "correct it, or save the adapter again"):
            return PeftConfig.from_pretrained(str(self.folder))

    @property
    def base_name(self) -> str:
        return str(self.config.base_model_name_or_path or "")

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Its tensors, by their names in its file."""
        file = self.weights_file
        try:
            return load_file(file) if file.suffix == ".safetensors" else load_pickled(file)
        except SafetensorError as error:
            raise ValueError(damaged(file, error)) from error

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """Its tensors, by their names in the model: transformer.h.0.mlp.dense_h_to_4h.lora_A.weight."""
        return {_name_in_model(key): tensor for key, tensor in self.stored.items()}

    @property
    def full_weights(self) -> list[str]:
        """The names of the base model's own weights that it replaces: saved embeddings, biases."""
        own = (".lora_", f".{(self.config.peft_type or '').lower()}_")  # as in oft_R.weight
        names = [key for key in self.matrices if key.endswith((".weight", ".bias"))]
        return [key for key in names if not any(part in key for part in own)]

    @property
    def lora_layers(self) -> set[str]:
        """The names of the layers that it has LoRA matrices for."""
        return {key.rpartition(".lora_")[0] for key in self.matrices if ".lora_" in key}

    @property
    def changes_tied_weight(self) -> bool:
        """Whether it has LoRA on the embedding or the head: merged, they are no longer the same weight."""
        return not self.lora_layers.isdisjoint((EMBEDDING, HEAD))

    @property
    def beyond_lora(self) -> list[str]:
        """What only PEFT can merge: fields of its config (use_dora, bias and others), else its saved weights."""
        on_ends = [name for name in (EMBEDDING, HEAD) if name in self.lora_layers]  # one weight where they are tied
        ends = [*(f"LoRA on {name}" for name in on_ends), *(f"saved {name}" for name in self.full_weights)]
        return self.fields_beyond_lora or ends

    @property
    def fields_beyond_lora(self) -> list[str]:
        """The fields of its config that only PEFT can merge."""
        from peft import LoraConfig

        if not isinstance(self.config, LoraConfig):
            return [str(self.config.peft_type)]
        defaults = vars(LoraConfig())
        fields = {name: value for name, value in vars(self.config).items() if name not in _MERGEABLE_FIELDS}
        if fields.get("init_lora_weights") in (True, False, "gaussian"):
            del fields["init_lora_weights"]  # these leave the base as it is; "pissa" and others change it
        return [name for name, value in fields.items() if value != defaults.get(name) and (value or defaults.get(name))]


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


def fingerprint(norm: Mapping[str, Tensor], adapters: Iterable[str]) -> str:
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


def attached_digest(model: Any) -> str | None:
    """The start of the SHA-256 of the active adapters that PEFT has attached to a model; None where none is active."""
    if not getattr(model, "peft_config", None):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    sha, is_active = hashlib.sha256(), False
    wrappers: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for layer in model.modules():
        if not isinstance(layer, wrappers) or layer.disable_adapters:
            continue
        for adapter in layer.active_adapters:
            sha.update(repr(getattr(layer, "scaling", {}).get(adapter)).encode())
            for name, weight in (*layer.named_parameters(), *layer.named_buffers()):
                if adapter in name.split("."):
                    is_active = True
                    sha.update(weight.detach().flatten().cpu().view(torch.uint8).numpy())
    return sha.hexdigest()[:16] if is_active else None


def weights_file(adapter: Path) -> Path:
    """The file with an adapter's matrices, chosen as by PEFT; FileNotFoundError where it is missing."""
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if (file := adapter / name).is_file():
            return file
    raise FileNotFoundError(f"{adapter} has no {WEIGHTS}: the adapter was not saved completely")


def with_prefix(name: str) -> str:
    """The name of a weight in FalconForCausalLM; AutoModel saves it without the prefix."""
    return f"transformer.{name}" if name.split(".")[0] in ("h", "ln_f", "word_embeddings") else name


def _name_in_model(key: str) -> str:
    """The name in FalconForCausalLM of a weight in a file.

    In a file of a state_dict() names contain that of the adapter; PEFT reads "default", which it gives by itself.
    """
    key = re.sub(r"(\.lora_\w+)\.default\b", r"\1", key.removeprefix(PREFIX))
    return with_prefix(key.replace(".base_layer.", "."))


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file. Raises ValueError for a damaged one, and for other objects, which run code."""
    is_zip = zipfile.is_zipfile(file)
    with file.open("rb") as start:
        is_pickle = start.read(2) == b"\x80\x02"  # torch before 1.6 wrote no zip archives
    if not (is_zip or is_pickle):
        raise ValueError(damaged(file, "the end of the zip archive is missing"))
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(refused_pickle(file)) from error
    except (RuntimeError, EOFError, *UNEXPECTED) as error:
        raise ValueError(damaged(file, error)) from error
    if not (isinstance(stored, Mapping) and all(isinstance(each, Tensor) for each in stored.values())):
        raise ValueError(refused_pickle(file))
    return dict(stored)


def damaged(file: Path, cause: object) -> str:
    """The error text for a weight file that cannot be read."""
    reason = printable(str(cause).partition(". ")[0])  # torch adds paragraphs of advice
    return f"{file} is cut off or damaged ({file.stat().st_size:,} bytes; {reason}): fetch it again"


def refused_pickle(file: Path) -> str:
    """The error text for a pickled file that holds more than tensors."""
    return (
        f"{file} is a pickle with other objects than tensors, which can run any code when they are read, so it is not "
        "read: get the weights as safetensors, or as a file that torch.save wrote of a state_dict()"
    )
