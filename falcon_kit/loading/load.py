"""`load`: a Falcon by embedded name, hub id or directory, handed back as plain transformers objects.

Remote code is never run, and pickled weights only load as bare tensors.
"""

import gc
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    CompileConfig,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from falcon_kit.catalogue.memory import FLOAT_DTYPES, QUANTISED, dtype_name
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.tables import format_bytes
from falcon_kit.generation.chat import FORMATS, ChatFormat, chat_format, default_format
from falcon_kit.loading.adapters import mark, read_with, record
from falcon_kit.loading.checkpoints import Checkpoint, check_weights, locate
from falcon_kit.loading.checks import ATTENTIONS, check_adapters, check_disk, check_settings
from falcon_kit.loading.compiling import check_compilable, compile_options, compiled
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.quantization import (
    bitsandbytes_config,
    check_quantised,
    compute_dtype,
    hush_casts,
    make_savable,
    stored_quantisation,
)
from falcon_kit.model import modeling
from falcon_kit.model.attention import faster_without_onednn
from falcon_kit.parallel import launching, ranks
from falcon_kit.planning.devices import Device, identical_gpus, local_devices
from falcon_kit.planning.environment import host_memory
from falcon_kit.planning.placement import CacheKind
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan

DTYPES = {name: getattr(torch, name) for name in FLOAT_DTYPES}
_INSTEAD = {
    "torch_dtype": "give dtype",
    "load_in_4bit": "give dtype='nf4'",
    "load_in_8bit": "give dtype='int8'",
    "quantization_config": "give dtype='int8', 'nf4' or 'nf4-double'",
    "device": "give device_map, which takes a device too",
    "trust_remote_code": "no code of a checkpoint is ever run; leave it out",
}
"""What stands for arguments of `from_pretrained` that `load` has not."""
_SMALL = 2**30  # bytes of weights up to which a progress bar would only flash by


