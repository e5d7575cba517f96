"""Decoding with a static cache and torch.compile, through transformers' `generate`: checked, and warmed up."""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import CompileConfig, FalconForCausalLM

from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.catalogue.spec import context_limit
from falcon_kit.generation.arguments import CACHE
from falcon_kit.generation.kept_cache import kept_cache
from falcon_kit.model.static_cache import slots_read
from falcon_kit.planning.devices import places

_STEPS = 4


def compile_options(compile: bool | CompileConfig) -> CompileConfig | None:
    """The options of torch.compile; None for no compilation. Raises ValueError where transformers would not compile."""
    if not isinstance(compile, bool | CompileConfig):
        raise ValueError(f"compile={compile!r} is neither True, False nor a transformers.CompileConfig")
    if compile is False:
        return None
    # Inductor's coordinate descent tuning is left off: it took 7.9 in place of 6.8 ms a token (7B, H200, torch 2.11).
    options = CompileConfig(fullgraph=True) if compile is True else compile
    if not (torch.cuda.is_available() or options._compile_all_devices):
        raise ValueError(f"compile={compile!r} is for GPUs, and torch finds none here: leave it out")
    return options


def check_compilable(dtype: str, device_map: Any, on_cpu: bool = True) -> None:
    """Raises ValueError where transformers would not compile and only warn, and for layers on several devices.

    torch records no CUDA graph of several devices (torch._inductor.cudagraph_utils.check_multiple_devices_or_any_cpu_
    nodes). device_map: as in `from_pretrained`. on_cpu: whether a model on the CPU is compiled.
    """
    devices = places(device_map)
    if devices == {"cpu"} and not on_cpu:
        raise ValueError("compile with device_map='cpu': transformers compiles on GPUs only: leave one of the two out")
    if len(devices - {"cpu", "disk"}) > 1:
        raise ValueError(
            f"compile with layers on {len(devices)} devices: CUDA graphs, without which compiling gains little, are of "
            "one device: leave compile out, or put all layers on one GPU, with a smaller dtype or model"
        )
    if dtype in QUANTISED and dtype != "int4":
        raise ValueError(
            f"compile with dtype={dtype!r}: its layers are not compiled: leave compile out, or use dtype='int4'"
        )
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(
            "compile with layers offloaded to disk or host memory, which are not compiled: leave compile out, or put "
            "all layers on GPUs"
        )


def compiled(model: FalconForCausalLM, dtype: str, options: CompileConfig) -> dict[str, Any]:
    """The arguments of `generate` for compiled decoding, after a warm-up that compiles."""
    check_compilable(dtype, getattr(model, "hf_device_map", {}))
    _warm_up(model, options)
    return {"cache_implementation": "static", "compile_config": options}


def _warm_up(model: FalconForCausalLM, options: CompileConfig) -> None:
    """Generates four tokens for each number of slots that a step reads: prefill, compilation, CUDA graph, one replay.

    Later texts use the cache of the warm-up, for which the graphs were recorded, and wait for no recording. Before
    torch 2.13, only the thread that recorded the first graph can record others (pytorch#123177).
    """
    prompts, context = [1], context_limit(model.config)
    while (longer := slots_read(prompts[-1] + 1, context)) + _STEPS <= context:
        prompts.append(longer)
    with tqdm(total=_STEPS * len(prompts), desc="Compiling", unit="step") as bar:
        for tokens in prompts:
            start = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
            with kept_cache(model, 1) as cache:
                past: Any = {CACHE: cache}
                model.generate(  # type: ignore[misc]  # its self is misdeclared
                    start,
                    attention_mask=torch.ones_like(start),
                    max_new_tokens=_STEPS,
                    min_new_tokens=_STEPS,
                    do_sample=False,
                    **past,
                    compile_config=options,
                )
            bar.update(_STEPS)
