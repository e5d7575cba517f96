"""llama.cpp reads what `export_gguf` writes, and makes the same of it as the kit."""

import ctypes
import gc
import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

import falcon_kit as fk
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.generation.chat import plain_template, render
from falcon_kit.generation.control_tokens import encode_text
from falcon_kit.serving import ggml
from falcon_kit.serving import gguf as export
from falcon_kit.serving.gguf import export_gguf, write_gguf
from falcon_kit.serving.gguf_kinds import FILE_TYPES, planned_tensors
from tests.conftest import LAYOUTS, logits, small_model
from tests.serving.servers import llama_cpp

TEXTS = [
    fk.CARD.prompt,
    "Hello, Daniel!\nWhat's 1234567 + 89? It's 2048 tokens.",
    "  two  spaces,\ttabs\n\n\nand lines   ",
    "Zürich, naïve façade, 北京, Москва, 🦒🦒, ½ ² ③ — “quotes” … don't, DON'T, we've",
    "def f(x):\n    return x ** 2  # <|endoftext|> and >>QUESTION<< stay text",
    "٣٤٥ १२३ ４５６ 12 1 123 1234 a1b22c333",
]


@pytest.fixture(scope="module")
def exported(instruct, tmp_path_factory):
    return export_gguf(instruct, tmp_path_factory.mktemp("gguf") / "falconet-instruct.gguf")


@pytest.fixture(scope="module")
def server(exported):
    server, address = llama_cpp(exported)
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
    del server


def post(client, path, **body):
    return client.post(path, json=body).raise_for_status().json()


def spec_of(model, name="small"):
    return FalconSpec.from_config(model.config.to_dict(), name)


# What llama.cpp makes of it


@pytest.mark.parametrize("prompt", [fk.CARD.prompt, "Animals of Africa:", "User: Tell me about owls.\nFalcon:"])
def test_llama_cpp_writes_the_same_greedy_tokens(instruct, server, prompt):
    answer = post(server, "/v1/completions", prompt=prompt, max_tokens=60, temperature=0, logprobs=1)
    tokens = [each["id"] for each in answer["choices"][0]["logprobs"]["content"]]
    assert tuple(tokens) == instruct.generate(prompt, max_new_tokens=60).tokens[: len(tokens)]
    assert len(tokens) >= 5


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_cuts_a_text_into_the_same_tokens(instruct, server, text):
    assert post(server, "/tokenize", content=text, parse_special=False)["tokens"] == encode_text(
        text, instruct.tokenizer
    )


@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cn", "Co"], exclude_characters="\0"), max_size=40)
)
@settings(max_examples=200)
def test_llama_cpp_cuts_any_text_into_the_same_tokens(instruct, server, text):
    assert post(server, "/tokenize", content=text, parse_special=False)["tokens"] == encode_text(
        text, instruct.tokenizer
    )


def test_special_tokens_are_special_in_the_file_too(instruct, server):
    ids = post(server, "/tokenize", content="<|endoftext|>", parse_special=True)["tokens"]
    assert ids == [instruct.tokenizer.eos_token_id]


def test_the_chat_template_goes_along(instruct, server):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    assert post(server, "/apply-template", messages=messages)["prompt"] == render(messages, instruct.chat_format)