def load(
    name: str | Path = "falconet",
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload: Literal["cpu", "disk"] | None = None,
    offload_folder: str | Path = "runs/offload",
    attention: Literal["grouped", "transformers"] = "grouped",
    compile: bool | CompileConfig = False,
    force: bool = False,
    chat: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    tensor_parallel: int | None = None,
    **others: Any,
) -> Falcon:
    """Loads a Falcon: "falconet", "falconet-instruct", a name of `fk.catalogue()`, a hub id, or a directory.

    For an adapter's directory or hub id, its base is loaded with the adapter in its weights, added before they are
    rounded, quantised or divided.
    dtype: "auto" (the checkpoint's, fitted to the hardware, with the reason kept), "float32", "bfloat16", "float16",
    or through bitsandbytes "int8", "nf4", "nf4-double" (4 bits, the scales quantised too).
    device_map: unset or "auto", as the plan (`fk.plan`, for one text of the whole context) spreads the layers over the
    GPUs there are, else the CPU; a device or a dict, as in transformers.
    max_memory: what may be used, {0: "20GiB", 1: "20GiB"}; devices that are not named are left alone.
    offload: "cpu" keeps layers that find no room in host memory, "disk" on disk beyond that: each is read anew for
    every token. Pickled checkpoints are first written anew to `offload_folder`; safetensors are read where they are.
    attention: "grouped" keeps keys and values once per KV head; "transformers" is the library's own Falcon, unmended.
    compile: decode on a GPU with a static cache of the whole context and a compiled step (transformers' own means),
    warmed up for one text at a time; another batch size compiles once more. A CompileConfig names other options. Beam
    search, assisted generation and a cache of your own decode without it.
    force: try although the plan does not fit.
    chat: "falcon", "hub" or "baize"; unset, the format the checkpoint was made for.
    revision, token, cache_dir, local_files_only: as in huggingface_hub.
    tensor_parallel: divide each layer among so many ranks: under torchrun among its processes, each of which gets a
    Falcon of its part; from a notebook among processes that are started for you: a `ParallelFalcon` speaks for them.

    Raises LookupError for a name that nothing answers to, ConnectionError where the hub cannot be reached,
    FileNotFoundError for a missing file, ValueError for another architecture, a cut-off shard, missing weights or
    settings that do not go together, and NotEnoughMemory before any weights are fetched or read.
    """
    for other in others:
        raise TypeError(f"load has no {other!r}: {_INSTEAD.get(other, 'its arguments are in its documentation')}")
    wanted = None if dtype == "auto" else dtype_name(dtype)
    check_settings(wanted, device_map, max_memory, attention, offload)
    compiling = compile_options(compile)
    ranks.check_request(tensor_parallel, device_map=device_map, compile=compile, max_memory=max_memory, offload=offload)
    chosen_format = None if chat is None else chat_format(chat)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = Path(offload_folder).expanduser()
    slots = _slots(tensor_parallel, max_memory, offload, folder)
    plans: list[Plan] = []

    def decide(shape: FalconSpec, config: FalconConfig) -> None:
        cache: CacheKind = "grouped" if attention == "grouped" else "transformers"
        kept = _choose_dtype(wanted, config, shape)[0]
        plans.append(
            plan(shape, kept, context=shape.context, devices=slots, cache=cache, tensor_parallel=tensor_parallel or 1)
        )
        if not (plans[0].fits or force or device_map not in (None, "auto")):
            raise NotEnoughMemory(plans[0])
        if compiling:
            check_compilable(kept, _place(device_map, plans[0]))

    found = locate(str(name), hub, decide)
    directory, shape = found.directory, found.spec
    files = check_weights(found)
    check_adapters(found, offload)
    kept, reason = _choose_dtype(wanted, found.config, shape)
    if offload == "disk" and files[0].suffix == ".bin":
        check_disk(folder, sum(file.stat().st_size for file in files))
    tokenizer = _load_tokenizer(directory)
    chosen_format = chosen_format or _format_of(found, tokenizer)
    if chat is not None or tokenizer.chat_template is None:
        tokenizer.chat_template = chosen_format.template
    if ranks.needs_launch(tensor_parallel):
        told = {"dtype": kept, "chat": chosen_format.name, "tensor_parallel": tensor_parallel}
        facts = tokenizer, shape, plans[0], chosen_format, reason
        return cast(Falcon, launching.launch(found.name, told, _are_large(files), *facts))
    place = None if tensor_parallel else _place(device_map, plans[0])
    limits = {"max_memory": dict(max_memory)} if max_memory and place == "auto" else {}  # forced: not the plan's map
    with _nothing_left_on_failure(directory), ranks.placement(tensor_parallel) as extra:
        model = _load_model(ATTENTIONS[attention], found, kept, place, files, folder, extra | limits)
    _mend_generation_config(model, tokenizer)
    if isinstance(model, modeling.FalconForCausalLM):
        linears = [ranks.own(module.weight) for module in model.modules() if type(module) is nn.Linear]
        model.single_rows_without_onednn = faster_without_onednn(linears)
    decoding = compiled(model, kept, compiling, compile is True) if compiling else {}
    return Falcon(model, tokenizer, shape, plans[0], chosen_format, reason, decoding)


def _slots(tensor_parallel: int | None, max_memory: Any, offload: str | None, folder: Path) -> tuple[Device, ...]:
    """The devices to plan for; a rank asks for its own GPU alone."""
    if tensor_parallel and not ranks.needs_launch(tensor_parallel) and torch.cuda.is_available():
        return identical_gpus(int(os.environ["LOCAL_RANK"]), tensor_parallel)
    return local_devices(max_memory, offload, folder)


def _place(device_map: Any, plan: Plan) -> Any:
    """The map for from_pretrained: the plan's, unless another was asked for."""
    if device_map not in (None, "auto"):
        return device_map
    if plan.fits:
        return dict(plan.device_map)
    return None if plan.devices[0].key == "cpu" else "auto"  # forced: transformers' own map, for what it is worth


