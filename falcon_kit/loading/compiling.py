"""Decoding on a GPU with a static cache and a compiled step, by transformers' own means: checked, and warmed up."""

from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import CompileConfig, FalconForCausalLM, StoppingCriteria, StoppingCriteriaList

from falcon_kit.catalogue.memory import QUANTISED


def compile_options(compile: bool | CompileConfig) -> CompileConfig | None:
    """The options of torch.compile, None for no compilation; refused where transformers would leave it out."""
    if not isinstance(compile, bool | CompileConfig):
        raise ValueError(f"compile={compile!r} is neither True, False nor a transformers.CompileConfig")
    if compile is False:
        return None
    options = CompileConfig(fullgraph=True) if compile is True else compile
    if not (torch.cuda.is_available() or options._compile_all_devices):
        raise ValueError(f"compile={compile!r} is for GPUs, and torch finds none here: leave it out")
    return options


def check_compilable(dtype: str, place: Any) -> None:
    """Raises ValueError where transformers would leave the compilation out, with no more than a warning."""
    places = {str(each) for each in (place.values() if isinstance(place, dict) else [place])}
    if dtype in QUANTISED:
        raise ValueError(f"compile with dtype={dtype!r}: quantised layers are not compiled: leave one of them out")
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            "compile with layers kept on disk or in host memory, which are not compiled: leave compile out, or have "
            "all layers on GPUs"
        )


def compiled(model: FalconForCausalLM, dtype: str, options: CompileConfig, default: bool) -> dict[str, Any]:
    """The arguments of `generate` that decode compiled, once it is. `default`: whether the options are the kit's."""
    places = getattr(model, "hf_device_map", {})
    check_compilable(dtype, places)
    if default and len(set(places.values())) > 1:
        options = CompileConfig(fullgraph=False)  # accelerate's hooks, which move on between devices, break the graph
    decoding = {"cache_implementation": "static", "compile_config": options}
    _warm_up(model, decoding)
    return decoding


class _Tick(StoppingCriteria):
    """Moves a progress bar with each token, and stops when it is full."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.bar.update()
        return torch.full((len(input_ids),), self.bar.n >= self.bar.total, device=input_ids.device)


def _warm_up(model: FalconForCausalLM, decoding: Mapping[str, Any]) -> None:
    """Lets decoding compile: prefill, compilation, recording of the CUDA graph, one replay.

    The static cache takes the whole context, so that no later text needs a longer one, which would compile again.
    """
    start = torch.full((1, 1), model.generation_config.eos_token_id, device=model.device)
    with tqdm(total=4, desc="Compiling", unit="step") as bar:
        model.generate(  # type: ignore[misc]  # its self is misdeclared
            start,
            attention_mask=torch.ones_like(start),
            max_length=model.config.max_position_embeddings,
            min_new_tokens=bar.total,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_Tick(bar)]),
            **decoding,
        )
