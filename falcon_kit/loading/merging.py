"""Adapters on and off a model, and merged into its weights, with a proof that the merged model says the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from falcon_kit.catalogue.names import adapter_spec
from falcon_kit.generation.chat import encode_text
from falcon_kit.loading import adapters
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.load import load, progress_bar

_PROBE = "User: What do giraffes eat?\nFalcon: They eat the leaves of trees, 12 hours a day.\nUser: Why?\nFalcon:"
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest gap between logits, as a share of the largest logit, that rounding merged weights explains."""


@dataclass(frozen=True, repr=False)
class Merged(Falcon):
    """A Falcon with an adapter in its weights."""

    gap: float = float("nan")
    """The largest difference of its logits from those of base and adapter, as a share of the largest logit."""

    def _facts(self) -> dict[str, str]:
        return {**super()._facts(), "merged": f"logits differ by {self.gap:.0e} from those of base and adapter"}


def fingerprint(model: Any) -> str:
    """Tells models apart, whether quantised or not."""
    norm = model.transformer.ln_f
    return adapters.fingerprint({"weight": norm.weight, "bias": norm.bias}, adapters.added_to(model.config))


def is_quantised(model: Any) -> bool:
    """Whether its weights are kept in fewer bits than they are computed with."""
    return bool(getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None))


@contextmanager
def attached(falcon: Falcon, adapter: str | Path) -> Iterator[PeftModel]:
    """The Falcon's own model with the adapter on, for the time of a `with` block; then as it was.

    Raises ValueError for an adapter that was made for another model.
    """
    _check(adapter, falcon)
    flags = {id(each): each.requires_grad for each in falcon.model.parameters()}
    model = _with_adapter(falcon, adapter)
    try:
        yield model
    finally:
        detach(model, flags)


def _with_adapter(falcon: Falcon, adapter: str | Path) -> PeftModel:
    with torch.random.fork_rng(), quiet():  # matrices are drawn before they are read
        return PeftModel.from_pretrained(falcon.model, str(adapter)).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back PEFT's one warning, about an attribute of transformers that it still calls by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def detach(model: PeftModel, flags: dict[int, bool]) -> None:
    """Takes the adapter off and gives each parameter its `requires_grad` back, by id."""
    plain: Any = model.unload()
    for each in plain.parameters():
        each.requires_grad_(flags.get(id(each), False))
    for name in ("peft_config", "_hf_peft_config_loaded"):
        plain.__dict__.pop(name, None)
    plain.eval()


def _check(adapter: str | Path, falcon: Falcon) -> None:
    """Raises FileNotFoundError where there is no adapter, and ValueError where it belongs to another model."""
    sizes = {name: tuple(each.shape) for name, each in falcon.model.named_parameters()}
    shapes = {} if is_quantised(falcon.model) else sizes
    adapters.check(Path(adapter), falcon.name, shapes, fingerprint(falcon.model))


def merge(adapter: Any, base: Falcon | str | Path | None = None, *, output_dir: str | Path | None = None) -> Merged:
    """A Falcon with the adapter in its weights, as fast as the base and loadable without PEFT; the base stays as it is.

    adapter: its folder, or the run of `fk.tune` that made it. base: a Falcon, or a name for `fk.load`; unset, what the
    adapter was made for. A quantised base is loaded anew, unquantised: merged into 4-bit weights, an adapter would be
    rounded away. With `output_dir` the model is saved.
    Raises ValueError for an adapter of another base, and RuntimeError where the merged model's logits are not those of
    base and adapter.
    """
    adapter = getattr(adapter, "adapter", adapter)
    if not isinstance(adapter, str | Path):
        raise TypeError(
            f"fk.merge(adapter, base) takes the adapter first, as its folder or the run that made it; got "
            f"{type(adapter).__name__}"
        )
    falcon = _unquantised(base if base is not None else adapters.made_for(Path(adapter)))
    _check(adapter, falcon)
    model: Any = _with_adapter(falcon, adapter)
    expected = _logits(falcon)
    merged = model.merge_and_unload(safe_merge=True)
    merged.__dict__.pop("peft_config", None)
    adapters.mark(merged, [Path(adapter)])
    merged.name_or_path = merged.config.name_or_path = str(adapter)
    falcon = replace(falcon, spec=adapter_spec(falcon.spec, Path(adapter)))
    gap = float((_logits(falcon) - expected).abs().max() / expected.abs().max())
    if not gap <= _ALLOWED[falcon.model.dtype]:
        raise RuntimeError(
            f"after merging, logits differ by {gap:.1e} of the largest, more than rounding to {falcon.model.dtype} "
            f"explains ({_ALLOWED[falcon.model.dtype]:.0e}): merge in float32, fk.merge(adapter, fk.load(name, "
            "dtype='float32'))"
        )
    if output_dir is not None:
        with progress_bar(False):
            falcon.model.save_pretrained(output_dir)
        falcon.tokenizer.save_pretrained(output_dir)
    return Merged(**{each.name: getattr(falcon, each.name) for each in fields(falcon)}, gap=gap)


def _unquantised(base: Falcon | str | Path) -> Falcon:
    """A copy of the base that may be changed."""
    if not isinstance(base, Falcon):
        return load(base)
    if is_quantised(base.model):
        return load(base.name, dtype="bfloat16", chat=base.chat_format.name)
    return replace(base, model=copy.deepcopy(base.model))


def _logits(falcon: Falcon) -> Tensor:
    """What the model makes of a fixed text, (T, V) in float32."""
    ids = torch.tensor([encode_text(_PROBE, falcon.tokenizer)], device=falcon.model.device)
    with torch.inference_mode():
        return falcon.model(ids, use_cache=False).logits[0].float().cpu()
