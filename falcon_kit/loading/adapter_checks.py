"""Whether an adapter can be added to weights, and to those of a certain model.

Its config and its matrices have to say the same, so that nothing in either is left out in silence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from falcon_kit.display.errors import is_number, printable
from falcon_kit.display.reading import named_errors, read_json
from falcon_kit.loading.adapters import EMBEDDING, HEAD, PREFIX, Adapter, digest, fingerprint, record

_LARGEST = torch.finfo(torch.float32).max
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_HALVES = tuple(f".{half}" for pair in _PAIRS for half in pair)
_IN_COMMON = {"A.weight": (1, 1), "B.weight": (0, 0), "embedding_A": (1, 0), "embedding_B": (0, 1)}
"""The dimension that a LoRA matrix and its layer's weight (out, in) have in common: its number in each."""
_WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
}
"""What puts another module around a model, by the part of a name that this adds."""
_WITHOUT_EFFECT = frozenset({"merge_weights"})
"""Fields of old versions of PEFT that do not change what is computed."""


def check_base(
    adapter: Adapter, name: str, shapes: Mapping[str, tuple[int, ...]], norm: Mapping[str, Tensor], merged: list[str]
) -> None:
    """Raises ValueError where an adapter is in the model called `name` already, or was made for another model.

    shapes: of the model's weights by name; empty for a quantised model, whose weights have other shapes. norm, merged:
    its last LayerNorm and the digests of the adapters in its weights.
    """
    named = adapter.base_name and adapter.base_name != name
    made_for = f"{printable(adapter.base_name)}, not for {name}" if named else f"another model than {name}"
    refused = f"the adapter in {adapter} was made for {made_for}"
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
        _check_targets(adapter)


