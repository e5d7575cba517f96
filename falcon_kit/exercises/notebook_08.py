"""The checks of notebook 08, Several GPUs."""

from collections.abc import Callable, Collection
from typing import Any

from falcon_kit.catalogue.names import spec
from falcon_kit.exercises.outcome import expect, near
from falcon_kit.planning.plan import plan


def exercise_1(microseconds: float) -> str:
    """A number of microseconds, for one all-reduce."""
    shape, gpus = spec("falcon-40b-instruct"), 4
    read_all = 2 * shape.parameters / 1555e9
    right = 1e6 * read_all * (1 - 1 / gpus) / shape.layers
    for factor, unit in {1e-6: "seconds", 1e-3: "milliseconds"}.items():
        expect(not near(microseconds, factor * right), f"That is in {unit}: give microseconds.")
    expect(not near(microseconds, shape.layers * right), "That is the time of all layers: divide it by their number.")
    expect(not near(microseconds, right / 2), "A block of Falcon has one all-reduce, not two.")
    expect(near(microseconds, right), "Solve read_all = read_all / gpus + layers * all_reduce for all_reduce.")
    return "The notebook assumes 20 microseconds. With slow links between the GPUs, a device map can be the faster way."


def exercise_2(sizes: Collection[int]) -> str:
    """A set of sizes in GiB, such as {40, 80}."""
    fitting = {size for size in (40, 80, 141) if plan("falcon-180B", devices=f"8x{size}GiB").fits}
    given = set(sizes)
    expect(given <= {40, 80, 141}, "Give sizes out of 40, 80 and 141.")
    expect(40 not in given, "The weights alone take 333 GiB, and 8 x 40 GiB are 320.")
    expect(given == fitting, 'Ask fk.plan("falcon-180B", devices="8x80GiB").fits, and the same for 141.')
    return "The answer is the same for tensor parallelism: both ways divide the weights."


def exercise_3(half: Callable[[Any, Any, Any, int], Any]) -> str:
    """A function of the attention module, x, rotation and rank, as in def half(attention, x, rotation, rank)."""
    expect(callable(half), "Give the function itself, without calling it.")
    attention, x, rotation, whole = _first_attention()
    import torch

    with torch.inference_mode():
        parts = [half(attention, x, rotation, rank) for rank in (0, 1)]
    expect(all(isinstance(each, torch.Tensor) for each in parts), "Your function returns no tensor yet.")
    expect(parts[0].shape == whole.shape, f"A half has the shape {tuple(whole.shape)}: apply its columns of `dense`.")
    expect(not torch.equal(parts[0], parts[1]), "Both ranks return the same: take the rows and columns of the rank.")
    gap = float((parts[0] + parts[1] - whole).abs().max() / whole.abs().max())
    hint = f"The sum differs by {gap:.0%}: are the groups split as [q q k v], and are queries and keys rotated?"
    expect(gap < 1e-4, hint)
    return "Two ranks, each with half of the heads and of the KV cache, and one sum at the end."


def _first_attention() -> tuple[Any, Any, Any, Any]:
    """Falconet's first attention, its input for a sentence, the rotation, and its output."""
    import torch

    from falcon_kit.loading.load import load

    falcon = load("falconet", dtype="float32")
    model: Any = falcon.model
    attention = model.transformer.h[0].self_attention
    ids = falcon.tokenizer("The giraffe is the tallest animal.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        x = torch.nn.functional.layer_norm(model.get_input_embeddings()(ids), (falcon.spec.d_model,))
        rotation = model.transformer.rotary_emb(x, torch.arange(ids.shape[1])[None])
        return attention, x, rotation, attention(x, rotation, None)[0]
