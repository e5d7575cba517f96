"""`fk.serve` with a GGUF file, which llama.cpp reads as it is."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.serving import serve as serving
from falcon_kit.serving.engines import LLAMA_CPP
from falcon_kit.serving.file_plan import plan_file
from falcon_kit.serving.gguf import write_gguf
from falcon_kit.serving.gguf_kinds import ALIASES, FILE_TYPES, stored_dtype
from falcon_kit.serving.source import files_for, source_of
from tests.loading.test_load import falcons_in_memory
from tests.serving.servers import QUESTION


@pytest.mark.parametrize("dtype", ["float32", "q4_k_m"])
def test_llama_cpp_serves_a_gguf_file_itself_and_answers_as_from_the_export(instruct, engine, tmp_path, dtype):
    path = fk.export_gguf(instruct, tmp_path / "mine.gguf", dtype)
    content = path.read_bytes()
    with fk.serve(path, "llama.cpp", texts=2) as served, fk.serve(instruct, "llama.cpp", dtype=dtype) as exported:
        assert served.files.path == path
        assert [*Path(served._process.folder).glob("*.gguf")] == []
        assert served.chat(QUESTION).text == exported.chat(QUESTION).text
        answers = [each.generate(fk.CARD.prompt, max_new_tokens=20).text for each in (served, exported)]
        assert answers[0] == answers[1]
        assert (served.chat_format, served.own_format) == (exported.chat_format, exported.own_format)
        shown = served._repr_html_()
        assert f"{fk.gguf_file(path)._size()}, read as it is" in shown
        assert "made by" not in shown
    assert served.command == (
        f'LLAMA_API_KEY="${{FALCON_KIT_TOKEN:?}}" llama-server -m {path} --alias mine '
        "--host 0.0.0.0 --port 8000 -np 2 -c 4096"
    )
    assert path.read_bytes() == content


def test_a_folder_with_one_gguf_file_is_served_by_llama_cpp_unless_another_engine_is_named(instruct, engine, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = fk.export_gguf(instruct, folder / "mine.gguf", "q4_k_m")
    with fk.serve(folder) as served:
        assert (served.server, served.files.path) == ("llama.cpp", path)
        assert served.chat(QUESTION).text == instruct.chat(QUESTION).text
    for given in (folder, path):
        with pytest.raises(
            ValueError, match=r"vLLM does not serve the GGUF file .*leave engine out, .*fk.load\('.*/vllm'\)"
        ):
            fk.serve(given, engine().program)
    with fk.serve(fk.load(path), engine().program) as served:
        assert served.files.path.is_dir()


def test_a_gguf_file_needs_llama_cpp_also_where_another_engine_is_first(gguf, monkeypatch):
    monkeypatch.setattr(serving, "resolve_devices", lambda _: resolve_devices("80GiB"))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/vllm" if Path(name).name == "vllm" else None)
    monkeypatch.setattr("falcon_kit.serving.engines.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"llama.cpp is not installed here: pip install xllamacpp"):
        fk.serve(gguf)


@pytest.mark.parametrize("given", ["q8_0", "bfloat16"])
def test_another_dtype_than_that_of_a_gguf_file_is_refused_with_a_way_that_works(instruct, engine, tmp_path, given):
    path = fk.export_gguf(instruct, tmp_path / "mine.gguf", "q4_k_m")
    with pytest.raises(ValueError, match=f"dtype='{given}': the weights of .* are in q4_k_m, and the file") as refused:
        fk.serve(path, "llama.cpp", dtype=given)
    with pytest.raises(ValueError, match=r"Unknown dtype for llama.cpp: 'q9'"):
        fk.serve(path, "llama.cpp", dtype="q9")
    assert f"fk.serve(fk.load({str(path)!r}), 'llama.cpp', dtype={given!r})" in str(refused.value)
    with fk.serve(fk.load(path), "llama.cpp", dtype=given) as served:
        assert stored_dtype(fk.gguf_file(served.files.path)) == ALIASES.get(given, given)


@pytest.mark.parametrize(
    ("stored", "given"), [("f32", "float32"), ("f32", "F32"), ("bf16", "torch.bfloat16"), *[("q5_0",) * 2]]
)
def test_the_dtype_that_a_gguf_file_has_may_be_given(stored, given):
    file = SimpleNamespace(metadata={"general.file_type": FILE_TYPES[stored][1].value}, kinds={})
    source = SimpleNamespace(file=file, dtype=stored_dtype(file), name="a.gguf")
    assert serving._check_dtype(LLAMA_CPP, source, given) == stored


@pytest.mark.parametrize("number", [None, 1024, 999, [7], "7"])
def test_a_file_that_names_no_mixture_is_called_after_the_kind_of_most_bytes(number):
    metadata = {} if number is None else {"general.file_type": number}
    assert stored_dtype(SimpleNamespace(metadata=metadata, kinds={"Q4_K": 9, "F32": 1})) == "q4_k"


def test_a_model_that_was_loaded_for_its_file_is_gone_once_that_is_written(tmp_path, monkeypatch):
    before, there = len(falcons_in_memory()), []
    monkeypatch.setattr("falcon_kit.serving.source.empty_gpu_cache", lambda: there.append(len(falcons_in_memory())))
    files_for(source_of("falconet"), tmp_path, "float32", gguf=True)
    assert there == [before]


def test_a_gguf_file_is_planned_by_its_bytes_and_16_bits_of_keys_and_values(instruct, tmp_path):
    file = fk.gguf_file(fk.export_gguf(instruct, tmp_path / "mine.gguf", "q4_k_m"))
    planned = plan_file(file.spec, "q4_k_m", file.tensors, 512, 3, [Device("cpu", "cpu", 2**40)])
    rest = ("KV cache", "logits", "activations", "overhead")
    assert sum(row.bytes for row in planned.rows if row.part not in rest) == planned.weight_bytes
    assert planned.weight_bytes == sum(file.kinds.values())
    assert planned.kv_bytes == 3 * 512 * file.spec.kv_bytes_per_token(2)
    assert (planned.dtype, planned.fits, planned.advice) == ("q4_k_m", True, "")
    assert "mine in q4_k_m, 3 x 512 tokens" in planned.verdict()
    assert "Q8_0, as in the file" in planned._repr_html_()  # the head


@pytest.mark.parametrize(("texts", "changes"), [(8, ["texts=4", "context=1024"]), (1, ["context=1024"])])
def test_no_memory_for_a_gguf_file_is_refused_with_changes_that_fit(gguf, monkeypatch, texts, changes):
    source, device = source_of(gguf), (Device("cpu", "cpu", 2**40),)
    whole, half = (
        serving._counted(source, LLAMA_CPP, "f32", device, context, texts).total_bytes for context in (2048, 1024)
    )
    monkeypatch.setattr(serving, "host_memory", lambda: (2**40, (whole + half) // 2))
    with pytest.raises(fk.NotEnoughMemory, match="no memory for this server: falconet-instruct in f32") as refused:
        fk.serve(gguf, "llama.cpp", texts=texts)
    advice = refused.value.plan.suggestions
    assert [each for each in advice if "=" in each] == changes
    assert ("fk.export_gguf(fk.load(" in str(refused.value)) == (texts == 1)  # the keys and values of 8 do not shrink
    given = {"context": 2048, "texts": texts, "gpus": None}
    for name, value in (each.split("=") for each in changes):
        assert serving._plan(source_of(gguf), LLAMA_CPP, "f32", **given | {name: int(value)}).fits


def test_a_gguf_file_without_a_tokenizer_is_refused_before_anything_starts(instruct, engine, tmp_path):
    path = write_gguf(instruct.model, instruct.spec, tmp_path / "plain.gguf")
    with pytest.raises(ValueError, match=r"plain.gguf has no tokenizer of a Falcon"):
        fk.serve(path, "llama.cpp")


def test_an_adapter_of_a_gguf_file_is_merged_and_exported(engine, tmp_path):
    base = fk.export_gguf(fk.load("falconet"), tmp_path / "base.gguf")
    folder = Path(shutil.copytree(embedded_directory("falconet-instruct"), tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with fk.serve(folder, "llama.cpp") as served:
        assert served.command.startswith(f"# falcon = fk.load({str(folder)!r}); fk.export_gguf(falcon, ")
        assert served.chat(QUESTION).text == fk.load(folder).chat(QUESTION).text