def test_the_chat_template_in_the_file_is_plain_jinja(instruct, tmp_path):
    fields = gguf.GGUFReader(export_gguf(instruct, tmp_path / "a.gguf")).fields
    assert fields["tokenizer.chat_template"].contents() == plain_template(instruct.chat_format.template)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"rw"}))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_every_layout_and_dtype_gives_the_models_log_probabilities(layout, dtype, instruct, tmp_path):
    model, ids = small_model(layout), [23, 900, 77, 1500, 42]
    path = write_gguf(model, spec_of(model), tmp_path / "small.gguf", dtype, instruct.tokenizer)
    server, address = llama_cpp(path)
    answer = httpx.post(
        f"{address}/v1/completions", json={"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    )
    top = answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    differences = [abs(each["logprob"] - expected[each["id"]].item()) for each in top]
    assert max(differences) < {"float32": 0.02, "bfloat16": 0.1, "q8_0": 0.3}[dtype]
    del server
    gc.collect()


@pytest.mark.parametrize(
    ("layout", "kind"), [*(("7b", kind) for kind in FILE_TYPES), ("40b", "q6_k"), ("40b", "q4_k_m"), ("40b", "q2_k")]
)
def test_a_quantised_file_gives_llama_cpp_and_the_kit_the_same_log_probabilities(kind, layout, instruct, tmp_path):
    sizes = {"hidden_size": 192, "num_attention_heads": 3} if layout == "7b" else {}  # no multiple of 256, as the 7B's
    model, ids = small_model(layout, **sizes), [23, 900, 77, 1500, 42]
    path = write_gguf(model, spec_of(model), tmp_path / "small.gguf", kind, instruct.tokenizer)
    top = top_log_probabilities(path, ids)
    loaded = gap(fk.load(path, dtype="float32").model, ids, top)
    assert loaded < 0.1  # llama.cpp rounds what it multiplies quantised weights with to 8 bits
    if kind[:2] in ("q2", "q3", "q4", "q5"):
        assert loaded < gap(model, ids, top) / 2


def top_log_probabilities(path, ids):
    """llama.cpp's 20 most probable tokens after a text, with their log-probabilities."""
    server, address = llama_cpp(path)
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
    del server
    gc.collect()
    return answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


def gap(model, ids, top):
    """The largest difference of a model's log-probabilities from llama.cpp's."""
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return max(abs(each["logprob"] - expected[each["id"]].item()) for each in top)


def test_llama_cpp_answers_from_a_file_in_4_bits(instruct, tmp_path):
    server, address = llama_cpp(export_gguf(instruct, tmp_path / "a.gguf", "Q4_K_M"))
    messages = [{"role": "user", "content": "What do owls eat?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 20}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"][
        "content"
    ]
    assert answer.strip() == instruct.chat(messages).text
    del server
    gc.collect()


# Kinds


CODES = {"F16": "h", "Q8_0": "8", "Q6_K": "6", "Q5_K": "5", "Q4_K": "4", "Q3_K": "3", "Q2_K": "2"}
CODES |= {"Q4_0": "a", "Q5_0": "b", "Q5_1": "c"}
CHOSEN = json.loads(Path(__file__).with_name("llama_quantize.json").read_text())
"""What llama_model_quantize of llama-cpp-python 0.3.36 chose: for each matrix of a layer one letter of `CODES`, or one
for each layer."""
MODELS = {
    "40b": {"query_heads": 4, "kv_heads": 2, "d_model": 256},
    "gqa4": {"query_heads": 4, "kv_heads": 1, "d_model": 256},
    "untied": {"query_heads": 4, "kv_heads": 2, "d_model": 256, "tied_head": False},
    "7b": {"query_heads": 3, "kv_heads": 1, "d_model": 192, "norms_per_block": 1},
    "odd": {"query_heads": 5, "kv_heads": 1, "d_model": 80, "norms_per_block": 1},
}


@pytest.mark.parametrize("case", CHOSEN)
def test_each_tensor_has_the_kind_that_llama_quantize_chooses(case):
    name, layers = case.split("-")
    sizes = MODELS[name]
    spec = FalconSpec("x", int(layers), vocabulary=64, intermediate_size=4 * sizes["d_model"], **sizes)
    assert {kind: chosen(spec, kind) for kind in CHOSEN[case]} == CHOSEN[case]


def chosen(spec, kind):
    """The kinds of the matrices, as in `CHOSEN`."""
    parts = {}
    for name, each in planned_tensors(spec, kind).items():
        if each.kind != "F32":
            parts.setdefault(name.split(".")[-2], []).append(CODES[each.kind])
    return {part: codes[0] if len({*codes}) == 1 else "".join(codes) for part, codes in parts.items()}


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_the_file_has_the_bytes_that_were_planned(kind, tmp_path):
    model = small_model("7b", hidden_size=192, num_attention_heads=3)
    file = fk.gguf_file(write_gguf(model, spec_of(model), tmp_path / "a.gguf", kind))
    assert sum(file.kinds.values()) == sum(each.bytes for each in planned_tensors(spec_of(model), kind).values())
    end = max(each.offset + each.bytes for each in file.tensors.values())
    assert end <= file.path.stat().st_size < end + 32  # padded
    assert file.kinds.keys() == {each.kind for each in planned_tensors(spec_of(model), kind).values()}


def test_a_head_of_its_own_is_written(instruct, tmp_path):
    model = small_model("40b", tie_word_embeddings=False)
    path = write_gguf(model, spec_of(model), tmp_path / "small.gguf", "float32", instruct.tokenizer)
    (head,) = [each for each in gguf.GGUFReader(path).tensors if each.name == "output.weight"]
    assert torch.equal(torch.tensor(head.data), model.lm_head.weight)


# The file


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        *(("auto", "F32"), ("float16", "F16"), (torch.bfloat16, "BF16")),
        *(("F16", "F16"), ("Q8_0", "Q8_0"), (" q5_0 ", "Q5_0")),
    ],
)
def test_the_matrices_have_the_dtype_asked_for(instruct, tmp_path, dtype, expected):
    tensors = gguf.GGUFReader(export_gguf(instruct, tmp_path / "a.gguf", dtype)).tensors
    kinds = {each.tensor_type.name for each in tensors if len(each.shape) > 1 and each.name != "token_embd.weight"}
    vectors = {each.tensor_type.name for each in tensors if len(each.shape) == 1}
    assert (kinds, vectors) == ({expected}, {"F32"})


def test_without_a_tokenizer_the_weights_are_the_same(exported, instruct, tmp_path):
    path = write_gguf(instruct.model, instruct.spec, tmp_path / "a.gguf")
    bare, whole = ({each.name: each.data for each in gguf.GGUFReader(file).tensors} for file in (path, exported))
    assert sorted(bare) == sorted(whole)
    assert all((bare[name] == whole[name]).all() for name in bare)


# Refusals, before anything is written


def refuse(error, match, call, directory):
    before = sorted(directory.iterdir())
    with pytest.raises(error, match=match):
        call()
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize(
    ("layout", "changes", "reason"),
    [
        (
            "rw",
            {},
            "positions by ALiBi, a sequential block, biases in its linear layers, which llama.cpp does not support",
        ),
        ("7b", {"bias": True}, "biases in its linear layers"),
        ("7b", {"parallel_attn": False}, "a sequential block"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_with_the_reason(layout, changes, reason, tmp_path):
    model = small_model(layout, **changes)
    refuse(ValueError, reason, lambda: write_gguf(model, spec_of(model), tmp_path / "a.gguf"), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "match"),
    [
        ("q4_km", "Unknown dtype 'q4_km'. Nearest: q4_k_m"),
        ("nf4", "Unknown dtype 'nf4'. "),
        ("x", "Known: auto, f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_0, q4_k_m, q4_k_s, q4_0, q3_k_m, q2_k"),
    ],
)
def test_an_unknown_dtype_is_refused_with_those_there_are(dtype, match, instruct, tmp_path):
    refuse(ValueError, match, lambda: export_gguf(instruct, tmp_path / "a.gguf", dtype), tmp_path)


def test_a_dtype_of_the_model_that_no_file_has_is_refused_with_one_that_works(tokenizer, tmp_path):
    model = small_model("40b").double()
    match = "the model is in torch.float64, which is no type of a GGUF file: give dtype='f32'"
    refuse(ValueError, match, lambda: write_gguf(model, spec_of(model), tmp_path / "a.gguf"), tmp_path)
    assert write_gguf(model, spec_of(model), tmp_path / "a.gguf", "f32", tokenizer).stat().st_size > 0


def test_a_changed_model_is_exported_as_it_is_or_refused(tokenizer, tmp_path):
    falcon = fk.load(fk.export_gguf(fk.load("falconet"), tmp_path / "a.gguf", "f32"))
    falcon.model.transformer.h = falcon.model.transformer.h[:3]
    path = export_gguf(falcon, tmp_path / "b.gguf", "f32")
    assert torch.allclose(logits(fk.load(path).model), logits(falcon.model), atol=1e-5)
    falcon.model.lm_head.bias = torch.nn.Parameter(torch.ones(2048))
    error = r"the model has lm_head\.bias, unlike a Falcon of its shape: export it as it was loaded"
    with pytest.raises(ValueError, match=error):
        export_gguf(falcon, tmp_path / "c.gguf", "f32")
    assert not (tmp_path / "c.gguf").exists()


def test_without_llama_cpp_its_kinds_are_refused_with_what_to_install(instruct, tmp_path, monkeypatch):
    monkeypatch.setattr(ggml, "_quantise_chunk", lambda: None)
    match = r"dtype='q4_k_m' needs llama.cpp's quantiser for Q4_K, Q5_K, Q6_K, .*pip install xllamacpp"
    refuse(ImportError, match, lambda: export_gguf(instruct, tmp_path / "a.gguf", "q4_k_m"), tmp_path)


@pytest.mark.parametrize("dtype", ["q4_0", "q5_0", "q8_0"])
def test_without_llama_cpp_the_older_kinds_have_the_same_bytes(dtype, instruct, tmp_path, monkeypatch):
    with_it = export_gguf(instruct, tmp_path / "a.gguf", dtype).read_bytes()
    monkeypatch.setattr(ggml, "_quantise_chunk", lambda: None)
    assert export_gguf(instruct, tmp_path / "b.gguf", dtype).read_bytes() == with_it


def test_packages_without_the_function_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "xllamacpp.abi3.so").touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(ggml, "find_spec", lambda name: found if name == "xllamacpp" else None)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert ggml._quantise_chunk.__wrapped__() is None


def test_weights_that_are_not_here_are_refused(tmp_path):
    with torch.device("meta"):
        model = small_model("40b")
    match = "some weights are offloaded: load the model with device_map='cpu'"
    refuse(ValueError, match, lambda: write_gguf(model, spec_of(model), tmp_path / "a.gguf"), tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    model = small_model("40b")
    model.is_quantized = True  # transformers sets it together with quantization_method
    match = "quantised for torch: load the model in bfloat16, and export that as 'q4_k_m'"
    refuse(ValueError, match, lambda: write_gguf(model, spec_of(model), tmp_path / "a.gguf"), tmp_path)


@pytest.mark.parametrize("given", ["falconet", None])
def test_what_is_no_loaded_falcon_is_refused(given, tmp_path):
    match = f"takes a loaded Falcon, as fk.load returns it, not a {type(given).__name__}"
    refuse(TypeError, match, lambda: export_gguf(given, tmp_path / "a.gguf"), tmp_path)


def test_adapters_on_the_model_are_to_be_merged_first(tmp_path):
    model = small_model("40b")
    inject_adapter_in_model(LoraConfig(target_modules=["dense"]), model)
    match = r"the model has adapters: fk\.merge\(adapter, base\)"
    refuse(ValueError, match, lambda: write_gguf(model, spec_of(model), tmp_path / "a.gguf"), tmp_path)


def test_a_tokenizer_of_another_model_is_refused(instruct, tmp_path):
    model = small_model("40b", vocab_size=1024)
    match = "the tokenizer has 2048 tokens and the model 1024"
    refuse(
        ValueError,
        match,
        lambda: write_gguf(model, spec_of(model), tmp_path / "a.gguf", "auto", instruct.tokenizer),
        tmp_path,
    )


def test_a_missing_directory_is_named(instruct, tmp_path):
    refuse(
        FileNotFoundError,
        "there is no directory .*nowhere",
        lambda: export_gguf(instruct, tmp_path / "nowhere" / "a.gguf"),
        tmp_path,
    )


def test_a_directory_is_no_file_name(instruct, tmp_path):
    refuse(
        IsADirectoryError,
        "is a directory: give the name of a file in it",
        lambda: export_gguf(instruct, tmp_path),
        tmp_path,
    )


def test_a_full_disk_is_noticed_before_writing(instruct, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    refuse(
        OSError,
        "a.gguf needs 18.5 MiB, and .* has 1.00 MiB free",
        lambda: export_gguf(instruct, tmp_path / "a.gguf"),
        tmp_path,
    )


def test_a_file_appears_whole_or_not_at_all(instruct, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_text("the one before")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_to_bytes", interrupt)
    refuse(KeyboardInterrupt, None, lambda: export_gguf(instruct, tmp_path / "a.gguf"), tmp_path)
    assert (tmp_path / "a.gguf").read_text() == "the one before"
