"""Adapters loaded like models: added to their base's weights while these are read. PEFT's own merge is the oracle."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import FalconForCausalLM, LlamaConfig, LlamaForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.loading import adapters, adding
from tests.conftest import legacy, logits, small_model
from tests.loading.test_checkpoints import cached

TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def saved_adapter(base, directory, seed=1, **options):
    """An adapter with random matrices for the checkpoint in `base`, as PEFT saves it."""
    model = FalconForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False} | options
        )
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(directory)
    return directory


def merged_by_peft(base, *adapters):
    """Transformers' own Falcon with PEFT's own merge."""
    model = FalconForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """An adapter for a small model of each layout."""
    return saved_adapter(checkpoint, tmp_path / "wise")


@pytest.fixture
def of_40b(tokenizer, tmp_path):
    """An adapter for a small model of the 40B layout."""
    small_model("40b").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return saved_adapter(tmp_path / "base", tmp_path / "wise")


# The loaded model


def test_an_adapter_loads_as_its_base_with_the_adapter_merged(adapter, checkpoint):
    expected = logits(merged_by_peft(checkpoint, adapter))
    torch.testing.assert_close(logits(fk.load(adapter).model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(small_model_of(checkpoint)), atol=0.1)


def small_model_of(checkpoint):
    return FalconForCausalLM.from_pretrained(checkpoint).eval()


def test_an_adapter_is_added_to_pickled_weights_too(tokenizer, tmp_path):
    old = legacy(tmp_path / "old", "7b", tokenizer)
    small_model("7b").save_pretrained(tmp_path / "new")
    adapter = saved_adapter(tmp_path / "new", tmp_path / "wise")
    renamed(adapter, str(old))
    expected = logits(merged_by_peft(tmp_path / "new", adapter))
    torch.testing.assert_close(logits(fk.load(adapter, dtype="float32").model), expected, rtol=1e-4, atol=1e-4)


def renamed(adapter, base, **others):
    """Writes another base into an adapter's config."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base} | others))


