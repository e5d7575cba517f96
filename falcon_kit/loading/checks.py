"""The settings of `load`, and its checks: what is refused before anything is downloaded or written."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, FalconForCausalLM

from falcon_kit.catalogue.memory import QUANTISED, dtype_name
from falcon_kit.display.errors import check_flag, to_save, unknown_name
from falcon_kit.display.reading import texts_by_name
from falcon_kit.display.saving import check_folder
from falcon_kit.display.tables import format_bytes
from falcon_kit.generation.chat import ChatFormat, chat_format
from falcon_kit.loading.checkpoints import Checkpoint
from falcon_kit.loading.compiling import compile_options
from falcon_kit.loading.quantization import stored_quantisation
from falcon_kit.model import modeling
from falcon_kit.parallel import ranks
from falcon_kit.planning.devices import places
from falcon_kit.planning.environment import free_disk, gpu_problem
from falcon_kit.planning.placement import CacheKind

ATTENTIONS = {"grouped": modeling.FalconForCausalLM, "transformers": FalconForCausalLM}
"""The model class for each value of load's argument `attention`."""
_INSTEAD = texts_by_name(Path(__file__).with_name("other_names.json"))["instead"]
"""What replaces the arguments of `from_pretrained` that `load` does not have."""


@dataclass(frozen=True)
class LoadSettings:
    """The arguments of `load` other than the name and those for the hub; raises ValueError for those it cannot use."""

    dtype: str | torch.dtype
    device_map: str | dict[str, Any] | None
    max_memory: Mapping[int | str, float | str] | None
    offload: str | None
    offload_folder: str | Path
    attention: CacheKind
    compile: bool | CompileConfig
    force: bool
    chat: str | ChatFormat | None
    tensor_parallel: int | None

    def __post_init__(self) -> None:
        check_flag("force", self.force)
        _check_combinations(self.dtype_name, self.device_map, self.max_memory, self.attention, self.offload)
        compile_options(self.compile)
        one_process = {name: getattr(self, name) for name in ("device_map", "compile", "max_memory", "offload")}
        if self.ranks_on_cpu:
            del one_process["device_map"]
        ranks.check_request(self.tensor_parallel, self.ranks_on_cpu, **one_process)
        _ = self.chat_format  # raises LookupError for an unknown one

    @property
    def dtype_name(self) -> str | None:
        """The dtype by name; None for "auto"."""
        return None if self.dtype == "auto" else dtype_name(self.dtype)

    @property
    def named_devices(self) -> frozenset[int | str]:
        """The devices that `device_map` names, as in a plan; none where the plan or transformers chooses them."""
        asked = () if self.device_map is None else places(self.device_map)
        keys = [_key(each) for each in asked]
        return frozenset() if None in keys else frozenset(each for each in keys if each is not None)

    @property
    def ranks_on_cpu(self) -> bool:
        """Whether `load` starts processes for the ranks that leave the GPUs of this machine alone."""
        return self.device_map == "cpu" and ranks.needs_launch(self.tensor_parallel)

    @property
    def folder(self) -> Path:
        """`offload_folder` with ~ expanded."""
        return Path(self.offload_folder).expanduser()

    @property
    def chat_format(self) -> ChatFormat | None:
        """The chat format asked for, if any."""
        return None if self.chat is None else chat_format(self.chat)


def _key(place: str) -> int | str | None:
    """The key in a plan of a device as a device map names it; None for other words and for devices of other kinds."""
    kind, _, index = place.partition(":")
    if kind == "cuda":
        return int(index) if index else torch.cuda.current_device()
    return kind if kind in ("cpu", "disk") else int(kind) if kind.isdigit() else None


def check_name(name: Any) -> None:
    """Raises TypeError for a name that is neither a text nor a path."""
    if not isinstance(name, str | os.PathLike):
        instead = ": give its .adapter" if hasattr(name, "adapter") else to_save(name)
        raise TypeError(f"load takes a name, directory or hub id, not a {type(name).__name__}{instead}")