@contextmanager
def _nothing_left_on_failure(directory: Path) -> Iterator[None]:
    """Frees what was loaded when something fails: Jupyter keeps the last error, and so all that its frames hold."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(
                f"a file of {directory} vanished while it was read ({error}): fetch the checkpoint again"
            ) from error
        raise


def _choose_dtype(wanted: str | None, config: FalconConfig, shape: FalconSpec) -> tuple[str, str]:
    """The name of the dtype to load in, and why."""
    if quantised := stored_quantisation(config):
        if wanted not in (None, quantised):
            raise ValueError(f"the checkpoint is already quantised to {quantised}: dtype={wanted!r} needs the original")
        return quantised, "as in the checkpoint"
    if wanted is not None:
        return wanted, "as asked"
    stored = next((name for name, known in DTYPES.items() if known == config.dtype), "bfloat16")
    if torch.cuda.is_available():
        if stored == "bfloat16" and compute_dtype() == torch.float16:
            return "float16", "the checkpoint's bfloat16 is not native to this GPU"
        return stored, "as in the checkpoint"
    full, (_, available) = 4 * shape.parameters, host_memory()
    if stored != "float32" and full < available / 10:
        return "float32", f"on a CPU {format_bytes(full)} of weights are little, and float32 is exact"
    if stored == "float16":
        return "bfloat16", "CPUs compute bfloat16 faster than the checkpoint's float16"
    return stored, "as in the checkpoint"


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer, without the token type ids that Falcon has no use for and refuses."""
    if not (directory / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json: copy it from the model that this one was made from"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, model_input_names=["input_ids", "attention_mask"])
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def _load_model(
    kind: type[FalconForCausalLM],
    found: Checkpoint,
    dtype: str,
    device_map: Any,
    files: list[Path],
    offload_folder: Path,
    extra: dict[str, Any],
) -> FalconForCausalLM:
    quantised = dtype in QUANTISED
    if quantised and stored_quantisation(found.config) is None:
        extra = {**extra, "quantization_config": bitsandbytes_config(dtype)}
    with progress_bar(_are_large(files)), ExitStack() as held:
        if found.adapters:
            extra = {**extra, "state_dict": read_with(files, found.adapters, found.base.name, found.config, held)}
        loaded = cast(Any, kind).from_pretrained(
            None if found.adapters else found.directory,
            config=found.config,
            dtype=compute_dtype() if quantised else DTYPES[dtype],
            device_map=device_map,
            offload_folder=offload_folder if "disk" in _values(device_map) else None,
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,
            output_loading_info=True,
            **extra,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise ValueError(
            f"{found.directory} lacks {len(missing)} weights that its config.json asks for, such as {missing[0]}: "
            "the config and the weights are of different models, or the checkpoint is incomplete"
        )
    if quantised:
        check_quantised(model, dtype)
        make_savable(model)
        hush_casts()
    if found.adapters:
        mark(model, found.adapters)
        model.name_or_path = model.config.name_or_path = found.name
    evaluating: FalconForCausalLM = model.eval()
    return evaluating


def _values(device_map: Any) -> list[Any]:
    return list(device_map.values()) if isinstance(device_map, dict) else [device_map]


def _are_large(weights: list[Path]) -> bool:
    return sum(file.stat().st_size for file in weights) > _SMALL


@contextmanager
def progress_bar(shown: bool) -> Iterator[None]:
    """Shows transformers' progress bar or not, and leaves its switch as it was."""
    enabled = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _mend_generation_config(model: FalconForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Takes the end token from the tokenizer: generation configs of 2023 name id 2, while the model ends with 11."""
    config = model.generation_config
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _format_of(found: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format an adapter was trained in, or whose speakers the tokenizer's template names; else the base model's."""
    for adapter in reversed(found.adapters):
        if trained := record(adapter).get("chat_format"):
            return chat_format(trained)
    template = str(tokenizer.chat_template)
    for each in FORMATS:
        if each.user_prefix in template and each.assistant_prefix in template:
            return each
    return default_format(found.base)
