"""A static cache: decoding reads the slots that are filled, in a number of graphs that does not grow with the text."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.torch_version import TorchVersion
from transformers import CompileConfig, StaticCache

from falcon_kit.model import attention
from falcon_kit.model.attention import masked_products
from falcon_kit.model.static_cache import slots_read
from tests.model.conftest import IDS, greedy, pair

MASK = torch.ones_like(IDS)
MASK[0, :9] = MASK[1, :1] = 0
"""The rows of IDS, of which two are padded on the left."""


@pytest.fixture
def small_steps(monkeypatch):
    """A text of 24 tokens and 50 new ones crosses several lengths that are read."""
    monkeypatch.setattr("falcon_kit.model.static_cache.FEWEST_SLOTS", 16)


@pytest.fixture
def lengths(monkeypatch):
    """How many keys each call of torch's fused attention reads."""
    seen = []

    def watched(query, key, value, **kwargs):
        seen.append(key.shape[2])
        return scaled_dot_product_attention(query, key, value, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize(("length", "expected"), [(1, 256), (256, 256), (257, 512), (1025, 1500), (1500, 1500)])
def test_a_power_of_two_of_the_slots_is_read(length, expected):
    assert slots_read(length, 1500) == expected


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_step_of_any_length_gives_the_tokens_of_a_dynamic_cache(layout, backend, small_steps):
    kit = pair(layout)[1]
    kit.set_attn_implementation(backend)
    try:
        for given in (MASK, torch.ones_like(IDS)):
            expected = greedy(kit, IDS, 50, attention_mask=given)
            assert torch.equal(greedy(kit, IDS, 50, attention_mask=given, cache_implementation="static"), expected)
    finally:
        kit.set_attn_implementation("sdpa")


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(IDS)], ids=["padded", "not padded"])
def test_a_step_reads_at_most_twice_the_keys_there_are(layout, mask, small_steps, lengths):
    cache = StaticCache(pair(layout)[1].config, max_cache_len=100)
    greedy(pair(layout)[1], IDS, 50, attention_mask=mask, past_key_values=cache)
    steps = lengths[:: len(cache.layers)]
    if not mask.all():
        assert steps[0] == 32  # of the prompt
    assert steps[1:] == [32] * 8 + [64] * 32 + [100] * 9  # of the 25th to the 73rd token


def test_a_prompt_in_a_static_cache_is_continued_with_the_rest_of_it(layout, small_steps):
    kit = pair(layout)[1]
    past = StaticCache(kit.config, max_cache_len=100)
    with torch.no_grad():
        kit(IDS[:, :20], past_key_values=past)
    assert torch.equal(greedy(kit, IDS, 20, past_key_values=past), greedy(kit, IDS, 20))


def test_a_masked_step_as_products_gives_the_same_tokens(layout, small_steps, monkeypatch):
    """As on a GPU in 16 bits."""
    kit = pair(layout)[1]
    expected = greedy(kit, IDS, 50, attention_mask=MASK)
    taken = []
    monkeypatch.setattr("falcon_kit.model.attention._takes_products", lambda query: taken.append(1) or True)
    for kind in ("static", "dynamic"):
        assert torch.equal(greedy(kit, IDS, 50, attention_mask=MASK, cache_implementation=kind), expected)
    assert len(taken) == 2 * 2 * 49  # caches x layers x steps


@pytest.mark.parametrize("kind", ["masked", "biased"])
def test_products_in_bfloat16_differ_from_float64_by_less_than_one_rounding(kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (3 * torch.randn(2, 4, size, 64, generator=generator).bfloat16() for size in (16, 50, 50))
    mask = torch.rand(2, 1, 1, 50, generator=generator) > 0.2
    if kind == "biased":
        mask = torch.where(mask, -torch.arange(50.0), torch.finfo(torch.bfloat16).min).bfloat16()
    exact_mask = mask if kind == "masked" else mask.double()
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=exact_mask)
    found = masked_products(query, key, value, mask, 1 / 8)
    assert (found.double() - exact).norm() / exact.norm() < 2**-8


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [("cuda", torch.bfloat16, True), ("cuda", torch.float32, False), ("cpu", torch.bfloat16, False)],
)
def test_products_are_for_16_bits_on_cuda_without_gradients(kind, dtype, expected):
    query = SimpleNamespace(device=torch.device(kind), dtype=dtype, shape=(1, 8, 16, 64))
    with torch.no_grad():
        assert attention._takes_products(query) == expected
    assert not attention._takes_products(query)


@pytest.mark.parametrize(("rows", "groups", "expected"), [(31, 1, True), (32, 1, False), (3, 8, True), (4, 8, False)])
def test_products_are_for_a_few_groups(rows, groups, expected):
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(rows, groups, 16, 64))
    with torch.no_grad():
        assert attention._takes_products(query) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.6.0", False),
        ("2.7.1+cu118", False),
        ("2.8.0", True),
        ("2.9.0+cu128", False),
        ("2.9.1", True),
        ("2.10", True),
    ],
)
def test_products_are_for_versions_of_torch_that_have_and_compile_them(version, expected, monkeypatch):
    """pytorch#150812 and pytorch#165892."""
    monkeypatch.setattr(attention, "_HAS_PRODUCTS", attention.has_products(TorchVersion(version)))
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 1, 71, 64))
    with torch.no_grad():
        assert attention._takes_products(query) == expected


@pytest.mark.parametrize("layout", ["7b", "40b", "rw"])
def test_a_compiled_step_of_any_length_is_one_graph(layout, small_steps):
    kit = pair(layout)[1]
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cache = StaticCache(kit.config, max_cache_len=129)
    tokens = greedy(kit, IDS, 50, attention_mask=MASK, past_key_values=cache, compile_config=options)
    assert torch.equal(tokens, greedy(kit, IDS, 50, attention_mask=MASK))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "for 32, 64 and 128 of 129 slots"