def check_arguments(name: Any, others: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError as `check_name`, and for arguments that `load` does not have. known: those that it has."""
    check_name(name)
    for other in others:
        near = get_close_matches(other, known)
        nearest = f"did you mean {near[0]}?" if near else "its arguments are in its documentation"
        raise TypeError(f"load has no {other!r}: {_INSTEAD.get(other, nearest)}")


def _check_combinations(
    dtype: str | None, device_map: Any, max_memory: Any, attention: str, offload: str | None
) -> None:
    """Raises ValueError for an unknown value, and for settings that exclude each other."""
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attention {attention!r} is not one of {', '.join(ATTENTIONS)}; choose sdpa, eager or flash-attention "
            "with model.set_attn_implementation"
        )
    check_quantised_settings(dtype, attention, offload, device_map)
    if offload and device_map not in (None, "auto"):
        raise ValueError(f"offload={offload!r} chooses the device of each layer: leave device_map={device_map!r} out")
    if max_memory is not None and device_map not in (None, "auto"):
        raise ValueError(f"max_memory limits the plan's own device map: leave it or device_map={device_map!r} out")
    if device_map is not None:
        _check_device_map(device_map)
        _check_embedding(device_map)


def check_quantised_settings(dtype: str | None, attention: str, offload: str | None, device_map: Any) -> None:
    """Raises ValueError for settings that quantised weights exclude; dtype: the one asked for, or the checkpoint's."""
    if dtype in QUANTISED and attention != "grouped":
        raise ValueError(
            f"dtype={dtype!r} has no effect on transformers' own Falcon, whose linear layers are of another class: "
            "leave attention at 'grouped'"
        )
    stored = _offloaded(device_map)
    if dtype in QUANTISED and (offload or stored):
        given = f"offload={offload!r}" if offload else f"device_map[{stored[0]!r}]={str(device_map[stored[0]])!r}"
        raise ValueError(
            f"dtype={dtype!r} with {given}: quantised layers compute where their weights are, so they cannot be "
            "offloaded: use max_memory and more devices, or offload the original weights in bfloat16"
        )


def _offloaded(device_map: Any) -> list[str]:
    """The modules that a device map of `from_pretrained` keeps on disk, or in host memory beside another device."""
    if not isinstance(device_map, Mapping):
        return []
    on = {"disk"} if places(device_map) <= {"cpu", "disk"} else {"cpu", "disk"}
    return [name for name, device in device_map.items() if str(device) in on]


def _check_device_map(device_map: Any) -> None:
    """Raises ValueError for a device that this machine does not have; the error lists those it has."""
    present = _devices()
    if isinstance(device_map, Mapping):
        known, asked = [*present, "cpu", "disk"], [*device_map.values()]
    else:
        known, asked = ["auto", "balanced", "balanced_low_0", "sequential", "cpu", *present], [device_map]
    named = (each if isinstance(each, int) else str(each) for each in asked)
    if (absent := next((each for each in named if each not in known), None)) is None:
        return
    if not present and (isinstance(absent, int) or absent.startswith("cuda")):
        problem = gpu_problem() or "torch finds no GPU here"
        raise ValueError(f"device_map={absent!r}, but {problem}: leave it out to use the CPU")
    raise ValueError(unknown_name("device_map", str(absent), [str(each) for each in known]))


def _check_embedding(device_map: Any) -> None:
    """Raises ValueError for an embedding that is offloaded: its device is that of the model, to which inputs go."""
    for name in _offloaded(device_map):
        if "transformer.word_embeddings.weight".startswith(name):
            computing = min(places(device_map) - {"cpu", "disk"}, default="cpu")
            raise ValueError(
                f"device_map[{name!r}]={str(device_map[name])!r} offloads the embedding, where no input can go: give "
                "'transformer.word_embeddings', 'transformer.h', 'transformer.ln_f' and 'lm_head' an entry each, the "
                f"embedding with {computing!r}"
            )


def _devices() -> list[str | int]:
    """The GPUs as a device map names them: "cuda", "cuda:0", 0 and so on; none without a GPU."""
    if torch.cuda.is_available():
        kind, count = "cuda", torch.cuda.device_count()
    elif (accelerator := torch.accelerator.current_accelerator()) and torch.accelerator.is_available():
        kind, count = accelerator.type, torch.accelerator.device_count()
    else:
        return []
    return [kind, *(f"{kind}:{index}" for index in range(count)), *range(count)]


def check_adapters(found: Checkpoint) -> None:
    """Raises ValueError for adapters of weights that are stored quantised."""
    if found.adapters and (quantised := stored_quantisation(found.config)):
        adapter, base = str(found.adapters[0]), str(found.directory)
        raise ValueError(
            f"{adapter} is to be added to {base}, whose weights are stored in {quantised}: added to these, it would be "
            f"lost in rounding. Give the original that was quantised, fk.merge({adapter!r}, original), or attach the "
            f"adapter to these, peft.PeftModel.from_pretrained(fk.load({base!r}).model, {adapter!r})"
        )


def check_disk(folder: Path, needed: int) -> None:
    """Raises OSError where the disk has no room for offloaded weights of `needed` bytes."""
    check_folder(folder, "offload_folder")
    if (free := free_disk(folder)) < needed:
        raise OSError(
            f"offload='disk' writes up to {format_bytes(needed)} of weights to {folder}, where {format_bytes(free)} "
            "are free: give offload_folder on a larger disk, or load a checkpoint in safetensors without an adapter, "
            "which is read where it is"
        )
