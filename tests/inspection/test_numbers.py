"""Numbers of numpy and torch are token ids, layers, heads and seeds like Python's."""

import numpy as np
import pytest
import torch

import falcon_kit as fk

IDS = [23, 900, 77, 1500, 42]
KINDS = {
    "an array": np.array,
    "a list of numpy's": lambda ids: list(np.array(ids, dtype=np.uint16)),
    "a tensor": torch.tensor,
    "a list of torch's": lambda ids: list(torch.tensor(ids)),
}
CALLS = {
    "generate": lambda falcon, ids, one: str(falcon.generate(ids, max_new_tokens=4 * one, eos_token_id=ids[0])),
    "stream": lambda falcon, ids, one: [piece.text for piece in falcon.stream(ids, max_new_tokens=4 * one, seed=one)],
    "lens": lambda falcon, ids, one: fk.lens(falcon, ids, target=ids[0]).target_probabilities.tolist(),
    "attention": lambda falcon, ids, one: fk.attention(falcon, ids, one, [one, 0 * one]).map(one, one).tolist(),
    "attribute": lambda falcon, ids, one: fk.attribute(falcon, ids, ids[1], method="leave-one-out").scores.tolist(),
    "ablate": lambda falcon, ids, one: fk.ablate(falcon, ids, [(one, 0 * one)]).loss_after,
    "ablate pairs": lambda falcon, ids, one: [
        fk.ablate(falcon, ids, pairs).heads for pairs in ([[one, 0 * one]], np.array([[int(one), 0]]))
    ],
    "explain": lambda falcon, ids, one: str(fk.explain(falcon, ids, layer=one, head=one).page(one).data),
    "lens numbers": lambda falcon, ids, one: str(fk.lens(falcon, ids, top_k=2 * one).next_tokens(one)),
    "lens figure": lambda falcon, ids, one: fk.lens(falcon, ids).figure(2 * one).axes[0].get_title(),
    "attribute steps": lambda falcon, ids, one: repr(fk.attribute(falcon, ids, steps=8 * one)),
    "attention numbers": lambda falcon, ids, one: fk.attention(
        falcon, ids, one, max_bytes=10_000 * one, prefill_chunk_size=2 * one
    ).top("sink", 3 * one),
    "evaluate": lambda falcon, ids, one: str(fk.evaluate(falcon, text="A giraffe.", stride=5 * one, seed=one)),
    "plan": lambda falcon, ids, one: fk.plan("tiiuae/falcon-40b", context=2000 * one, batch=7000 * one).total_bytes,
    "repeated_tokens": lambda falcon, ids, one: fk.repeated_tokens(falcon, 5 * one, 2 * one, seed=one),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_token_ids_and_indices_may_be_numpys_or_torchs(instruct, call, kind):
    ids = KINDS[kind](IDS)
    assert CALLS[call](instruct, ids, ids[:1][0] * 0 + 1) == CALLS[call](instruct, IDS, 1)
