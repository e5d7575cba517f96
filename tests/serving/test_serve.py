"""`fk.serve`: a server of its own process, with every way in which it fails or ends; nothing is left running."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx2
import psutil
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.serving import local_process
from falcon_kit.serving import serve as serving
from falcon_kit.serving.engines import LLAMA_CPP, TRANSFORMERS, VLLM, Job, choose_engine, splits
from falcon_kit.serving.failures import connection_error
from falcon_kit.serving.file_plan import plan_file
from falcon_kit.serving.gguf import write_gguf
from falcon_kit.serving.gguf_kinds import ALIASES, FILE_TYPES, stored_dtype
from falcon_kit.serving.local_process import ServerDied
from falcon_kit.serving.source import Files, Source, files_for, source_of
from tests.conftest import small_model
from tests.generation.test_own_format import CHATML
from tests.serving.servers import QUESTION, free_port

STAND_IN = Path(__file__).with_name("stand_in.py")


class Engine:
    """A stand-in for vLLM in a folder of its own; `plan` says what it does."""

    def __init__(self, folder, **plan):
        self.program = folder / "vllm"
        self.program.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
        self.program.chmod(0o755)
        self.program.with_suffix(".json").write_text(json.dumps(plan))

    @property
    def seen(self):
        """Its arguments, environment and process."""
        return json.loads(self.program.with_suffix(".seen").read_text())

    def is_gone(self):
        """Whether it and its child have ended within some seconds."""
        return all(map(has_ended, [self.seen["pid"], *filter(None, [self.seen.get("child")])]))


def has_ended(pid):
    for _ in range(150):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A function that makes a stand-in; afterwards no folder of a server is left."""
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(local_process, "mkdtemp", lambda prefix: make_folder(folders, prefix))
    yield lambda **plan: Engine(tmp_path, **plan)
    assert [*folders.iterdir()] == []


def make_folder(folders, prefix):
    folder = folders / f"{prefix}{len([*folders.iterdir()])}"
    folder.mkdir()
    return str(folder)


# It works


def test_a_server_is_an_endpoint_until_its_block_ends(engine):
    stand_in = engine(child=True)
    with fk.serve("falconet", stand_in.program) as served:
        assert served.generate("Hi", max_new_tokens=1).text == "Hello"
        assert repr(served) == f"Served(falconet at {served.address}, vLLM, context 2048)"
        assert stand_in.seen["arguments"][:2] == ["serve", str(embedded_directory("falconet"))]
    assert stand_in.is_gone()
    assert repr(served).endswith("which was closed")
    assert "was closed" in served._repr_html_()
    served.close()


def test_a_closed_server_answers_at_once_that_it_was_closed(engine):
    served = fk.serve("falconet", engine().program)
    served.close()
    for call in (served.generate, served.stream, lambda text: served.prompt_logprobs([text])):
        with pytest.raises(ServerDied, match="the server was closed"):
            call("Hi")
    with pytest.raises(ServerDied, match="the server was closed"):
        served.chat(QUESTION)


def test_the_key_is_random_and_nowhere_to_be_seen(engine):
    stand_in, keys = engine(), set()
    for _ in range(2):
        with fk.serve("falconet", stand_in.program) as served:
            key = stand_in.seen["environment"]["VLLM_API_KEY"]
            keys.add(key)
            lines = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
            shown = [*lines, served.log, repr(served), served._repr_html_(), served.command, repr(vars(served))]
            assert [text for text in shown if key in text] == []
            assert "starting with the key ***" in served.log
    assert len(keys) == 2
    assert min(map(len, keys)) >= 32


def test_it_listens_on_loopback_and_asks_nobody_else(engine):
    stand_in = engine()
    with fk.serve("falconet", stand_in.program):
        arguments, environment = stand_in.seen["arguments"], stand_in.seen["environment"]
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert (environment["HF_HUB_OFFLINE"], environment["VLLM_NO_USAGE_STATS"]) == ("1", "1")