def _misfit(key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why a tensor of an adapter does not fit a model with weights of these shapes; empty where it fits."""
    layer, lora, side = key.rpartition(".lora_")
    name = f"{layer}.weight" if lora else key
    weight = shapes.get(name)
    if weight is None and name == f"{HEAD}.weight":  # a tied head has no weight of its own
        weight = shapes.get(f"{EMBEDDING}.weight")
    if weight is None:
        return "no such layer"
    problem = f"a weight of {weight} there"
    if not lora:
        if name.startswith((EMBEDDING, HEAD)):
            resize = "falcon = fk.load(base); falcon.model.resize_token_embeddings"
            problem += f": resize its vocabulary first, {resize}({shape[0]}); fk.merge(adapter, falcon)"
        return "" if shape == weight else problem
    if side not in _IN_COMMON:
        return ""  # not A or B, but such as a magnitude vector or a bias
    own, of_weight = _IN_COMMON[side]
    return "" if len(shape) == 2 and shape[own] == weight[of_weight] else problem


def _check_targets(adapter: Adapter) -> None:
    """Raises ValueError for matrices of a layer that PEFT would leave out."""
    for layer in sorted(adapter.lora_layers):
        with named_errors(adapter.config_file, "write the values of its training there"):
            found = _is_target(layer, adapter.config)
        if not found:
            raise ValueError(
                f"{adapter.weights_file} has matrices of {printable(layer)}, which target_modules, exclude_modules and "
                f"layers_to_transform in {adapter.config_file} leave out: write the values of its training there"
            )


def _is_target(layer: str, config: Any) -> bool:
    """Whether PEFT would add the matrices of a layer; AutoModel's names have no prefix, and a pattern may be theirs."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules in (None, "all-linear") or config.target_parameters:
        return True
    if config.ensure_weight_tying and not layer.startswith("transformer.h."):
        return True  # PEFT adds the other one of embedding and head
    return any(check_target_module_exists(config, name) for name in (layer, layer.removeprefix("transformer.")))


def check_contents(adapter: Adapter) -> None:
    """Raises ValueError for an adapter that cannot be added to weights: incomplete, or of another kind."""
    config = adapter.config
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
    _check_known_fields(adapter)
    if not adapter.matrices:
        raise ValueError(
            f"{adapter.weights_file} holds no weights: the adapter was not saved completely, save it again"
        )
    _check_names(adapter)
    _check_finite(adapter)
    if config.peft_type == "LORA":
        _check_scale(adapter)
        _check_beginning(adapter)
        for layer in sorted(adapter.lora_layers):
            _check_pair(adapter, layer)
        if not adapter.fields_beyond_lora:
            _check_used(adapter)


def _check_known_fields(adapter: Adapter) -> None:
    """Raises ValueError for a field that this PEFT does not know and that switches something on.

    Unknown numbers and texts are what belongs to such a switch, and newer versions write their defaults: of them, PEFT
    itself warns.
    """
    for name, value in read_json(adapter.config_file).items():
        unknown = name not in vars(adapter.config) and name not in _WITHOUT_EFFECT
        if unknown and value and (value is True or isinstance(value, list | dict)):
            raise ValueError(
                f"{adapter.config_file} has {printable(name)}={printable(repr(value))}, which this version of PEFT "
                "does not know and would leave out: update PEFT, pip install -U peft, or delete the field if it was "
                "not used in training"
            )


def _check_names(adapter: Adapter) -> None:
    """Raises ValueError for a weight that PEFT would leave out because of its name, and says how to rename all."""
    for key in adapter.stored:
        wrapper = next((part for part in key.split(".") if part in _WRAPPERS), None)
        if wrapper is None and key.startswith(PREFIX):
            continue
        file = adapter.weights_file
        library, ending = ("safetensors.torch", "_file") if file.suffix == ".safetensors" else ("torch", "")
        added = f"to which {_WRAPPERS[wrapper]} added {wrapper!r}" if wrapper else f"which does not begin with {PREFIX}"
        name = f"key.replace('{wrapper}.', '')" if wrapper else f"'{PREFIX}' + key.removeprefix('base_model.')"
        raise ValueError(
            f"{file} has a weight with the name {printable(key)}, {added}; PEFT would leave it out. Save the adapter "
            f"with save_pretrained of the PeftModel itself, or rename its weights: "
            f"{library}.save{ending}({{{name}: each for key, each in {library}.load{ending}(file).items()}}, file)"
        )


def _check_finite(adapter: Adapter) -> None:
    """Raises ValueError for a tensor with numbers that are not finite: every answer would be noise."""
    for name, matrix in adapter.matrices.items():
        values = matrix.float() if matrix.dtype.itemsize == 1 else matrix  # float8 has few functions
        if not values.isfinite().all():
            raise ValueError(
                f"{adapter.weights_file} has numbers that are not finite in {printable(name)}, and every answer would "
                "be noise: take an earlier checkpoint of its training, or train again with a lower learning rate"
            )


def _check_scale(adapter: Adapter) -> None:
    """Raises ValueError for a rank or an alpha that no training has."""
    r, alpha = adapter.config.r, adapter.config.lora_alpha
    if not (isinstance(r, int) and r >= 1 and is_number(alpha, -_LARGEST, _LARGEST)):
        raise ValueError(
            f"{adapter.config_file} has r={r!r} and lora_alpha={alpha!r}, but r is a whole number, at "
            "least 1, and lora_alpha is finite in float32: write the values of its training there"
        )


def _check_beginning(adapter: Adapter) -> None:
    """Raises ValueError for an adapter that was trained from a beginning which PEFT cannot make again here."""
    begun = str(adapter.config.init_lora_weights)
    converted = (
        "save it as plain LoRA where it was trained, "
        "model.save_pretrained(folder, path_initial_model_for_weight_conversion=folder_of_its_beginning)"
    )
    reason = ""
    if begun.startswith("pissa_niter"):
        reason = f"PEFT draws numbers for it, so that base and adapter give other logits each time: {converted}"
    elif begun == "corda":
        reason = f"PEFT would need the texts that it began with: {converted}"
    elif begun == "loftq" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        reason = (
            "PEFT quantises the base for it again, which takes a GPU, and torch finds none: merge it on a machine with "
            "one; or, if its base_model_name_or_path is the base as LoftQ changed it, saved in its training, write "
            "init_lora_weights=true there"
        )
    if reason:
        raise ValueError(f"{adapter.config_file} has init_lora_weights={begun!r}: {reason}")


def _check_pair(adapter: Adapter, layer: str) -> None:
    """Raises ValueError where one of a layer's two matrices is missing, or their rank is not that of the config."""
    matrices, r = adapter.matrices, adapter.config.r
    pair = next((each for each in _PAIRS if any(f"{layer}.{half}" in matrices for half in each)), _PAIRS[0])
    if lacking := [half for half in pair if f"{layer}.{half}" not in matrices]:
        raise ValueError(
            f"{adapter.weights_file} lacks {lacking[0]} of {layer}: the adapter was not saved completely, "
            "or not by PEFT's save_pretrained; save it again"
        )
    down, up = (matrices[f"{layer}.{half}"] for half in pair)
    if not adapter.config.rank_pattern and len(down) != r:
        raise ValueError(
            f"{adapter.config_file} has r={r}, but {pair[0]} of {layer} has the rank {len(down)}: write the value of "
            "its training there"
        )
    if up.dim() == 2 and up.shape[1] != len(down):
        raise ValueError(
            f"{adapter.weights_file} has {pair[0]} of {layer} with the rank {len(down)}, but {pair[1]} with the rank "
            f"{up.shape[1]}: they are of different trainings; save the adapter again"
        )


def _check_used(adapter: Adapter) -> None:
    """Raises ValueError for a tensor that plain LoRA does not use, as of DoRA where the config has no use_dora."""
    for name in sorted(adapter.matrices.keys() - adapter.full_weights):
        if not name.endswith(_HALVES):
            raise ValueError(
                f"{adapter.weights_file} has {printable(name)}, which an adapter with the settings in "
                f"{adapter.config_file} does not use: write the settings of its training there (use_dora for "
                "lora_magnitude_vector, lora_bias for lora_B.bias)"
            )
