"""A model and its tokenizer written to a folder, as a checkpoint that `load` and transformers read."""

import re
from pathlib import Path

from torch import nn
from transformers import FalconForCausalLM, PreTrainedTokenizerBase

from falcon_kit.display.errors import printable, require
from falcon_kit.display.saving import check_folder
from falcon_kit.generation.chat import save_tokenizer
from falcon_kit.generation.training import check_not_in_training
from falcon_kit.loading.adapters import write_errors
from falcon_kit.loading.reading import progress_bar
from falcon_kit.model.checks import is_offloaded

_SAVED = re.compile(
    r"config\.json|generation_config\.json|(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|chat_template\.jinja"
)
"""The files of a checkpoint, which saving writes or replaces."""


def check_replaceable(folder: Path, label: str) -> None:
    """Raises for a file, and for a folder with more in it than a checkpoint: saving would remove that.

    label: the argument that the error names.
    """
    check_folder(folder, label)
    content = sorted(folder.iterdir()) if folder.is_dir() else []
    other = [each for each in content if each.is_dir() or not _SAVED.fullmatch(each.name)]
    if content and not (folder / "config.json").is_file():
        other += content
    if other:
        raise FileExistsError(
            f"{label}={str(folder)!r} holds {printable(other[0].name)}, which saving a model there would remove: "
            "give a new folder, or one that holds only a checkpoint"
        )


def has_adapters(model: FalconForCausalLM) -> bool:
    """Whether adapters are attached to a model."""
    return bool(getattr(model, "peft_config", None)) or any("lora_" in name for name, _ in model.named_parameters())


def remove_wrappers(model: FalconForCausalLM) -> None:
    """Puts the layers back in place that PEFT leaves wrapped, under other names, once their adapters are deleted.

    Raises RuntimeError while another thread trains the model.
    """
    check_not_in_training(model)
    wrapped = False
    for parent in [*model.modules()] if not has_adapters(model) else ():
        for name, child in [*parent.named_children()]:
            if (layer := _without_wrapper(child)) is not child:
                setattr(parent, name, layer)
                wrapped = True
    if wrapped:  # `load_adapter` replaced the names of the checkpoint's weights, to be saved under, by the adapter's
        vars(model).pop("_weight_conversions", None)


def _without_wrapper(module: nn.Module) -> nn.Module:
    for name in ("base_layer", "original_module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return _without_wrapper(inner)
    return module


def check_complete(model: FalconForCausalLM) -> None:
    """Raises ValueError for a model whose weights are not all in it, under their own names."""
    remove_wrappers(model)
    require(
        not has_adapters(model),
        "the model has adapters attached, and a checkpoint holds none: fk.merge(adapter, base, output_dir=...) saves "
        "the model with an adapter in its weights",
    )
    require(
        not is_offloaded(model),
        "a part of the model is offloaded to host memory or disk: load it completely, device_map='cpu', and save that",
    )


def write_model(model: FalconForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights, config, settings of generation and tokenizer into a folder."""
    with progress_bar(False), write_errors():
        model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
