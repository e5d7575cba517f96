"""What `fk.serve` refuses before anything starts: settings out of range, no memory, no disk."""

import copy
import shutil
import socket
import sys
from functools import partial
from types import SimpleNamespace

import httpx2
import psutil
import pytest
import torch

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.serving import serve as serving
from falcon_kit.serving.engines import LLAMA_CPP, TRANSFORMERS, VLLM, check_arguments
from falcon_kit.serving.failures import connection_error
from falcon_kit.serving.source import files_for, source_of
from tests.conftest import small_model
from tests.generation.test_own_format import CHATML
from tests.loading.test_adapters import renamed, saved_adapter


def test_a_port_in_use_is_refused_before_anything_starts(engine):
    stand_in = engine()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is in use on 127.0.0.1: give another one"):
            fk.serve("falconet", stand_in.program, port=port)
    assert not stand_in.program.with_suffix(".seen").exists()


def test_arguments_that_can_be_read_once_are_all_passed_on():
    assert check_arguments(iter(["--seed", 3])) == ("--seed", "3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": 0}, "texts must be a whole number from 1 to 256"),
        ({"timeout": 0}, "timeout=0 must be above 0"),
        ({"port": 70000}, "port must be a whole number from 1 to 65535"),
        ({"context": 5000}, "context=5000 must be from 1 to 2048"),
        ({"arguments": ["--api-key=secret"]}, "arguments contains --api-key, which fk.serve sets itself"),
        ({"arguments": "--enforce-eager"}, "give a list of them, \\['--enforce-eager'\\]"),
        ({"gpus": 2}, "gpus=2: vLLM uses no GPU here"),
        ({"context": 0}, "context=0 must be from 1 to 2048"),
        ({"deadline": 0}, "deadline=0 must be above 0"),
        ({"request_timeout": -1}, "request_timeout=-1 must be above 0"),
        ({"arguments": ["--max_model_len=256"]}, "contains --max-model-len, which fk.serve sets itself: give context="),
        ({"arguments": ["-c", "256"]}, "arguments contains -c, which fk.serve sets itself: give context="),
        ({"dtype": "int8"}, "Unknown dtype for vLLM: 'int8'. Known: float32, bfloat16, float16"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_anything_starts(engine, settings, message):
    stand_in = engine()
    with pytest.raises(ValueError, match=message):
        fk.serve("falconet", stand_in.program, **settings)
    assert not stand_in.program.with_suffix(".seen").exists()


def test_the_memory_of_deleted_tensors_is_free_for_the_server_before_it_is_planned(engine, monkeypatch):
    """torch's cache is free for this process only."""
    seen = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))
    monkeypatch.setattr(serving, "_devices", lambda _: seen.append("planned") or sys.exit())
    with pytest.raises(SystemExit):
        fk.serve("falconet", engine().program)
    assert seen == ["emptied", "planned"]


def test_no_memory_for_a_second_copy_is_refused_with_the_way_out(engine, instruct, monkeypatch):
    monkeypatch.setattr(serving, "resolve_devices", lambda _: (Device("cpu", "cpu", 2**28),))
    with pytest.raises(fk.NotEnoughMemory, match=r"beside the Falcon .*fk.serve\('falconet-instruct'\)") as refused:
        fk.serve(instruct, engine().program)
    assert refused.value.plan.batch == 8
    with pytest.raises(fk.NotEnoughMemory, match="no memory for this server: falconet in float32, 8 x 2048 tokens"):
        fk.serve("falconet", engine().program)


@pytest.mark.parametrize("kind", [VLLM, LLAMA_CPP], ids=lambda each: each.name)
def test_no_memory_for_a_checkpoint_is_refused_with_changes_that_fit(monkeypatch, kind):
    """fk.plan's own advice has what serve does not: batch, int4."""
    cpu, source, dtype = (Device("cpu", "cpu", 2**40),), source_of("falconet"), "float32"
    whole, half = (serving._counted(source, kind, dtype, cpu, context, 8).total_bytes for context in (2048, 1024))
    free = (whole + half) // 2
    monkeypatch.setattr(serving, "host_memory", lambda: (2**40, free))
    monkeypatch.setattr(serving, "resolve_devices", lambda _: (Device("cpu", "cpu", free),))
    with pytest.raises(fk.NotEnoughMemory, match="no memory for this server: falconet in float32") as refused:
        serving._plan(source, kind, dtype, 2048, 8, None)
    *changes, last = refused.value.plan.suggestions
    assert (changes, last.startswith("an endpoint")) == (["texts=4", "context=1024"], True)
    for name, value in (each.split("=") for each in changes):
        assert serving._plan(
            source, kind, dtype, **{"context": 2048, "texts": 8, "gpus": None} | {name: int(value)}
        ).fits


def test_fewer_bits_are_advised_where_they_make_llama_cpp_fit(monkeypatch):
    source = source_of("falconet")
    monkeypatch.setattr(serving, "host_memory", lambda: (2**40, between(64, 1)))
    with pytest.raises(fk.NotEnoughMemory) as refused:
        serving._plan(source, LLAMA_CPP, "float32", 64, 1, None)
    assert refused.value.plan.suggestions[0] == "dtype='q4_k_m'"
    assert serving._plan(source, LLAMA_CPP, "q4_k_m", 64, 1, None).fits


