"""Each field of a checkpoint that transformers honours changes the kit's outcome as it changes transformers' own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import FalconForCausalLM, GenerationConfig

import falcon_kit as fk
from tests.conftest import logits, small_model
from tests.generation.test_generate import CHAT, QUESTION
from tests.loading.test_adapters import saved_adapter

# generation_config.json

GENERATION = {
    "nothing": {},
    "do_sample": {"do_sample": True},
    "greedy by name": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.3},
    "temperature without do_sample": {"temperature": 0.3},
    "top_p": {"do_sample": True, "top_p": 0.01},
    "top_p without do_sample": {"top_p": 0.01},
    "top_k": {"do_sample": True, "top_k": 2},
    "top_k off": {"do_sample": True, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.4},
    "typical_p": {"do_sample": True, "typical_p": 0.2},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.2},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.5},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[2], [1, 3]]},
    "suppress_tokens": {"suppress_tokens": list(range(300, 2000))},
    "sequence_bias": {"sequence_bias": [[[900], 50.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 900},
    "max_new_tokens": {"max_new_tokens": 3},
    "max_length": {"max_length": 30},
    "both lengths": {"max_length": 25, "max_new_tokens": 3},
    "min_new_tokens": {"min_new_tokens": 20, "max_new_tokens": 25},
    "eos_token_id": {"eos_token_id": [*range(300, 900)]},
    "stop_strings": {"stop_strings": ["e", "i"]},
    "num_beams": {"num_beams": 3},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 2},
}
CALLS = [
    {},
    {"temperature": 1.5},
    {"temperature": 0},
    {"top_k": 5},
    {"top_p": 0.9},
    {"do_sample": True},
    {"do_sample": False},
    {"max_new_tokens": 5, "temperature": 1.2, "top_k": 10, "top_p": 0.5},
    {"max_length": 22},
]
SHAPING = ("temperature", "top_k", "top_p")


def by_transformers(falcon, call):
    """The tokens of `model.generate`, in the kit's terms.

    Settings of sampling turn it on, an unset top_k is off, and a length that the caller names is the only limit.
    """
    config, chosen = falcon.model.generation_config, {name for name in SHAPING if name in call}
    samples = call.get("do_sample", call.get("temperature") != 0 if chosen else bool(config.do_sample))
    arguments = call | {"do_sample": samples, "tokenizer": falcon.tokenizer}
    if config.top_k is None and "top_k" not in call and samples:
        arguments["top_k"] = 0
    if not (config.max_new_tokens or config.max_length or "max_new_tokens" in call or "max_length" in call):
        arguments["max_new_tokens"] = 200
    if "max_length" in call:
        config.max_new_tokens = None
    arguments = {name: value for name, value in arguments.items() if samples or name not in SHAPING}
    inputs = falcon.tokenizer(QUESTION, return_tensors="pt")
    torch.manual_seed(3)
    rows = falcon.model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :].tolist()
    return [until_the_end(row, config.eos_token_id) for row in rows]


def until_the_end(row, ends):
    """A row without what transformers pads it with."""
    ends = [ends] if isinstance(ends, int) else ends
    return row[: next((number for number, token in enumerate(row, 1) if token in ends), len(row))]


@pytest.fixture(scope="module")
def falcon():
    return fk.load("falconet-instruct")


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("fields", GENERATION.values(), ids=GENERATION)
def test_a_generation_config_gives_the_tokens_that_it_gives_in_transformers(falcon, fields, call):
    short = {} if not fields or "max_length" in fields else {"max_new_tokens": 12}
    base = {"eos_token_id": 11, "pad_token_id": 12} | short
    falcon.model.generation_config = GenerationConfig(**base | fields)
    try:
        expected = by_transformers(falcon, call)
    except ValueError:  # several sequences without sampling
        with pytest.raises(ValueError, match="without sampling would give"):
            falcon.generate(QUESTION, **call)
        return
    falcon.model.generation_config = GenerationConfig(**base | fields)
    generated = falcon.generate(QUESTION, seed=3, **call)
    generated = generated if isinstance(generated, list) else [generated]
    assert [list(each.tokens) for each in generated] == expected


@pytest.mark.parametrize("fields", GENERATION.values(), ids=GENERATION)
def test_the_settings_of_a_checkpoint_are_visible(falcon, fields):
    falcon.model.generation_config = GenerationConfig(**fields)
    expected = {name: value for name, value in fields.items() if name != "eos_token_id"}
    assert falcon.generation_settings == expected
    page = falcon._repr_html_()
    assert [name for name in expected if name not in page] == []


def test_a_chat_is_one_answer_whatever_the_checkpoint_names(falcon):
    falcon.model.generation_config = GenerationConfig(do_sample=True, num_return_sequences=3, eos_token_id=11)
    assert falcon.chat(CHAT, max_new_tokens=2).tokens
    assert len(list(falcon.stream(QUESTION, max_new_tokens=2))) == 2


@pytest.mark.parametrize("method", ["chat", "generate", "stream"])
def test_no_stop_string_may_be_written_as_none(falcon, method):
    falcon.model.generation_config = GenerationConfig(eos_token_id=11)
    assert getattr(falcon, method)(CHAT if method == "chat" else QUESTION, stop=None, max_new_tokens=2)


def test_a_generation_config_is_read_from_the_checkpoint(tokenizer, tmp_path):
    loaded = fk.load(saved(tokenizer, tmp_path, {"eos_token_id": [11, 900], "top_p": 0.5, "max_new_tokens": 3}))
    assert loaded.generation_settings == {"top_p": 0.5, "max_new_tokens": 3}
    assert (loaded.model.generation_config.eos_token_id, len(loaded.generate("Hello").tokens)) == ([11, 900], 3)


@pytest.mark.parametrize("fields", GENERATION.values(), ids=GENERATION)
def test_a_generation_config_is_saved_as_it_was_read(tokenizer, tmp_path, fields):
    base = saved(tokenizer, tmp_path / "base", {"eos_token_id": 11} | fields)
    fk.load(base).model.save_pretrained(tmp_path / "again")
    expected = {"eos_token_id": 11, "bos_token_id": 11, "pad_token_id": 12} | fields
    assert stored(tmp_path / "again") == expected


def test_a_merged_model_is_saved_with_the_generation_config_of_its_base(tokenizer, tmp_path):
    base = saved(tokenizer, tmp_path / "base", {"eos_token_id": 11, "top_p": 0.01})
    adapter = saved_adapter(base, tmp_path / "adapter")
    expected = {"eos_token_id": 11, "bos_token_id": 11, "pad_token_id": 12, "top_p": 0.01}
    fk.merge(adapter, base, output_dir=tmp_path / "merged")
    fk.load(adapter).model.save_pretrained(tmp_path / "loaded")
    assert [stored(tmp_path / "merged"), stored(tmp_path / "loaded")] == [expected, expected]


def test_settings_of_generation_in_the_config_of_a_model_are_saved_as_they_were_read(tokenizer, tmp_path):
    base = saved(tokenizer, tmp_path / "base", {})
    (base / "generation_config.json").unlink()
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_p": 0.01}))
    fk.load(base).model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again")["top_p"] == 0.01


def test_a_setting_of_the_user_that_does_nothing_is_still_refused_when_it_is_saved(tokenizer, tmp_path):
    falcon = fk.load(saved(tokenizer, tmp_path / "base", {"top_p": 0.01}))
    falcon.model.generation_config.temperature = 0.3
    with pytest.raises(ValueError, match="`temperature`: `do_sample` is not set"):
        falcon.model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "value"), [("eos_token_id", "x"), ("eos_token_id", [11, None]), ("bos_token_id", 0.5)]
)
def test_a_special_token_that_is_no_token_is_refused_by_file_and_name(tokenizer, tmp_path, name, value):
    base = saved(tokenizer, tmp_path, {name: value})
    with pytest.raises(ValueError, match=rf"generation_config.json cannot be used .*its {name} is .*not the number"):
        fk.load(base)


def saved(tokenizer, directory, generation):
    """A checkpoint with this generation_config.json."""
    small_model("40b").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def stored(directory):
    """The content of a generation_config.json."""
    content = json.loads((directory / "generation_config.json").read_text())
    return {name: value for name, value in content.items() if name != "transformers_version"}


# config.json

CONFIG = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    {"layer_norm_epsilon": 3.0},
    {"activation": "relu"},
    {"alibi": True},
    {"num_hidden_layers": 1},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("fields", CONFIG, ids=str)
def test_a_field_of_the_config_changes_the_logits_as_in_transformers(tokenizer, tmp_path, fields):
    small_model("40b").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    expected, info = FalconForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    if info["missing_keys"]:
        with pytest.raises(ValueError, match=r"lacks .* weights that its config.json asks for"):
            fk.load(tmp_path)
        return
    torch.testing.assert_close(logits(fk.load(tmp_path).model), logits(expected), atol=1e-5, rtol=0)


# The weights

MLP = "transformer.h.0.mlp.dense_4h_to_h"
NO_PLACE = r"has [1-9]\d* weights that its config\.json has no place for, such as "
OF_ANOTHER_MODEL = {
    "biases": ("rw", {"bias": False}, {}, NO_PLACE + r"transformer\.h\.\d\.\S*bias: "),
    "a scale": ("40b", {}, {f"{MLP}.weight_scale": torch.ones(1)}, NO_PLACE + rf"{MLP}\.weight_scale: "),
    "a bias of the head": ("7b", {}, {"lm_head.bias": torch.ones(2048)}, NO_PLACE + r"lm_head\.bias: "),
    "LoRA": (
        "40b",
        {},
        {f"{MLP.removeprefix('transformer.')}.lora_A.weight": torch.ones(2, 2)},
        NO_PLACE + r"(transformer\.)?h\.0",
    ),
    "rows": (
        "7b",
        {"vocab_size": 2000},
        {},
        r"has \d+ weights of another shape .*, such as \S*word_embeddings\.weight: \(2048, 256\), not \(2000, 256\): ",
    ),
}


@pytest.mark.parametrize("adapter", [False, True], ids=["alone", "with an adapter"])
@pytest.mark.parametrize("case", OF_ANOTHER_MODEL.values(), ids=OF_ANOTHER_MODEL)
def test_weights_of_another_model_are_neither_left_out_in_silence_nor_blamed_on_a_report(
    case, adapter, tokenizer, tmp_path
):
    layout, fields, added, error = case
    base = tmp_path / "base"
    small_model(layout).save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = saved_adapter(base, tmp_path / "adapter", target_modules=["dense_h_to_4h"]) if adapter else base
    save_file(load_file(base / "model.safetensors") | added, base / "model.safetensors", {"format": "pt"})
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=f"{error if not adapter else '(?:' + error + '|was made for)'}"):
        fk.load(folder)


def test_a_head_of_its_own_is_kept_where_the_config_ties_it(tokenizer, tmp_path):
    base, file = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    small_model("40b").save_pretrained(base)
    tokenizer.save_pretrained(base)
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": -weights["transformer.word_embeddings.weight"]}, file, {"format": "pt"})
    falcon = fk.load(base)
    expected = logits(falcon.model)
    torch.testing.assert_close(expected, -logits(small_model("40b")))
    assert (falcon.spec.tied_head, falcon.spec.parameters) == (False, sum(map(torch.numel, falcon.model.parameters())))
    assert torch.equal(logits(fk.load(fk.export_gguf(falcon, tmp_path / "a.gguf", "f32")).model), expected)
    for change in (falcon.model.tie_weights, lambda: falcon.model.resize_token_embeddings(2050)):
        change()
        assert torch.equal(logits(falcon.model)[..., :2048], expected)


def test_what_is_no_part_of_the_layers_and_the_constants_of_old_checkpoints_change_nothing(checkpoint):
    expected, file = logits(fk.load(checkpoint).model), checkpoint / "model.safetensors"
    constants = [f"transformer.h.0.self_attention.{name}" for name in ("rotary.inv_freq", "masked_bias", "bias")]
    added = {name: torch.ones(1) for name in (*constants, "v_head.summary.weight")}
    save_file(load_file(file) | added, file, {"format": "pt"})
    assert torch.equal(logits(fk.load(checkpoint).model), expected)


# The tokenizer


def test_a_token_that_the_tokenizer_puts_before_each_text_is_part_of_the_prompt(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = fk.load(tmp_path)
    processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 11)])
    loaded.tokenizer.backend_tokenizer.post_processor = processor
    loaded.tokenizer.save_pretrained(tmp_path)
    expected = loaded.tokenizer("Hello")["input_ids"]
    assert expected[0] == 11
    assert fk.load(tmp_path).generate("Hello", max_new_tokens=1).stats.prompt_tokens == len(expected)
