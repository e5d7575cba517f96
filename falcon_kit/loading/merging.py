"""Adapters attached to a model with PEFT, and merged into its weights.

A merged model's logits are compared with those of the base with the adapter attached.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from falcon_kit.catalogue.names import adapter_base, adapter_spec, base_errors, base_revision, is_here
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import is_out_of_memory
from falcon_kit.display.reading import UNEXPECTED, named_errors
from falcon_kit.display.saving import atomic_folder
from falcon_kit.display.tables import format_bytes
from falcon_kit.generation.control_tokens import encode_text
from falcon_kit.loading import adapters
from falcon_kit.loading.adapter_checks import check_base
from falcon_kit.loading.adding import merged_weights
from falcon_kit.loading.checkpoints import find
from falcon_kit.loading.checks import check_adapters, check_name
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.load import load
from falcon_kit.loading.quantization import is_quantised
from falcon_kit.loading.tokenizer import tokenizer_and_format
from falcon_kit.loading.writing import check_replaceable, remove_wrappers, write_model
from falcon_kit.model.checks import is_offloaded
from falcon_kit.planning.devices import devices_by_key

_PROBE = "User: What do giraffes eat?\nFalcon: They eat the leaves of trees, 12 hours a day.\nUser: Why?\nFalcon:"
_HANDLES = ("_require_grads_hooks", "_require_grads_hook")
"""Where transformers keeps what removes the hooks of `enable_input_require_grads`: the last call's only."""
_ALLOWED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""The largest difference between logits, as a share of the largest logit, that rounding merged weights explains."""


@documented
@dataclass(frozen=True, repr=False, eq=False)
class Merged(Falcon):
    """A Falcon with an adapter in its weights."""

    gap: float = float("nan")
    """The largest difference of its logits from those of base and adapter, as a share of the largest logit."""

    def _facts(self) -> dict[str, str]:
        return {**super()._facts(), "merged": f"logits differ by {self.gap:.0e} from those of base and adapter"}


@contextmanager
def attached(falcon: Falcon, adapter: str | Path) -> Iterator[PeftModel]:
    """The Falcon's own model with the adapter attached in a `with` block; afterwards the model is as it was.

    Raises FileNotFoundError where there is no adapter, ValueError for an adapter that was made for another model, and
    for a model that has adapters already.
    """
    check_no_adapters(falcon, f"the adapter in {adapter}")
    found = adapters.Adapter(Path(adapter))
    shapes = {} if is_quantised(falcon.model) else {key: tuple(w.shape) for key, w in falcon.model.named_parameters()}
    norm, merged = falcon.model.transformer.ln_f.state_dict(), adapters.merged_adapters(falcon.model.config)
    check_base(found, falcon.name, shapes, norm, merged)
    changed = [*found.full_weights]
    if "init_lora_weights" in found.beyond_lora:
        changed += [f"{layer}.weight" for layer in found.lora_layers]  # PiSSA and others subtract from these
    weights = {name: falcon.model.get_parameter(name) for name in changed}
    before = {name: each.detach().clone() for name, each in weights.items()}
    with unchanged(falcon.model):
        try:
            yield _attach(falcon.model, adapter)
        finally:
            with torch.no_grad():  # PEFT writes saved embeddings and biases into the base
                for name, each in weights.items():
                    each.copy_(before[name])


def check_no_adapters(falcon: Falcon, another: str) -> None:
    """Raises ValueError for a model with adapters, which PEFT would remove together with `another` one."""
    remove_wrappers(falcon.model)
    if names := list(getattr(falcon.model, "peft_config", None) or ()):
        by_transformers = getattr(falcon.model, "_hf_peft_config_loaded", False)
        remove = f"falcon.model.delete_adapter({names})" if by_transformers else "unload() of your PeftModel"
        raise ValueError(
            f"the model already has the adapter {', '.join(map(repr, names))}, which would be removed with {another}: "
            f"use another Falcon, fk.load({falcon.name!r}), or first remove it with {remove}"
        )


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """After the block there are no adapters, and parameters, modes and the hooks on the embeddings are as they were."""
    flags = [(each, each.requires_grad) for each in model.parameters()]
    modules = [(each, each.training, dict(each._modules)) for each in model.modules()]
    hooks = model.get_input_embeddings()._forward_hooks
    own_hooks, handles = dict(hooks), {name: each for name, each in vars(model).items() if name in _HANDLES}
    try:
        yield
    finally:
        for name in ("peft_config", "_hf_peft_config_loaded", *_HANDLES):
            vars(model).pop(name, None)
        vars(model).update(handles)
        hooks.clear()  # in place: handles refer to it
        hooks.update(own_hooks)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode, children in modules:
            module.training, module._modules = mode, children


def random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Restores the random states of the CPU and of the model's own devices after a `with` block.

    Without a list of devices, `fork_rng` warns where there are several, and reads those that other processes use.
    """
    devices = {each.device for each in model.parameters() if each.device.type not in ("cpu", "meta")}
    kind = {"device_type": next(iter(devices)).type} if devices else {}  # torch before 2.13 takes no None
    return torch.random.fork_rng(devices, **kind)