def free_memory(monkeypatch, size):
    """Lets this machine have so many free bytes."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40, available=size))


def between(context, texts):
    """Free bytes that falconet on llama.cpp needs more than in float32, and less than in 4 bits."""
    counted = partial(serving._counted, source_of("falconet"), LLAMA_CPP)
    cpu = (Device("cpu", "cpu", 2**40),)
    return sum(counted(dtype, cpu, context, texts).total_bytes for dtype in ("float32", "q4_k_m")) // 2


def test_the_advice_of_fewer_bits_works(monkeypatch):
    free_memory(monkeypatch, between(2048, 8))
    with pytest.raises(fk.NotEnoughMemory, match="dtype='q4_k_m'"):
        fk.serve("falconet", "llama.cpp", dtype="float32")
    with fk.serve("falconet", "llama.cpp", dtype="q4_k_m") as served:
        assert served.generate("Hi", max_new_tokens=1).stats.new_tokens == 1


def test_where_the_weights_cannot_be_loaded_the_advice_is_a_file_from_another_machine(monkeypatch, tmp_path):
    path = fk.export_gguf(fk.load("falconet"), tmp_path / "small.gguf", "q4_k_m")
    free_memory(monkeypatch, between(64, 1))
    advice = (
        r"on a machine with .* free: fk.export_gguf\(fk.load\('falconet'\), path, 'q4_k_m'\), then fk.serve\(path\)"
    )
    for dtype in ("float32", "q4_k_m"):
        with pytest.raises(fk.NotEnoughMemory, match=advice) as refused:
            fk.serve("falconet", "llama.cpp", dtype=dtype, context=64, texts=1)
        assert "dtype=" not in str(refused.value)
    with fk.serve(path, context=64, texts=1) as served:
        assert served.generate("Hi", max_new_tokens=1).stats.new_tokens == 1


def test_a_folder_with_adapter_and_base_that_cannot_be_loaded_is_to_be_saved_as_fk_load_reads_it(
    engine, monkeypatch, tmp_path, tokenizer
):
    folder = tmp_path / "both"
    small_model("40b").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved_adapter(folder, folder)
    free_memory(monkeypatch, 2**20)
    advice = r"falcon = fk\.load\('.*both'\); falcon\.save\(path\), then fk\.serve\(path\)"
    with pytest.raises(fk.NotEnoughMemory, match=advice):
        fk.serve(folder, engine().program)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16", "bf16"])
def test_a_dtype_may_be_torchs_or_llama_cpps_name(engine, dtype):
    with fk.serve("falconet", engine().program, dtype=dtype) as served:
        assert served.plan.dtype == "bfloat16"


def test_the_limits_of_a_request_are_arguments_of_serve(engine):
    with fk.serve("falconet", engine().program, deadline=1e-6, request_timeout=7) as served:
        with pytest.raises(TimeoutError, match="give a longer deadline="):
            served.generate("Hi", max_new_tokens=1)
        connection = served._server.connection
    assert str(connection_error(httpx2.ReadTimeout(""), "x", connection)) == (
        "x sent nothing for 7 s: give a longer request_timeout=, or read its log"
    )


def test_an_engine_without_the_argument_refuses_gpus(monkeypatch):
    monkeypatch.setattr(serving, "resolve_devices", lambda _: resolve_devices("2xA100-80GB"))
    with pytest.raises(ValueError, match="gpus=1: transformers serve has no such argument: set CUDA_VISIBLE_DEVICES"):
        serving._plan(source_of("falconet"), TRANSFORMERS, "float32", 64, 1, gpus=1)


def test_a_plain_folder_with_a_template_of_its_own_has_the_stop_strings_of_load(tmp_path, tokenizer):
    folder = tmp_path / "chatml"
    small_model("40b").save_pretrained(folder)
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML
    own.save_pretrained(folder)
    files = files_for(source_of(folder), tmp_path, "float32", gguf=False)
    local = fk.load(folder)
    assert (files.path, files.has_template) == (folder, True)
    assert files.chat_format.stop == local.chat_format.stop


def test_no_disk_for_the_weights_is_refused(engine, instruct, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 2**20))
    with pytest.raises(OSError, match=r"falconet-instruct needs 18.5 MiB, and .* has 1.00 MiB free"):
        fk.serve(instruct, engine().program)


def test_an_adapter_of_a_base_that_is_stored_quantised_is_refused_before_files_are_written(tmp_path):
    quantised = fk.load("falconet", dtype="int8")
    quantised.model.save_pretrained(tmp_path / "int8")
    quantised.tokenizer.save_pretrained(tmp_path / "int8")
    adapter = saved_adapter(embedded_directory("falconet"), tmp_path / "wise")
    renamed(adapter, str(tmp_path / "int8"))
    with pytest.raises(ValueError, match=r"wise is to be added to .*int8, whose weights are stored in int8"):
        source_of(adapter)
