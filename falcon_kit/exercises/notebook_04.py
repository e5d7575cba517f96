"""The checks of notebook 04, Architecture."""

from collections.abc import Mapping, Sequence
from typing import Any

from falcon_kit.catalogue.names import spec
from falcon_kit.exercises.outcome import expect, near

TEXT = "The giraffe is the tallest animal."


def exercise_1(shares: Mapping[str, float]) -> str:
    """Three shares from 0 to 1: {"MLP": ..., "attention": ..., "embedding": ...}."""
    shape = spec("falcon-40b")
    one_matrix = shape.layers * shape.d_model * shape.intermediate_size
    counts = {
        "MLP": 2 * one_matrix,
        "attention": shape.layers * shape.layer_parameters - 2 * one_matrix,
        "embedding": shape.embedding_parameters,
    }
    for part, count in counts.items():
        given, right = float(shares[part]), count / shape.parameters
        expect(not near(given, 100 * right), f"{part}: that is the share in percent: divide it by 100.")
        expect(not near(given, right / shape.layers), f"{part}: that is one layer: the 40B has {shape.layers}.")
        expect(part != "MLP" or not near(given, right / 2), "MLP: it has two matrices, up and down.")
        expect(near(given, right), f"{part}: count its parameters in all layers, and divide by {shape.parameters:,}.")
    return "More than three quarters of the 40B are MLPs, and its embedding is nearly nothing."


def exercise_2(skipped: float) -> str:
    """A share from 0 to 1: the skipped tiles, divided by all tiles."""
    side = 2048 // 64
    right = (side - 1) / (2 * side)
    expect(not near(skipped, 100 * right, 0.001), "That is the share in percent: divide it by 100.")
    expect(not near(skipped, 1 - right, 0.001), "That is the share of tiles that are computed: the others are skipped.")
    expect(not near(skipped, 28 / 64, 0.001), "That is the picture of 512 tokens: here there are 32 tiles a side.")
    expect(not near(skipped, 0.5, 0.001), "Almost: the tiles on the diagonal are computed, as half of each is needed.")
    expect(near(skipped, right, 0.001), "Of n x n tiles, count those above the diagonal, and divide by n x n.")
    return "Nearly half of the tiles need no computation, because a query never reads the future."


def exercise_3(changes: Sequence[float], falcon: Any) -> str:
    """A list with a number for each token, and the model: fk.check("04.3", changes, falcon)."""
    right, given = _changes_without_rotation(falcon), [float(each) for each in changes]
    expect(len(given) == len(right), f"Give {len(right)} numbers, one for each token of {TEXT!r}.")
    expect(max(given) > 0.01, "Nothing changed: did both runs use the rotation?")
    expect(given[0] < 0.01, "The first token changed too. It attends only to itself, so compare the same tokens.")
    same = all(near(mine, theirs, 0.1) for mine, theirs in zip(given[1:], right[1:], strict=True))
    expect(same, "Divide the norm of the difference by the norm of the output with rotation, token by token.")
    return "The first token attends only to itself: the softmax over one score is 1, whatever the rotation."


def _changes_without_rotation(falcon: Any) -> list[float]:
    """The relative change of the first block's output for each token of TEXT."""
    import torch

    model, tokenizer = falcon
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(model.device)
    with torch.inference_mode():
        x = model.get_input_embeddings()(ids)
        rotation = model.transformer.rotary_emb(x, torch.arange(ids.shape[1], device=x.device)[None])
        block = model.transformer.h[0]
        rotated, unrotated = (block(x, rotation=each, attention_mask=None)[0] for each in (rotation, None))
    return list(((rotated - unrotated).norm(dim=-1) / rotated.norm(dim=-1)).tolist())