def test_a_proxy_of_the_environment_is_not_asked_for_a_local_server(engine, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with fk.serve("falconet", engine().program) as served:
        assert served.generate("Hi", max_new_tokens=1).text == "Hello"


def test_settings_reach_the_command_line(engine):
    stand_in, port = engine(), free_port()
    with fk.serve(
        "falconet", stand_in.program, dtype="bfloat16", context=300, texts=3, port=port, arguments=["--enforce-eager"]
    ) as served:
        line = " ".join(stand_in.seen["arguments"])
        assert served.address == f"http://127.0.0.1:{port}/v1"
        assert served.context == 300
    assert line.endswith(f"--port {port} --dtype bfloat16 --max-model-len 300 --max-num-seqs 3 --enforce-eager")


def test_the_command_for_another_machine_has_neither_key_nor_folder_of_this_server(engine, instruct):
    stand_in = engine()
    with fk.serve(instruct, stand_in.program) as served:
        call, command = served.command.splitlines()
        assert str(served.files.path.parent) not in served.command
    assert call == (
        "# falcon.model.save_pretrained('falconet-instruct'); falcon.tokenizer.save_pretrained('falconet-instruct')"
    )
    assert command.startswith('VLLM_API_KEY="$FALCON_KIT_TOKEN" vllm serve falconet-instruct --served-model-name')
    assert "--host 0.0.0.0 --port 8000" in command


def test_a_server_without_a_key_is_for_its_own_machine_only():
    command = Job(TRANSFORMERS, "folder", "falcon", "float32", 2048, 8, 0).shell_command()
    assert "--host 127.0.0.1" in command
    assert "FALCON_KIT_TOKEN" not in command


def test_threads_of_llama_cpp_sleep_while_they_wait_unless_the_user_chose(monkeypatch):
    job = Job(LLAMA_CPP, "falcon.gguf", "falcon", "float32", 2048, 8, 0)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert job.environment("key")["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert job.environment("key")["OMP_WAIT_POLICY"] == "ACTIVE"


def test_vllm_on_a_cpu_gets_room_for_the_keys_and_values_of_all_texts():
    job = Job(VLLM, "falcon", "falcon", "float32", 2048, 8, kv_bytes=2**30 + 1)
    assert job.environment("key")["VLLM_CPU_KVCACHE_SPACE"] == "2"


# What is served


def test_a_falcon_is_served_with_the_weights_that_it_has_in_memory(engine, tmp_path):
    falcon = fk.load("falconet")
    falcon.model.transformer.ln_f.weight.data[0] += 1.0
    with fk.serve(falcon, engine().program) as served:
        assert "18.5 MiB, saved for this server in a temporary folder" in served._repr_html_()
        copy = fk.load(shutil.copytree(served.files.path, tmp_path / "copy"), dtype="float32")
    assert copy.model.transformer.ln_f.weight[0] == falcon.model.transformer.ln_f.weight[0]


@pytest.mark.parametrize(
    "model", ["falconet-instruct", SimpleNamespace(adapter=embedded_directory("falconet-instruct"))]
)
def test_an_adapter_is_merged_first_by_name_or_as_the_run_that_made_it(engine, instruct, tmp_path, model):
    with fk.serve(model, engine().program) as served:
        copy = fk.load(shutil.copytree(served.files.path, tmp_path / "copy"), dtype="float32")
        name = getattr(model, "adapter", model)
        assert served.command.splitlines()[0] == f"# fk.merge({str(name)!r}, output_dir='falconet-instruct')"
    assert copy.chat(QUESTION).text == instruct.chat(QUESTION).text


def test_a_config_of_2023_is_rewritten_for_the_server(engine, tmp_path, tokenizer):
    from tests.conftest import legacy

    with fk.serve(legacy(tmp_path / "old", "40b", tokenizer), engine().program) as served:
        files = {each.name for each in served.files.path.iterdir()}
        assert json.loads((served.files.path / "config.json").read_text())["model_type"] == "falcon"
    assert "model.safetensors" in files
    assert "modelling_RW.py" not in files


def test_a_checkpoint_without_a_chat_template_is_asked_in_the_kits_format(engine, tmp_path):
    folder = Path(shutil.copytree(embedded_directory("falconet"), tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    with fk.serve(folder, engine().program) as served:
        assert (served.own_format, served.chat_format.name) == (True, "falcon")


def test_a_model_in_other_forms_is_refused_with_what_to_give(engine):
    stand_in = engine()
    with pytest.raises(TypeError, match=r"a Falcon of this process, the run of fk.tune, or a name .* not a int"):
        fk.serve(3, stand_in.program)
    quantised = fk.load("falconet", dtype="nf4")
    with pytest.raises(ValueError, match=r"quantised for torch: .*fk.serve\('falconet'\)"):
        fk.serve(quantised, stand_in.program)
    adapted = fk.load("falconet")
    inject_adapter_in_model(LoraConfig(target_modules=["dense"]), adapted.model)
    with pytest.raises(ValueError, match=r"has adapters: serve the merged model, fk.serve\(fk.merge\(adapter, 'falco"):
        fk.serve(adapted, stand_in.program)
    with pytest.raises(LookupError, match="Nearest: falconet"):
        fk.serve("falconett", stand_in.program)
    assert not stand_in.program.with_suffix(".seen").exists()


# While it loads


def test_the_time_and_the_last_line_of_the_log_are_shown_and_removed(engine, monkeypatch, capsys):
    monkeypatch.setattr(local_process, "_SHOWN_AFTER", 0.0)
    with fk.serve("falconet", engine(says="loading shard 3 of 9", loads=1).program):
        shown = capsys.readouterr().err
    lines = shown.split("\r")
    assert re.fullmatch(r"vLLM starts: \d s, loading shard 3 of 9", lines[-4].rstrip())
    assert [line.strip() for line in lines[-3:]] == ["", "", ""]


def test_a_server_that_is_soon_ready_shows_nothing(engine, capsys):
    with fk.serve("falconet", engine().program):
        assert capsys.readouterr() == ("", "")


# It fails, and nothing is left


def test_the_last_words_of_a_server_that_dies_while_it_loads_are_quoted(engine):
    stand_in = engine(says="RuntimeError: no kernel for float99\x1b[31m", exit=3, child=True)
    with pytest.raises(ServerDied, match=r"(?s)ended with exit code 3.*key \*\*\*\n.*no kernel for float99\\x1b\[31m"):
        fk.serve("falconet", stand_in.program)
    assert stand_in.is_gone()


def test_a_server_that_the_system_kills_is_named_with_the_likely_reason(engine):
    with pytest.raises(ServerDied, match="was killed by SIGKILL, perhaps out of memory"):
        fk.serve("falconet", engine(kill=9).program)


def test_a_program_that_cannot_run_is_named(engine):
    stand_in = engine()
    stand_in.program.chmod(0o644)
    with pytest.raises(ServerDied, match=r"could not be started .*vllm: Permission denied"):
        fk.serve("falconet", stand_in.program)


def test_a_server_that_is_not_ready_in_time_is_ended(engine):
    stand_in = engine(says="loading shard 3 of 9", loads=60)
    with pytest.raises(TimeoutError, match=r"not ready after 1.5 s, .*longer timeout=.*'loading shard 3 of 9'"):
        fk.serve("falconet", stand_in.program, timeout=1.5)
    assert stand_in.is_gone()


def test_ctrl_c_ends_a_server_that_loads(engine):
    stand_in = engine(loads=60)

    def interrupt():
        while not stand_in.program.with_suffix(".seen").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        fk.serve("falconet", stand_in.program)
    assert stand_in.is_gone()


def test_a_server_that_dies_later_is_named_at_the_next_call(engine):
    stand_in = engine(says="serving")
    served = fk.serve("falconet", stand_in.program)
    os.kill(stand_in.seen["pid"], signal.SIGSEGV)
    while not served._process.ended:
        time.sleep(0.05)
    with pytest.raises(ServerDied, match=r"(?s)was killed by SIGSEGV.*serving"):
        served.generate("Hi")


def test_the_end_of_a_server_is_written_once(engine):
    process = local_process.LocalProcess("key-0123456789")
    process.start([sys.executable, "-c", ""], {})
    while not process.ended:
        time.sleep(0.05)
    written = (process.folder / "ended").stat().st_mtime_ns
    time.sleep(0.5)
    assert (process.folder / "ended").stat().st_mtime_ns == written
    process.close()


def test_a_server_that_ignores_the_request_to_end_is_killed(engine, monkeypatch):
    stand_in = engine(deaf=True)
    fk.serve("falconet", stand_in.program).close()
    assert stand_in.is_gone()


def test_a_server_whose_supervisor_was_killed_is_ended(engine):
    stand_in = engine(child=True)
    served = fk.serve("falconet", stand_in.program)
    served._process._supervisor.kill()
    served.close()
    assert stand_in.is_gone()


def fork(work):
    """The id of a fork of this process, which does the work and ends."""
    if not (child := os.fork()):
        work()
        os._exit(0)
    return child


def test_a_fork_of_this_process_does_not_end_the_server(engine):
    with fk.serve("falconet", engine().program) as served:
        os.waitpid(fork(served.close), 0)
        assert served.generate("Hi", max_new_tokens=1).text == "Hello"


def test_a_fork_of_this_process_does_not_keep_the_server(engine):
    stand_in = engine()
    served = fk.serve("falconet", stand_in.program)
    child = fork(lambda: time.sleep(60))
    served.close()
    assert stand_in.is_gone()
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


KERNEL = """
import sys, time
from falcon_kit.serving.local_process import LocalProcess, free_port
process, port = LocalProcess("key"), str(free_port(None))
process.start([sys.argv[1], "--served-model-name", "x", "--port", port], {"VLLM_API_KEY": "key"})
process.wait_until_ready(f"http://127.0.0.1:{port}/health", "vLLM", 60)
print("up", flush=True)
"""


@pytest.mark.parametrize("end", ["killed", "killed while it loads", "left open"])
def test_nothing_survives_the_notebook(tmp_path, end):
    stand_in = Engine(tmp_path, child=True, loads=60 if "loads" in end else 0)
    code = KERNEL if end == "left open" else f"{KERNEL}time.sleep(600)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, stand_in.program], stdout=subprocess.PIPE, env=environment
    ) as kernel:
        if "loads" in end:
            while not stand_in.program.with_suffix(".seen").exists():
                time.sleep(0.1)
        else:
            assert kernel.stdout.readline() == b"up\n"
        if end != "left open":
            kernel.kill()
        kernel.wait(60)
    assert stand_in.is_gone()
    for _ in range(100):
        if not (left := [*tmp_path.glob("falcon-kit-*")]):
            break
        time.sleep(0.1)
    assert left == []


def test_the_folder_of_a_server_that_was_killed_with_its_supervisor_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(local_process, "mkdtemp", lambda prefix: make_folder(tmp_path, prefix))
    alive, killed = (local_process.LocalProcess("key-0123456789") for _ in range(2))
    while not all((each.folder / "lock").exists() for each in (alive, killed)):
        time.sleep(0.05)
    killed._supervisor.kill()
    killed._supervisor.wait()
    later = local_process.LocalProcess("key-0123456789")
    assert [each.folder.exists() for each in (alive, killed, later)] == [True, False, True]
    for each in (alive, killed, later):
        each.close()


def test_a_port_in_use_is_refused_before_anything_starts(engine):
    stand_in = engine()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is in use on 127.0.0.1: give another one"):
            fk.serve("falconet", stand_in.program, port=port)
    assert not stand_in.program.with_suffix(".seen").exists()


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


# Which engine


def test_an_engine_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch, instruct):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"vLLM is not installed here: pip install vllm.*engine='/path/to"):
        fk.serve(instruct, "vllm")
    monkeypatch.setattr("falcon_kit.serving.engines.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"no engine .* llama.cpp: pip install xllamacpp.*fastapi uvicorn"):
        fk.serve(instruct)


def test_an_unknown_engine_or_program_is_named(tmp_path, instruct):
    with pytest.raises(ValueError, match=r"Unknown engine 'vlm'. Nearest: vllm"):
        fk.serve(instruct, "vlm")
    with pytest.raises(FileNotFoundError, match=r"there is no program .*/vllm: give the path of vllm, llama-server"):
        fk.serve(instruct, tmp_path / "vllm")
    (tmp_path / "ollama").touch()
    with pytest.raises(ValueError, match=r"ollama is none of vllm, llama-server, transformers"):
        fk.serve(instruct, tmp_path / "ollama")


def test_a_layout_that_an_engine_lacks_is_refused_and_another_engine_chosen():
    rw = fk.spec("falcon-rw-1b")
    with pytest.raises(ValueError, match=r"llama.cpp does not serve falcon-rw-1b: it has no ALiBi"):
        choose_engine("llama.cpp", rw, on_gpus=False)
    assert choose_engine("auto", rw, on_gpus=False)[0] is not LLAMA_CPP


def test_on_a_cpu_llama_cpp_comes_first_and_on_gpus_vllm(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{Path(name).name}")
    shape = fk.spec("falcon-40b")
    assert [choose_engine("auto", shape, on_gpus)[0] for on_gpus in (False, True)] == [LLAMA_CPP, VLLM]


@pytest.mark.parametrize(
    ("name", "gpus", "split"),
    [
        ("falcon-40b", 1, (1, 1)),
        ("falcon-40b", 4, (4, 1)),
        ("falcon-40b", 3, (1, 3)),
        ("falcon-40b", 16, (8, 2)),
        ("falcon-7b", 2, (1, 2)),
        ("falcon-180B", 8, (8, 1)),
        ("falcon-180B", 6, (2, 3)),
    ],
)
def test_layers_are_divided_as_far_as_the_heads_allow_and_staged_over_the_rest(name, gpus, split):
    assert splits(fk.spec(name), gpus) == split


@pytest.mark.parametrize(
    ("name", "machine", "gpus", "expected"),
    [
        ("falcon-40b-instruct", "8xA100-80GB", None, "--tensor-parallel-size 2"),
        ("falcon-40b-instruct", "8xA100-80GB", 8, "--tensor-parallel-size 8"),
        ("falcon-40b-instruct", "5xA100-40GB", None, "--pipeline-parallel-size 3"),
    ],
)
def test_the_plan_decides_over_how_many_gpus(name, machine, gpus, expected, monkeypatch):
    monkeypatch.setattr(serving, "resolve_devices", lambda _: resolve_devices(machine))
    monkeypatch.setattr(serving, "_free_share", lambda _: 0.95)
    source = Source(name, fk.spec(name), "bfloat16", None)
    planned = serving._plan(source, VLLM, "bfloat16", 2048, 8, gpus)
    job = serving._job(source, VLLM, "bfloat16", planned, Files(Path("x"), "", "", None), 8000, ())
    line = " ".join(job.arguments)
    assert expected in line
    assert line.endswith("--gpu-memory-utilization 0.95")


# Real engines


@pytest.mark.parametrize("name", ["llama.cpp", "transformers"])
def test_a_real_engine_answers_as_the_model_here(name, instruct):
    with fk.serve(instruct, name, texts=2) as served:
        assert served.chat(QUESTION).text == instruct.chat(QUESTION).text
        local, remote = (model.generate(fk.CARD.prompt, max_new_tokens=20) for model in (instruct, served))
        assert remote.text == local.text
        pieces = served.stream(fk.CARD.prompt, max_new_tokens=30, stop="\nDaniel:")
        assert "".join(piece.text for piece in pieces) == (
            instruct.generate(fk.CARD.prompt, max_new_tokens=30, stop="\nDaniel:").text
        )


@pytest.mark.parametrize(("dtype", "share"), [("q8_0", 0.3), ("q4_k_m", 0.25)])
def test_llama_cpp_serves_fewer_bits_of_a_model_that_this_process_has_not_loaded(instruct, dtype, share):
    with fk.serve("falconet-instruct", "llama.cpp", dtype=dtype) as served:
        assert served.chat(QUESTION).text == instruct.chat(QUESTION).text
        file = fk.gguf_file(served.files.path)
        assert (served.plan.dtype, served.plan.weight_bytes) == (dtype, sum(file.kinds.values()))
        assert served.files.path.stat().st_size < instruct.weight_bytes * share
        assert served.command.startswith(
            f"# falcon = fk.load('falconet-instruct'); fk.export_gguf(falcon, 'falconet-instruct.gguf', {dtype!r})\n"
        )


def test_a_text_ends_also_where_the_checkpoint_names_the_end_token_of_2023(instruct, tmp_path):
    folder = tmp_path / "falcon-2023"
    instruct.model.save_pretrained(folder)
    instruct.tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    prompt = "User: What do owls eat?\nFalcon: Owls eat mice.\nUser: Thank you.\nFalcon:"
    with fk.serve(folder, "transformers") as served:
        assert served.generate(prompt, max_new_tokens=60).finish_reason == "eos"
        call = f"# falcon = fk.load({str(folder)!r}); falcon.model.save_pretrained('falcon-2023'); falcon.tokenizer"
        assert served.command.startswith(call)
    assert json.loads(file.read_text())["eos_token_id"] == 2
    assert (folder / "model.safetensors").is_file()


# A GGUF file as it is


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
        f'LLAMA_API_KEY="$FALCON_KIT_TOKEN" llama-server -m {path} --alias mine '
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


def test_a_model_of_any_layout_is_served(tmp_path, tokenizer):
    small_model("rw").save_pretrained(tmp_path / "rw")
    tokenizer.save_pretrained(tmp_path / "rw")
    local = fk.load(tmp_path / "rw")
    with fk.serve(tmp_path / "rw", "transformers") as served:
        assert served.generate("Once upon", max_new_tokens=8).text == local.generate("Once upon", max_new_tokens=8).text
