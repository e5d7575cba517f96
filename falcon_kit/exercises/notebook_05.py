"""The checks of notebook 05, Attention."""

from typing import Any, Literal

from falcon_kit.exercises.outcome import expect, near

QUESTION = "The baby of a giraffe is called a"
_PERIOD = 50
_SECOND_COPY = slice(_PERIOD + 1, None)  # nothing shows that the sequence starts again, so its first token is left out


def exercise_1(layer: int, falcon: Any) -> str:
    """The number of a layer, and the model: fk.check("05.1", layer, falcon)."""
    from falcon_kit.inspection.lens import lens

    ranks = lens(falcon, QUESTION).target_ranks[:, -1].tolist()  # the embedding's, then each layer's
    right = max((row for row, rank in enumerate(ranks) if rank), default=-1)
    expect(0 <= layer < falcon.spec.layers, f"The layers are 0 to {falcon.spec.layers - 1}.")
    expect(layer != right + 1, "Almost: the first row is the embedding, so row n is the output of layer n - 1.")
    expect(layer == right, f"After layer {layer}, the answer has rank {ranks[layer + 1]} (0 is the most probable).")
    return f"The ranks from the embedding on are {ranks}: the answer comes nearer with each layer."


def exercise_2(bits: float, falcon: Any) -> str:
    """Bits per token of the second copy, and the model: fk.check("05.2", bits, falcon)."""
    heads = _induction_heads(falcon)
    with_mean, with_zero = _without(falcon, heads, "mean"), _without(falcon, heads, "zero")
    right, zero, before = (each[_SECOND_COPY] for each in (with_mean.after, with_zero.after, with_mean.before))
    if not near(bits, right.mean(), 0.002):  # where the heads matter little, a mistake is near the right answer too
        expect(not near(bits, float(before.mean())), "That is the whole model: take `after`, not `before`.")
        expect(not near(bits, zero.mean(), 0.002), "That is with zero: use replace='mean'.")
    expect(near(bits, right.mean(), 0.01), "Take the mean of `after[51:]` with all induction heads ablated.")
    bits_of = f"{right.mean():.2f} bits, {zero.mean():.2f} with zero and {before.mean():.2f} with the heads"
    if right.mean() < (zero.mean() + before.mean()) / 2:
        return f"{bits_of}: predicted again, for the most part. The mean of a head can already help."
    return f"{bits_of}: not predicted. The mean is the same at every position, and copying needs another token at each."


def exercise_3(lowest_bits: float, falcon: Any) -> str:
    """The lowest of the mean surprisals in bits, and the model: fk.check("05.3", lowest_bits, falcon)."""
    heads = _induction_heads(falcon)
    rest = [[head for head in heads if head != kept] for kept in heads]
    only_one = [float(_without(falcon, others).after[_SECOND_COPY].mean()) for others in rest]
    without_one = [float(_without(falcon, [head]).after[_SECOND_COPY].mean()) for head in heads]
    if not near(lowest_bits, min(only_one), 0.002):  # of two heads, without one is with only the other
        mistaken = any(near(lowest_bits, each, 0.01) for each in without_one)
        expect(not mistaken, "That is without one head: keep only one.")
        expect(not near(lowest_bits, max(only_one), 0.002), "That is the highest of the results: take the lowest.")
    expect(near(lowest_bits, min(only_one), 0.01), "For each head, ablate all the others, and average `after[51:]`.")
    none = _without(falcon, heads)
    with_all, with_none = (float(each[_SECOND_COPY].mean()) for each in (none.before, none.after))
    enough = "one does most of it" if min(only_one) < (with_all + with_none) / 2 else "one is not enough"
    return f"The second copy takes {min(only_one):.2f} bits with one head, {with_all:.2f} with all: {enough}."


def _induction_heads(falcon: Any) -> list[tuple[int, int]]:
    from falcon_kit.inspection.attention import induction

    heads = induction(falcon, period=_PERIOD).top("induction", 20)
    return [(layer, head) for layer, head, score in heads if score > 0.5]


def _without(falcon: Any, heads: list[tuple[int, int]], replace: Literal["zero", "mean"] = "zero") -> Any:
    """The ablation of these heads on the repeated tokens of the notebook."""
    from falcon_kit.inspection.ablation import ablate
    from falcon_kit.inspection.attention import induction

    return ablate(falcon, induction(falcon, period=_PERIOD).ids, heads=heads, replace=replace)
