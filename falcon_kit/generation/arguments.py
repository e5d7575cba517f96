"""The keyword arguments of `generate`: a generation config expanded, names checked."""

from difflib import get_close_matches
from inspect import signature
from typing import Any

from transformers import FalconForCausalLM, GenerationConfig

from falcon_kit.display.errors import require, unknown_name
from falcon_kit.generation.sampling import SAMPLING_FIELDS

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""The arguments of transformers' `generate` that turn on assisted generation."""


def expand_generation_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the values of a `generation_config` among them as keyword arguments; given keywords win."""
    settings = dict(settings)
    config = settings.pop("generation_config", None)
    if config is None:
        return settings
    values = {name: value for name in vars(GenerationConfig()) if (value := getattr(config, name, None)) is not None}
    if settings.get("max_new_tokens") or settings.get("max_length"):
        values = {name: value for name, value in values.items() if name not in ("max_new_tokens", "max_length")}
    return values | settings


def check_names(options: dict[str, Any], model: FalconForCausalLM) -> None:
    """Raises ValueError for an argument that neither the kit nor transformers has; the error lists the nearest."""
    sampling = set(SAMPLING_FIELDS)
    known = sampling | set(vars(GenerationConfig())) | set(signature(type(model).generate).parameters)
    known |= set(signature(type(model).forward).parameters)
    for name in options:
        listed = known if get_close_matches(name, known) else sampling  # all of transformers' are too many to list
        require(name in known, unknown_name("setting", name, sorted(listed)))
