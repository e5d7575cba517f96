"""The checks of notebook 07, Quantisation."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

from falcon_kit.catalogue.names import spec
from falcon_kit.exercises.outcome import expect, near
from falcon_kit.planning.plan import plan

_KINDS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def exercise_1(errors: Mapping[int, float]) -> str:
    """A dictionary with the relative error for each block size: {16: ..., 64: ..., 256: ..., 1024: ...}."""
    weight, levels = _first_weight()
    for block in (16, 64, 256, 1024):
        given, right = float(errors[block]), _error(weight, levels, block)
        expect(not near(given, 100 * right), f"{given:.3g} is in percent: divide it by 100.")
        expect(not near(given, right**2), "That is the square: divide the norm of the difference by the norm.")
        if block != 64:
            unchanged = near(given, _error(weight, levels, 64), 1e-3)
            expect(not unchanged, f"Block {block} has the error of blocks of 64: are the scales computed again?")
        expect(near(given, right), f"Block {block}: is each scale the largest absolute value of its {block} weights?")
    return "A larger block saves scales and has a larger maximum, so that its levels are farther apart."


def exercise_2(kind: str) -> str:
    """The name of a kind of layer: "query_key_value", "dense", "dense_h_to_4h" or "dense_4h_to_h"."""
    expect(kind in _KINDS, f"Give one of {', '.join(_KINDS)}.")
    found = _divergences()
    least, *_, second, first = sorted(found.values())
    expect(found[kind] > least, "That kind changes the predictions least. Is the divergence the mean over all tokens?")
    expect(
        found[kind] == first,
        f"Another kind has {first / found[kind]:.1f} times the divergence: the sum of p (log p - log q) over the "
        "vocabulary, p unquantised.",
    )
    return f"{first:.4f} nats per token, {first / second:.1f} times that of the next kind."


def exercise_3(context: float) -> str:
    """A number of tokens in each of the 32 texts, which may have a fraction."""
    shape = spec("falcon-40b-instruct")
    weights = plan(shape, "nf4-double", devices="H200").weight_bytes
    right = weights / (32 * shape.kv_bytes_per_token())
    expect(
        not near(context, 32 * right), "That is the context of one text: the cache of 32 texts is 32 times as large."
    )
    expect(not near(context, right / 2), "Keys and values are both in kv_bytes_per_token(): count them once.")
    whole = plan(shape, "bfloat16", devices="H200").weight_bytes / (32 * shape.kv_bytes_per_token())
    expect(not near(context, whole), "These are the weights in bfloat16: take dtype='nf4-double'.")
    expect(near(context, right), "Divide plan.weight_bytes by 32 * spec.kv_bytes_per_token().")
    return f"{right:,.0f} tokens: at its own context of {shape.context}, the weights are still the larger part."


def _first_weight() -> tuple[Any, Any]:
    """A weight of Falconet in bfloat16, as the notebook has it, and the 16 levels of nf4."""
    from bitsandbytes.functional import get_4bit_type

    from falcon_kit.loading.load import load

    model: Any = load("falconet", dtype="bfloat16").model
    levels = get_4bit_type("nf4", device="cpu")  # type: ignore[no-untyped-call]  # bitsandbytes has no types
    return model.transformer.h[0].mlp.dense_h_to_4h.weight.detach().float(), levels


def _error(weight: Any, levels: Any, block: int) -> float:
    """The relative error of rounding to the nearest level."""
    return float((_rounded(weight, levels, block) - weight).norm() / weight.norm())


def _rounded(weight: Any, levels: Any, block: int = 64) -> Any:
    """A weight rounded to the nearest level, with a scale for each block."""
    import torch

    blocks = weight.detach().to(levels.device).reshape(-1, block)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scales).view_as(weight).to(weight.device)


@cache
def _divergences() -> dict[str, float]:
    """The mean Kullback-Leibler divergence of Falconet's predictions with each kind of layer in four bits."""
    import torch

    from falcon_kit.falconet.corpus import documents
    from falcon_kit.loading.load import load

    falcon, (_, levels) = load("falconet", dtype="float32"), _first_weight()
    texts = [falcon.tokenizer(text, return_tensors="pt")["input_ids"] for text in documents("base", 10, seed=1)]

    def predictions(model: Any) -> list[Any]:
        return [model(ids).logits[0].log_softmax(-1) for ids in texts]

    found = {}
    with torch.inference_mode():
        exact = predictions(falcon.model)
        for kind in _KINDS:
            changed = deepcopy(falcon.model)
            for name, layer in changed.named_modules():
                if name.rpartition(".")[2] == kind:
                    layer.weight.data = _rounded(layer.weight, levels)
            pairs = zip(exact, predictions(changed), strict=True)
            found[kind] = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(texts)
    return found