def _attach(model: Any, adapter: str | Path) -> PeftModel:
    kinds = (*UNEXPECTED, NotImplementedError)
    named = named_errors(Path(adapter) / "adapter_config.json", "correct it, or save the adapter again", kinds)
    # PEFT draws random matrices before it reads the adapter's.
    with random_state_kept(model), without_peft_warning(), named:
        return PeftModel.from_pretrained(model, str(adapter), key_mapping=adapters.KEY_MAPPING).eval()


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Hides PEFT's warning about an attribute of transformers that PEFT still reads by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


# Merged


def merge(adapter: Any, base: Falcon | str | Path | None = None, *, output_dir: str | Path | None = None) -> Merged:
    """A Falcon with the adapter in its weights, as fast as the base and loadable without PEFT; the base is not changed.

    adapter: its folder, or the run of `fk.tune` that made it. base: a Falcon, or a name for `fk.load`; unset, the model
    that the adapter was made for. Weights of a Falcon count as they are in memory; a quantised one is loaded again,
    unquantised, since 4-bit weights would round the adapter away.
    output_dir: a new folder to save the model in, or one with a checkpoint, which the model replaces once it is saved.

    Raises ValueError for an adapter of another base or one that the base has already, a base that is stored quantised,
    and a Falcon that is offloaded or has adapters attached; RuntimeError where the merged model's logits are not those
    of base and adapter; and NotADirectoryError, FileExistsError or OSError where `output_dir` cannot be written.
    """
    adapter = getattr(adapter, "adapter", adapter)
    if not isinstance(adapter, str | Path):
        raise TypeError(
            f"fk.merge(adapter, base) takes the adapter first, as its folder or the run that made it; got "
            f"{type(adapter).__name__}"
        )
    if output_dir is not None:
        check_replaceable(Path(output_dir).expanduser(), "output_dir")
    adapter = Path(adapter).expanduser()
    if isinstance(base, Falcon):
        check_no_adapters(base, "the merged one")
    falcon = _base(adapter) if base is None else _unquantised_copy(base, adapter)
    if output_dir is None:
        return _merge(falcon, adapter)
    with atomic_folder(output_dir, falcon.weight_bytes) as folder:
        merged = _merge(falcon, adapter)
        write_model(merged.model, merged.tokenizer, folder)
    merged.model.name_or_path = merged.model.config.name_or_path = str(Path(output_dir).expanduser())
    return merged


def _base(adapter: Path) -> Falcon:
    name = adapter_base(adapter) or adapters.Adapter(adapter).base_name  # which raises: there is none
    found = find(adapter, {})
    if found.directory.resolve() == adapter.resolve():
        raise ValueError(f"{adapter} holds the adapter and its base: fk.load({str(adapter)!r}) adds one to the other")
    check_adapters(found)
    with base_errors(adapter, name):
        falcon = load(name, revision=None if is_here(name) else base_revision(adapter))
    tokenizer, format = tokenizer_and_format(found, None)
    return replace(falcon, tokenizer=tokenizer, loaded_format=format, loaded_template=None)


