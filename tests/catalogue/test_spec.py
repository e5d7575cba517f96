"""FalconSpec: parameters and bytes compared with transformers, old configs, texts and tables."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from falcon_kit.catalogue.names import catalogue, spec
from falcon_kit.catalogue.spec import FalconSpec, config_from_legacy

ROOT = Path(__file__).parents[2]
HOSTILE = "</td><img src=x onerror=alert(1)>"

# As published under tiiuae/ in 2023, shortened to what describes the model.
OLD_40B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_size": 8192,
    "model_type": "RefinedWeb",
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
OLD_7B = {
    **{key: value for key, value in OLD_40B.items() if key != "n_head_kv"},
    "model_type": "RefinedWebModel",
    "hidden_size": 4544,
    "multi_query": True,
    "n_head": 71,
    "n_layer": 32,
}
OLD_RW_1B = {
    **OLD_7B,
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "multi_query": False,
    "n_head": 32,
    "n_layer": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}
# The same models' configs as they are published now.
NEW_40B = {
    "alibi": False,
    "bias": False,
    "hidden_size": 8192,
    "model_type": "falcon",
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "parallel_attn": True,
    "vocab_size": 65024,
}
NEW_7B = {
    **NEW_40B,
    "hidden_size": 4544,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
}
NEW_RW_1B = {
    **NEW_7B,
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_kv_heads": 32,
    "parallel_attn": False,
    "vocab_size": 50304,
}
SMALL = {
    "model_type": "falcon",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
}


def meta_model(config: dict[str, Any]) -> FalconForCausalLM:
    """The model that transformers builds from a config, without memory for its weights."""
    with torch.device("meta"):
        model = FalconForCausalLM(FalconConfig(**{key: value for key, value in config.items() if key != "model_type"}))
    model.tie_weights()
    return model


def built_parameters(config: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def small_configs() -> Iterator[dict[str, Any]]:
    yield {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}
    yield {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1}
    yield {**SMALL, "new_decoder_architecture": True, "bias": True}
    yield {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 200}
    yield {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False}
    yield {**SMALL, "multi_query": True}
    yield {**SMALL, "multi_query": True, "bias": True}
    yield {**SMALL, "multi_query": False}
    yield {**SMALL, "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False}
    yield {**SMALL, "multi_query": True, "parallel_attn": False}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("falcon-7b", 6_921_720_704),
        ("falcon-40b", 41_303_293_952),
        ("falcon-180B", 178_557_088_768),
        ("falcon-rw-1b", 1_311_625_216),
        ("falcon-rw-7b", 7_516_020_736),
    ],
)
def test_parameters_of_the_published_models_are_known(name: str, expected: int) -> None:
    assert expected == spec(name).parameters


@pytest.mark.parametrize("config", [NEW_7B, NEW_40B, NEW_RW_1B, *small_configs()])
def test_parameters_equal_those_of_the_model_that_transformers_builds(config: dict[str, Any]) -> None:
    assert built_parameters(config) == FalconSpec.from_config(config).parameters


@pytest.mark.parametrize("config", list(small_configs()))
def test_kv_heads_and_norms_equal_those_of_the_model_that_transformers_builds(config: dict[str, Any]) -> None:
    layer = meta_model(config).transformer.h[0]
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in layer.modules())

    shape = FalconSpec.from_config(config)

    assert (layer.self_attention.num_kv_heads, norms) == (shape.kv_heads, shape.norms_per_block)


@pytest.mark.parametrize(
    ("name", "config"), [("falcon-7b", NEW_7B), ("falcon-40b", NEW_40B), ("falcon-rw-1b", NEW_RW_1B)]
)
def test_the_catalogue_agrees_with_the_published_configs(name: str, config: dict[str, Any]) -> None:
    known = spec(name)
    facts = {"licence": known.licence, "published": True, "source": known.source}

    assert known == FalconSpec.from_config(config, name, **facts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("falcon-7b", 14_434_379_520), ("falcon-40b", 83_671_941_120), ("falcon-180B", 359_045_130_240)],
)
def test_stored_bytes_count_the_head_that_the_files_repeat(name: str, expected: int) -> None:
    assert expected == spec(name).stored_bytes


@pytest.mark.parametrize(("name", "expected"), [("falcon-40b", 122_880), ("falcon-7b", 8_192)])
def test_kv_bytes_per_token_count_only_the_kv_heads(name: str, expected: int) -> None:
    assert expected == spec(name).kv_bytes_per_token()


def test_kv_bytes_per_token_scale_with_the_bytes_of_a_value() -> None:
    assert 2 * spec("falcon-40b").kv_bytes_per_token(2) == spec("falcon-40b").kv_bytes_per_token(4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("falcon-40b", ("grouped", 16)), ("falcon-7b", ("multi-query", 71)), ("falcon-rw-1b", ("multi-head", 1))],
)
def test_the_layout_says_how_heads_share_keys_and_values(name: str, expected: tuple[str, int]) -> None:
    assert expected == (spec(name).layout, spec(name).queries_per_kv_head)


@pytest.mark.parametrize("name", [each.name for each in catalogue() if each.published])
def test_every_published_head_has_64_channels(name: str) -> None:
    assert spec(name).head_dim == 64


@pytest.mark.parametrize(
    ("old", "new"), [(OLD_7B, NEW_7B), (OLD_40B, NEW_40B), (OLD_RW_1B, NEW_RW_1B)], ids=["7b", "40b", "rw-1b"]
)
def test_an_old_config_becomes_the_one_published_now(old: dict[str, Any], new: dict[str, Any]) -> None:
    expected, converted = FalconConfig(**new), FalconConfig(**config_from_legacy(old))

    # num_kv_heads is not read unless new_decoder_architecture is set, and 7B's files disagree about it
    ignored = "num_kv_heads" if not expected.new_decoder_architecture else ""
    compared = [key for key in new if key not in ("model_type", ignored)]
    assert {key: getattr(expected, key) for key in compared} == {key: getattr(converted, key) for key in compared}


@pytest.mark.parametrize(("old", "new"), [(OLD_7B, NEW_7B), (OLD_40B, NEW_40B), (OLD_RW_1B, NEW_RW_1B)])
def test_an_old_config_describes_the_same_shape(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert FalconSpec.from_config(new) == FalconSpec.from_config(old)


def test_an_old_config_names_no_remote_code_any_more() -> None:
    converted = config_from_legacy(OLD_40B)

    assert ("falcon", ["FalconForCausalLM"]) == (converted["model_type"], converted["architectures"])
    assert "auto_map" not in converted


def test_an_old_config_keeps_its_dtype_under_the_new_key() -> None:
    assert FalconConfig(**config_from_legacy(OLD_40B)).dtype == torch.bfloat16


def test_an_old_config_without_switches_takes_the_old_defaults() -> None:
    bare = {key: value for key, value in OLD_7B.items() if key not in ("multi_query", "parallel_attn", "alibi", "bias")}

    shape = FalconSpec.from_config(bare)

    assert ("multi-head", False, "rotary") == (shape.layout, shape.parallel_block, shape.positions)


def test_an_old_config_without_an_end_token_gets_the_tokenizers() -> None:
    bare = {key: value for key, value in OLD_7B.items() if key != "eos_token_id"}

    assert FalconConfig(**config_from_legacy(bare)).eos_token_id == 11


def test_an_old_switch_that_transformers_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"apply_residual_connection_post_layernorm is true.*does not support"):
        config_from_legacy({**OLD_40B, "apply_residual_connection_post_layernorm": True})


def test_todays_config_is_not_mistaken_for_an_old_one() -> None:
    with pytest.raises(ValueError, match="'falcon', but an old config has RefinedWeb or RefinedWebModel"):
        config_from_legacy(NEW_40B)


def test_a_config_of_another_model_is_refused_by_its_type() -> None:
    with pytest.raises(ValueError, match=r"mine: model_type is 'llama', not a Falcon's: falcon, or the old RefinedWeb"):
        FalconSpec.from_config({**NEW_40B, "model_type": "llama"}, "mine")


@pytest.mark.parametrize("published", catalogue(), ids=lambda spec: spec.name)
def test_a_shape_written_as_a_config_reads_back_the_same(published: FalconSpec) -> None:
    facts = {name: getattr(published, name) for name in ("licence", "fine_tuned_from", "published", "source")}
    assert FalconSpec.from_config(published.to_config(), published.name, **facts) == published


def test_missing_keys_are_named() -> None:
    config = {key: value for key, value in NEW_40B.items() if key not in ("hidden_size", "vocab_size")}

    with pytest.raises(ValueError, match="mine: the config lacks hidden_size, vocab_size; required are hidden_size"):
        FalconSpec.from_config(config, "mine")


@pytest.mark.parametrize("value", [0, -1, "128", 1.5, True])
def test_a_number_that_cannot_be_one_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads is .*whole number, at least 1"):
        FalconSpec.from_config({**NEW_40B, "num_attention_heads": value})


JUNK = [
    None,
    True,
    False,
    0,
    -1,
    7,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "no",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
]
SCALED = [{"rope_type": "linear", "factor": each} for each in JUNK]
SCALED += [{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": each} for each in JUNK]


def refusal(config: dict[str, Any], name: str) -> str:
    """The text of the error for a config; empty where it is read."""
    try:
        FalconSpec.from_config(config, name)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("config", [OLD_40B, OLD_7B, OLD_RW_1B, NEW_40B, NEW_7B, NEW_RW_1B])
def test_a_config_with_a_value_of_another_kind_is_read_or_refused_by_its_name(config: dict[str, Any]) -> None:
    keys = {*OLD_40B, *NEW_40B, *SMALL, "rope_parameters", "rope_scaling", "quantization_config", "tie_word_embeddings"}
    refused = {refusal({**config, key: value}, "mine") for key in keys for value in [*JUNK, *SCALED]} - {""}

    assert len(refused) > 50
    assert [text for text in refused if not text.startswith("mine: ")] == []


SWITCHES = ["alibi", "bias", "parallel_attn", "new_decoder_architecture", "multi_query", "tie_word_embeddings"]


@pytest.mark.parametrize("key", SWITCHES)
def test_a_text_is_no_switch(key: str) -> None:
    with pytest.raises(ValueError, match=f"mine: {key} is 'false', but it must be true or false"):
        FalconSpec.from_config({**NEW_7B, key: "false"}, "mine")


@pytest.mark.parametrize("change", [{"hidden_size": 8200}, {"num_kv_heads": 7}])
def test_heads_that_do_not_split_evenly_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 128 query heads, and those of"):
        FalconSpec.from_config({**NEW_40B, **change})


def test_a_spec_is_short_as_text() -> None:
    expected = "FalconSpec('falcon-40b', 41,303,293,952 parameters, 60 layers, 128 query / 8 KV heads)"

    assert expected == repr(spec("falcon-40b"))


def test_names_are_escaped_in_tables() -> None:
    shown = FalconSpec.from_config(NEW_40B, HOSTILE, licence=HOSTILE)._repr_html_()

    assert "<img" not in shown
    assert "&lt;img" in shown
