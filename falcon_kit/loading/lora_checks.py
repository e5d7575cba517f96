"""Whether config and weights of an adapter say the same, so that nothing in either is left out in silence."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falcon_kit.display.errors import is_number, printable
from falcon_kit.display.reading import named_errors, read_json

_LARGEST = torch.finfo(torch.float32).max
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_HALVES = tuple(half for pair in _PAIRS for half in pair)
_WITHOUT_EFFECT = frozenset({"merge_weights"})
"""Fields of old versions of PEFT that do not change what is computed."""


def check_known_fields(file: Path, config: Any) -> None:
    """Raises ValueError for a field that this PEFT does not know and that switches something on.

    Unknown numbers and texts are what belongs to such a switch, and newer versions write their defaults: of them, PEFT
    itself warns.
    """
    for name, value in read_json(file).items():
        unknown = name not in vars(config) and name not in _WITHOUT_EFFECT
        if unknown and value and (value is True or isinstance(value, list | dict)):
            raise ValueError(
                f"{file} has {printable(name)}={printable(repr(value))}, which this version of PEFT does not know and "
                "would leave out: update PEFT, pip install -U peft, or delete the field if it was not used in training"
            )


def check_finite(file: Path, matrices: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor with numbers that are not finite: every answer would be noise."""
    for name, matrix in matrices.items():
        values = matrix.float() if matrix.dtype.itemsize == 1 else matrix  # float8 has few functions
        if not values.isfinite().all():
            raise ValueError(
                f"{file} has numbers that are not finite in {printable(name)}, and every answer would be noise: take "
                "an earlier checkpoint of its training, or train again with a lower learning rate"
            )


def check_lora(file: Path, weights: Path, config: Any, matrices: Mapping[str, Tensor], layers: Collection[str]) -> None:
    """Raises ValueError where the matrices of LoRA are incomplete, or others than the config says.

    file, weights: those of the config and of the matrices. layers: the names of the layers that have matrices.
    """
    r, alpha = config.r, config.lora_alpha
    if not (isinstance(r, int) and r >= 1 and is_number(alpha, -_LARGEST, _LARGEST)):
        raise ValueError(
            f"{file} has r={r!r} and lora_alpha={alpha!r}, but r is a whole number, at "
            "least 1, and lora_alpha is finite in float32: write the values of its training there"
        )
    if str(begun := config.init_lora_weights).startswith("pissa_niter"):
        raise ValueError(
            f"{file} has init_lora_weights={begun!r}: PEFT draws numbers for it, so that base and adapter give other "
            "logits each time: save it as plain LoRA where it was trained, model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=folder_of_its_beginning)"
        )
    for layer in sorted(layers):
        pair = next((each for each in _PAIRS if any(f"{layer}.{half}" in matrices for half in each)), _PAIRS[0])
        if lacking := [half for half in pair if f"{layer}.{half}" not in matrices]:
            raise ValueError(
                f"{weights} lacks {lacking[0]} of {layer}: the adapter was not saved completely, "
                "or not by PEFT's save_pretrained; save it again"
            )
        down, up = (matrices[f"{layer}.{half}"] for half in pair)
        if not config.rank_pattern and len(down) != r:
            raise ValueError(
                f"{file} has r={r}, but {pair[0]} of {layer} has the rank {len(down)}: write the value of its training "
                "there"
            )
        if up.dim() == 2 and up.shape[1] != len(down):
            raise ValueError(
                f"{weights} has {pair[0]} of {layer} with the rank {len(down)}, but {pair[1]} with the rank "
                f"{up.shape[1]}: they are of different trainings; save the adapter again"
            )


def check_targets(file: Path, weights: Path, config: Any, layers: Collection[str]) -> None:
    """Raises ValueError for matrices of a layer that PEFT would leave out. Arguments as for `check_lora`."""
    for layer in sorted(layers):
        with named_errors(file, "write the values of its training there"):
            found = _is_target(layer, config)
        if not found:
            raise ValueError(
                f"{weights} has matrices of {printable(layer)}, which target_modules, exclude_modules and "
                f"layers_to_transform in {file} leave out: write the values of its training there"
            )


def _is_target(layer: str, config: Any) -> bool:
    """Whether PEFT would add the matrices of a layer; AutoModel's names have no prefix, and a pattern may be theirs."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules in (None, "all-linear") or getattr(config, "target_parameters", None):
        return True
    if getattr(config, "ensure_weight_tying", False) and not layer.startswith("transformer.h."):
        return True  # PEFT adds the other one of embedding and head
    return any(check_target_module_exists(config, name) for name in (layer, layer.removeprefix("transformer.")))


def check_used(file: Path, weights: Path, names: Collection[str]) -> None:
    """Raises ValueError for a tensor that plain LoRA does not use, as of DoRA where the config has no use_dora."""
    for name in sorted(names):
        if not name.endswith(tuple(f".{half}" for half in _HALVES)):
            raise ValueError(
                f"{weights} has {printable(name)}, which an adapter with the settings in {file} does not use: write "
                "the settings of its training there (use_dora for lora_magnitude_vector, lora_bias for lora_B.bias)"
            )