def _unquantised_copy(base: Falcon | str | Path, adapter: Path) -> Falcon:
    """A Falcon whose weights may be changed, for an adapter to be added to them."""
    if not isinstance(base, Falcon):
        _check_stored(base, adapter)
        return load(base)
    if is_quantised(base.model):
        name = base.model.name_or_path or base.name
        _check_stored(name, adapter)
        return load(name, dtype="bfloat16", chat=base.chat_format)
    if is_offloaded(base.model):
        raise ValueError(
            f"a part of the model is offloaded to host memory or disk, where nothing can be added to it: "
            f"fk.merge({str(adapter)!r}, {base.name!r}) loads it completely, and fk.load({str(adapter)!r}, "
            "offload='disk') adds the adapter while weights are read"
        )
    _check_room_for_a_copy(base)
    model = copy.deepcopy(base.model)
    # transformers' compiled forward pass is a plain function: the copy's would still compute with the base's weights.
    vars(model).pop("_compiled_call", None)
    return replace(base, model=model)


def _check_stored(name: str | Path, adapter: Path) -> None:
    """Raises TypeError for no name, and ValueError for that of a checkpoint whose weights are stored quantised."""
    check_name(name)
    found = find(name, {})
    check_adapters(replace(found, adapters=(*found.adapters, adapter)))


def _check_room_for_a_copy(base: Falcon) -> None:
    """Raises MemoryError where a device of the model has no room for its weights once more."""
    needed: Counter[int | str] = Counter()
    for each in base.model.parameters():
        needed[each.device.index if each.device.type == "cuda" else each.device.type] += each.nbytes
    free = {device.key: device.free_bytes for device in devices_by_key(needed)}
    for key, size in needed.items():
        if size > free.get(key, size):
            elsewhere = f", or merge in host memory: fk.merge(adapter, fk.load({base.name!r}, device_map='cpu'))"
            raise MemoryError(
                f"fk.merge copies the model, which takes {format_bytes(size)} on device {key!r}, where "
                f"{format_bytes(free[key])} are free: delete the loaded model and give its name, fk.merge(adapter, "
                f"{base.name!r}){'' if key == 'cpu' else elsewhere}"
            )


def _merge(falcon: Falcon, adapter: Path) -> Merged:
    """Adds the adapter to the Falcon's weights in place, and compares the logits with PEFT's."""
    with attached(falcon, adapter):
        expected = _logits(falcon)
    _add(falcon.model, adapter)
    adapters.record_merged(falcon.model, [adapter])
    falcon.model.name_or_path = falcon.model.config.name_or_path = str(adapter)
    spec = replace(adapter_spec(falcon.spec, adapter), tied_head=bool(falcon.model.config.tie_word_embeddings))
    falcon = replace(falcon, spec=spec)
    gap = float((_logits(falcon) - expected).abs().max() / expected.abs().max())
    allowed = _ALLOWED[falcon.model.dtype]
    if not gap <= allowed:  # also where the gap is NaN
        raise RuntimeError(
            f"after merging, logits differ by {gap:.1e} of the largest, more than rounding to {falcon.model.dtype} "
            f"explains ({allowed:.0e}): merge in float32, fk.merge(adapter, fk.load(name, dtype='float32'))"
        )
    given = {name: value for name, value in vars(falcon).items() if name not in ("gap", "loaded_rows")}
    return Merged(**given, gap=gap)  # a merged Falcon has a gap already


def _add(model: Any, adapter: Path) -> None:
    """Adds an adapter to a model's weights in place; PEFT does it for more than plain LoRA."""
    parameters, found = dict(model.named_parameters()), adapters.Adapter(adapter)
    if found.beyond_lora:
        if found.changes_tied_weight and model.config.tie_word_embeddings:  # the head gets a weight of its own
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        try:
            _attach(model, adapter).merge_and_unload(safe_merge=True)
        except (NotImplementedError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"PEFT cannot merge the adapter in {adapter} ({error}): attach it, "
                "peft.PeftModel.from_pretrained(fk.load(base).model, adapter)"
            ) from error
        model.__dict__.pop("peft_config", None)
        return
    with torch.no_grad():
        for name, weight in merged_weights(parameters, found).items():
            parameters[name].copy_(weight[...])


def _logits(falcon: Falcon) -> Tensor:
    """The model's logits for a fixed text, (T, V) in float32."""
    ids = torch.tensor([encode_text(_PROBE, falcon.tokenizer)], device=falcon.model.device)
    with torch.inference_mode():
        return falcon.model(ids, use_cache=False, return_dict=True).logits[0].float().cpu()
