"""The parts that the view shows: equal to the record, and within bounds."""

import ast
import json
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import falcon_kit as fk
from falcon_kit.explanation import parts
from falcon_kit.explanation.record import record
from falcon_kit.explanation.route import attention_rows
from falcon_kit.inspection.hooks import inspect_model
from tests.inspection.models import model

TEXT = "The giraffe eats the leaves of tall trees"


@pytest.fixture(scope="module")
def inspected(instruct):
    return inspect_model(instruct)


@pytest.fixture(scope="module")
def ids(inspected):
    return inspected.encode(TEXT)


@pytest.fixture(scope="module")
def found(inspected, ids):
    return record(inspected, ids, 2)


def unpacked(part):
    return np.frombuffer(b64decode(part["f32"]), "<f4").reshape(part["shape"])


def test_an_array_comes_back_as_it_was():
    values = torch.tensor([[1.5, -2.0, 3e-8], [0.0, torch.inf, 7.0]])
    assert np.array_equal(unpacked(parts.packed(values)), values.numpy())


def test_the_probabilities_of_all_heads_are_the_row_of_their_maps(found, ids):
    for position in (0, 3, len(ids) - 1):
        rows = attention_rows(found.layer.heads, None, 0, len(ids))[:, position, : position + 1]
        shown = unpacked(parts.layer_part(found.layer, position)["probabilities"])
        np.testing.assert_allclose(shown, rows, atol=1e-6)
        np.testing.assert_allclose(shown.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("head", range(4))
def test_a_score_is_the_product_of_the_query_and_the_key(found, ids, head):
    part = parts.head_part(found.layer, len(ids) - 1, head, 3)
    score = unpacked(part["query"]) @ unpacked(part["key"]) / 8
    assert score == pytest.approx(unpacked(part["scores"])[3], rel=1e-4)
    assert part["group"] == head // 2


def test_without_a_key_it_is_the_earlier_token_that_is_attended_to_most(found, ids):
    position = len(ids) - 1
    part = parts.head_part(found.layer, position, 1, None)
    assert part["key_position"] == int(unpacked(part["scores"])[:position].argmax())
    assert parts.head_part(found.layer, 0, 1, None)["key_position"] == 0


@pytest.mark.parametrize("head", range(4))
def test_the_values_of_a_head_are_those_that_were_recorded(found, ids, head):
    layer, position, group = found.layer, len(ids) - 2, head // 2
    part = parts.head_part(layer, position, head, 3)
    values = layer.heads.value[group, : position + 1]
    probabilities = attention_rows(layer.heads, None, 0, len(ids))[head, position, : position + 1]
    np.testing.assert_allclose(unpacked(part["output"]), probabilities @ values, atol=1e-5)
    np.testing.assert_allclose(unpacked(part["values"]), values.norm(dim=-1), rtol=1e-5)
    np.testing.assert_array_equal(unpacked(part["query_before"]), layer.query_before[head, position])
    np.testing.assert_array_equal(unpacked(part["key_before"]), layer.key_before[group, 3])


def test_the_part_of_a_layer_is_what_was_recorded_at_the_position(found):
    part, layer = parts.layer_part(found.layer, 3), found.layer
    assert part["vectors"].keys() == layer.vectors.keys()
    for name, vectors in layer.vectors.items():
        shown = part["vectors"][name]
        np.testing.assert_array_equal(unpacked(shown.pop("first")), vectors.first[3])
        assert shown == {fact: getattr(vectors, fact)[3].item() for fact in ("mean", "deviation", "norm")}
    for name in ("neurons", "activations", "active"):
        assert part[name] == getattr(layer, name)[3].tolist()


def test_the_map_is_the_lower_triangle_of_at_most_64_cells_a_side(inspected):
    ids = inspected.encode(list(range(20, 320)))
    found = record(inspected, ids, 0).layer
    rows = attention_rows(found.heads, None, 0, 300)[1].numpy()
    whole = rows.reshape(60, 5, 60, 5).max((1, 3))  # the maximum of 5 x 5 tokens
    assert (np.triu(whole, 1) == 0).all()
    shown = unpacked(parts.head_part(found, 299, 1, None)["map"])
    np.testing.assert_allclose(shown, whole[np.tril_indices(60)], atol=1e-7)


def test_the_named_tokens_are_the_likeliest(inspected, ids, found):
    part = parts.text_part(inspected, ids, found.logits)
    order = np.argsort(-unpacked(part["logits"]), kind="stable")[: parts.NAMED]
    assert [each["id"] for each in part["named"]] == order.tolist()


def test_the_frequencies_are_those_of_the_rotary_embedding(inspected, ids, found, tokenizer):
    frequencies = parts.text_part(inspected, ids, found.logits)["frequencies"]
    np.testing.assert_allclose(frequencies, 10_000 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)
    without = inspect_model((model("rw"), tokenizer))
    assert parts.text_part(without, ids, found.logits)["frequencies"] is None


def test_the_cache_is_the_closed_form_of_both_architectures(inspected, ids, found):
    cache = parts.text_part(inspected, ids, found.logits)["cache"]
    assert cache == {"dtype": "float32", "grouped": 2 * 6 * 2 * 64 * 4, "transformers": 2 * 6 * 4 * 64 * 4}


FUNCTIONS = {
    "embedding": "falcon_kit/model/modeling.py FalconModel.forward",
    "norms": "falcon_kit/model/layers.py FalconDecoderLayer.forward",
    "projection": "falcon_kit/model/layers.py split_heads",
    "rotary": "transformers/models/falcon/modeling_falcon.py rotate_half",
    "attention": "falcon_kit/model/attention.py fused_attention",
    "mlp": "falcon_kit/model/layers.py FalconMLP.forward",
    "residual": "falcon_kit/model/layers.py FalconDecoderLayer.forward",
    "prediction": "falcon_kit/model/modeling.py FalconForCausalLM.forward",
    "sampling": "falcon_kit/generation/sampling.py Sampling.generate_arguments",
    "cache": "falcon_kit/model/layers.py FalconAttention.forward",
}


def function_at(place):
    """The file and the qualified name of the function that begins at "file, line number"."""
    name, line = re.fullmatch(r"(.+), line (\d+)", place).groups()
    root = {"falcon_kit": fk, "transformers": transformers}[name.partition("/")[0]]
    for outer in ast.parse((Path(root.__file__).parents[1] / name).read_text()).body:
        for each in [outer, *getattr(outer, "body", [])]:
            first = min([each.lineno, *(each.lineno for each in getattr(each, "decorator_list", []))])
            if isinstance(each, ast.FunctionDef) and first == int(line):
                return f"{name} {each.name if each is outer else f'{outer.name}.{each.name}'}"
    return place


def test_every_place_in_the_code_is_that_of_the_function_which_computes_the_stage(inspected, ids, found):
    places = parts.text_part(inspected, ids, found.logits)["code"]
    assert {stage: function_at(place) for stage, place in places.items()} == FUNCTIONS


def test_all_parts_are_json(inspected, ids, found):
    position = len(ids) - 1
    whole = [parts.text_part(inspected, ids, found.logits), parts.layer_part(found.layer, position)]
    assert json.loads(json.dumps([*whole, parts.head_part(found.layer, position, 0, None)], allow_nan=False))