def test_an_adapter_scaled_by_the_root_of_its_rank_is_added_as_such(of_40b, tmp_path):
    stable = saved_adapter(tmp_path / "base", tmp_path / "stable", use_rslora=True)
    expected = logits(merged_by_peft(tmp_path / "base", stable))
    torch.testing.assert_close(logits(fk.load(stable).model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_began_with_gaussian_numbers_is_plain_lora(of_40b, tmp_path):
    renamed(of_40b, str(tmp_path / "base"), init_lora_weights="gaussian")
    expected = logits(merged_by_peft(tmp_path / "base", of_40b))
    torch.testing.assert_close(logits(fk.load(of_40b).model), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_rounded_once_after_the_adapter_was_added(of_40b, tmp_path):
    expected = merged_by_peft(tmp_path / "base", of_40b).bfloat16().state_dict()
    loaded = fk.load(of_40b, dtype="bfloat16").model.state_dict()
    differing = [name for name, value in loaded.items() if not torch.equal(value, expected[name])]
    assert differing == [] or max((loaded[n] != expected[n]).float().mean() for n in differing) < 0.002


def test_weights_are_quantised_after_the_adapter_was_added(of_40b, tmp_path):
    fk.merge(of_40b, fk.load(tmp_path / "base"), output_dir=tmp_path / "merged")
    assert torch.equal(
        logits(fk.load(of_40b, dtype="nf4").model), logits(fk.load(tmp_path / "merged", dtype="nf4").model)
    )


def test_an_adapter_of_an_adapter_is_added_to_both(of_40b, tmp_path):
    second = saved_adapter(tmp_path / "base", tmp_path / "wiser", seed=2)
    renamed(second, str(of_40b))
    expected = logits(merged_by_peft(tmp_path / "base", of_40b, second))
    torch.testing.assert_close(logits(fk.load(second).model), expected, rtol=1e-4, atol=1e-4)


def test_loading_and_merging_give_the_same(of_40b):
    torch.testing.assert_close(logits(fk.load(of_40b).model), logits(fk.merge(of_40b).model), rtol=1e-4, atol=1e-4)


def test_an_adapter_has_the_generation_config_of_its_base_loaded_or_merged(of_40b, tmp_path):
    settings = {"eos_token_id": [11, 900], "pad_token_id": 12, "top_p": 0.5, "max_new_tokens": 3}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    for falcon in (fk.load(of_40b), fk.merge(of_40b)):
        assert falcon.generation_settings == {"top_p": 0.5, "max_new_tokens": 3}
        assert (falcon.model.generation_config.eos_token_id, falcon.model.generation_config.pad_token_id) == (
            [11, 900],
            12,
        )


def test_falconet_instruct_is_an_adapter_of_falconet(instruct):
    shipped = embedded_directory("falconet-instruct")
    assert (adapters.Adapter(shipped).base_name, list(shipped.glob("model*.safetensors"))) == ("falconet", [])
    torch.testing.assert_close(
        logits(instruct.model), logits(merged_by_peft(embedded_directory("falconet"), shipped)), rtol=1e-3, atol=1e-3
    )


# Its name


def test_an_adapter_has_the_spec_of_its_base_under_its_own_name(adapter, checkpoint):
    spec = fk.spec(adapter)
    assert (spec.name, spec.fine_tuned_from) == ("wise", "checkpoint")
    assert (spec.layout, spec.parameters) == (fk.spec(checkpoint).layout, fk.spec(checkpoint).parameters)


def test_an_adapter_in_the_folder_of_its_run_is_called_by_the_run(of_40b, tmp_path):
    shutil.copytree(of_40b, tmp_path / "persona" / "adapter")
    assert fk.load(tmp_path / "persona" / "adapter").spec.name == "persona"


def test_the_embedded_adapter_keeps_its_name_however_it_is_loaded():
    shipped = embedded_directory("falconet-instruct")
    assert [each.spec.name for each in (fk.load(shipped), fk.merge(shipped))] == ["falconet-instruct"] * 2


def test_an_adapter_is_planned_for_like_its_base(of_40b, tmp_path):
    planned, base = (fk.plan(str(each), devices="T4") for each in (of_40b, tmp_path / "base"))
    assert (planned.spec.name, planned.total_bytes) == ("wise", base.total_bytes)


def test_an_adapter_answers_in_the_chat_format_it_was_trained_in(of_40b):
    (of_40b / adapters.RECORD).write_text('{"chat_format": "baize"}')
    assert fk.load(of_40b).chat_format.name == "baize"
    assert fk.load(of_40b, chat="falcon").chat_format.name == "falcon"


def test_an_adapter_of_a_published_base_keeps_the_chat_format_of_the_hub(of_40b, tokenizer, tmp_path):
    plain = fk.load("falconet").tokenizer
    plain.chat_template = None
    small_model("40b").save_pretrained(tmp_path / "published")
    plain.save_pretrained(tmp_path / "published")
    cached(tmp_path, "tiiuae/falcon-40b", tmp_path / "published")
    renamed(of_40b, "tiiuae/falcon-40b")
    loaded = fk.load(of_40b, cache_dir=tmp_path, local_files_only=True, force=True, device_map="cpu")
    assert (loaded.chat_format.name, loaded.spec.hub_id) == ("hub", None)


def test_an_adapter_on_the_hub_brings_its_base(of_40b, tmp_path):
    cached(tmp_path, "somebody/falcon-lora", of_40b)
    cached(tmp_path, "somebody/my-falcon", tmp_path / "base")
    renamed(tmp_path / "models--somebody--falcon-lora" / "snapshots" / ("0" * 40), "somebody/my-falcon")
    loaded = fk.load("somebody/falcon-lora", cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(logits(loaded.model), logits(fk.load(of_40b).model))
    assert loaded.spec.name == "somebody/falcon-lora"


def test_an_adapter_is_added_to_the_revision_that_it_was_made_for(of_40b, tokenizer, tmp_path):
    small_model("7b").save_pretrained(tmp_path / "newer")
    tokenizer.save_pretrained(tmp_path / "newer")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "newer")
    cached(tmp_path, "somebody/my-falcon", tmp_path / "base", "v2", "2" * 40)
    expected = logits(fk.load(of_40b).model)
    renamed(of_40b, "somebody/my-falcon", revision="v2")
    loaded = fk.load(of_40b, cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(logits(loaded.model), expected)


# Its tokenizer


@pytest.fixture
def of_its_own(tokenizer):
    """A tokenizer with another chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}[assistant]"
    return own


def test_an_adapter_may_bring_a_tokenizer_with_a_chat_template(of_40b, of_its_own):
    of_its_own.add_special_tokens({"additional_special_tokens": [">>QUESTION<<"]})
    of_its_own.save_pretrained(of_40b)
    for falcon in (fk.load(of_40b), fk.merge(of_40b)):
        assert falcon.tokenizer.chat_template == of_its_own.chat_template
        assert (falcon.chat_format.name, falcon.tokenizer.extra_special_tokens) == ("own", [">>QUESTION<<"])
    assert fk.load(of_40b, chat="baize").chat_format.name == "baize"


def test_a_tokenizer_with_more_tokens_than_the_model_is_not_used(of_40b, of_its_own):
    of_its_own.add_special_tokens({"pad_token": "[PAD]"})
    of_its_own.save_pretrained(of_40b)
    with pytest.warns(UserWarning, match=r"wise has 2049 tokens, and the model 2048: that of base is used") as caught:
        falcon = fk.load(of_40b)
    assert __file__ in [each.filename for each in caught]
    assert (len(falcon.tokenizer), falcon.tokenizer.chat_template) == (2048, of_its_own.chat_template)


# The digests of merged adapters


def test_a_model_with_an_adapter_in_it_is_told_from_its_base(of_40b, tmp_path):
    trained = {"base_fingerprint": adapters.model_fingerprint(fk.load(tmp_path / "base").model.transformer)}
    (of_40b / adapters.RECORD).write_text(json.dumps(trained))
    loaded = fk.load(of_40b)
    with pytest.raises(ValueError, match=r"was made for .*, which has other weights"):
        fk.merge(of_40b, loaded)


def test_control_characters_in_the_name_of_a_base_are_written_out(of_40b, tmp_path):
    (of_40b / adapters.RECORD).write_text(json.dumps({"base_fingerprint": "another"}))
    renamed(of_40b, "\x1b[2Jbase")
    with pytest.raises(ValueError, match=r"was made for \\x1b\[2Jbase, not for"):
        fk.merge(of_40b, fk.load(tmp_path / "base"))


def test_a_saved_model_still_knows_what_was_merged_into_it(of_40b, tmp_path):
    loaded = fk.load(of_40b)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = fk.load(tmp_path / "saved")
    assert adapters.model_fingerprint(again.model.transformer) == adapters.model_fingerprint(loaded.model.transformer)
    assert again.model.config.merged_adapters == [adapters.digest(of_40b)]


# Refused before anything is loaded


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"dense": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused_with_the_way_out(of_40b, tmp_path, options, named):
    other = saved_adapter(tmp_path / "base", tmp_path / "other", **options)
    with pytest.raises(ValueError, match=rf"more than plain LoRA \({named}\): fk\.merge\(adapter, base\)"):
        fk.load(other)


def test_an_adapter_of_another_shape_is_refused(of_40b, tokenizer, tmp_path):
    small_model("7b").save_pretrained(tmp_path / "7b")
    tokenizer.save_pretrained(tmp_path / "7b")
    renamed(of_40b, str(tmp_path / "7b"))
    with pytest.raises(
        ValueError, match=r"was made for .*7b, not for 7b: its base_model\S+ is \(\d+, \d+\), but the mod"
    ):
        fk.load(of_40b)


@pytest.mark.parametrize("base", ["falconet", None])
def test_an_adapter_of_another_architecture_is_refused_whatever_base_it_names(base, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))
    get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    renamed(tmp_path, base)
    message = r"was made for another model than falconet: its \S+q_proj.lora_A.weight is \(4, 64\), but the model"
    with pytest.raises(ValueError, match=message):
        fk.merge(tmp_path, "falconet")


def test_an_adapter_without_its_weights_says_so(of_40b):
    (of_40b / adapters.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors: the adapter was not saved compl"):
        fk.load(of_40b)


def test_an_adapter_that_was_cut_off_is_refused(of_40b):
    file = of_40b / adapters.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is cut off or damaged"):
        fk.load(of_40b)


def test_a_pickled_adapter_of_which_only_the_pointer_was_cloned_is_damaged(of_40b, tmp_path):
    (of_40b / adapters.WEIGHTS).unlink()
    (of_40b / adapters.PICKLED_WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 33591\n")
    for read in (fk.load, lambda adapter: fk.merge(adapter, tmp_path / "base")):
        with pytest.raises(ValueError, match=r"adapter_model\.bin is cut off or damaged .* fetch it again"):
            read(of_40b)


def test_an_adapter_that_does_not_name_its_base_says_so(of_40b):
    renamed(of_40b, None)
    with pytest.raises(
        ValueError, match=r"does not name the adapter's base model: pass it, fk\.merge\(adapter, base\)"
    ):
        fk.load(of_40b)


def test_an_adapter_is_not_added_to_quantised_weights(of_40b, tmp_path):
    quantised = fk.load(tmp_path / "base", dtype="nf4")
    quantised.model.save_pretrained(tmp_path / "nf4")
    quantised.tokenizer.save_pretrained(tmp_path / "nf4")
    renamed(of_40b, str(tmp_path / "nf4"))
    with pytest.raises(
        ValueError, match="whose weights are stored in nf4: added to these, it would be lost in rounding"
    ):
        fk.load(of_40b)


def test_weights_are_not_read_before_they_are_asked_for(of_40b, tmp_path):
    from contextlib import ExitStack

    with ExitStack() as open_files:
        files = sorted((tmp_path / "base").glob("*.safetensors"))
        weights = adding.with_adapters(adding.lazy_state_dict(files, open_files), [of_40b], "base", None)
        unread = [name for name, weight in weights.items() if isinstance(weight, torch.Tensor)]
        layer = "transformer.h.1.mlp.dense_h_to_4h"
        sides = load_file(of_40b / adapters.WEIGHTS)
        up, down = (sides[f"base_model.model.{layer}.lora_{side}.weight"] for side in "BA")
        expected = load_file(files[0])[f"{layer}.weight"] + 6 / 4 * up @ down
        assert unread == []
        torch.testing.assert_close(weights[f"{layer}.weight"][...], expected)
