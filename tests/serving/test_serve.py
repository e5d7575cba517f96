"""`fk.serve`: a server of its own process, for each engine and each form of a model."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import openai
import psutil
import pytest
from peft import LoraConfig, inject_adapter_in_model

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.planning.devices import resolve_devices
from falcon_kit.serving import serve as serving
from falcon_kit.serving.engines import LLAMA_CPP, TRANSFORMERS, VLLM, Job, choose_engine, splits
from falcon_kit.serving.local_process import ServerDied
from falcon_kit.serving.source import Files, Source
from tests.conftest import small_model
from tests.serving.servers import QUESTION, free_port

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
            shown += [str(served), json.dumps(served._facts()), *map(repr, vars(served).values())]
            assert served.key() == key
            assert [text for text in shown if key in text] == []
            assert "starting with the key ***" in served.log
    assert len(keys) == 2
    assert min(map(len, keys)) >= 32


def test_another_client_reaches_the_server_with_its_key(engine):
    with fk.serve("falconet", engine().program) as served:
        client = openai.OpenAI(base_url=served.address, api_key=served.key())
        assert [each.id for each in client.models.list()] == [served.model]
        assert fk.connect(served.address, token=served.key()).model == served.model


def test_a_server_without_a_key_gives_one_that_clients_accept():
    server = SimpleNamespace(connection=SimpleNamespace(token=None))
    assert fk.Served.key(SimpleNamespace(_server=server)) == "none"


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


def test_a_port_is_checked_before_the_files_are_written_and_chosen_afterwards(engine, monkeypatch):
    calls = []
    for name in ("free_port", "files_for"):
        original = getattr(serving, name)
        monkeypatch.setattr(serving, name, lambda *all, name=name, to=original: (calls.append(name), to(*all))[1])
    with fk.serve("falconet", engine().program):
        assert calls == ["free_port", "files_for", "free_port"]


def test_the_command_for_another_machine_has_neither_key_nor_folder_of_this_server(engine, instruct):
    stand_in = engine()
    with fk.serve(instruct, stand_in.program) as served:
        call, command = served.command.splitlines()
        assert str(served.files.path.parent) not in served.command
    assert call == "# falcon.save('falconet-instruct')"
    assert command.startswith('VLLM_API_KEY="${FALCON_KIT_TOKEN:?}" vllm serve falconet-instruct --served-model-name')
    assert "--host 0.0.0.0 --port 8000" in command


@pytest.mark.parametrize(("key", "started"), [("k", "with k\n"), ("", ""), (None, "")])
def test_a_shell_without_the_key_starts_no_server(tmp_path, key, started):
    """A server with an empty key answers everybody, and this one listens at every address."""
    (program := tmp_path / "vllm").write_text('#!/bin/sh\necho "with $VLLM_API_KEY"\n')
    program.chmod(0o755)
    command = Job(VLLM, "folder", "falcon", fk.plan("falconet")).shell_command()
    environment = {"PATH": str(tmp_path)} | ({} if key is None else {"FALCON_KIT_TOKEN": key})
    done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == started
    assert ("FALCON_KIT_TOKEN: " in done.stderr) == (not started)


def test_a_server_without_a_key_is_for_its_own_machine_only():
    command = Job(TRANSFORMERS, "folder", "falcon", fk.plan("falconet")).shell_command()
    assert "--host 127.0.0.1" in command
    assert "FALCON_KIT_TOKEN" not in command


def test_threads_of_llama_cpp_sleep_while_they_wait_unless_the_user_chose(monkeypatch):
    job = Job(LLAMA_CPP, "falcon.gguf", "falcon", fk.plan("falconet"))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert job.environment("key")["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert job.environment("key")["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(("texts", "gib"), [(64, "1"), (65, "2")])
def test_vllm_on_a_cpu_gets_room_for_the_keys_and_values_of_all_texts(texts, gib):
    planned = fk.plan("falcon-7b", "bfloat16", context=2048, batch=texts)
    assert planned.kv_bytes == texts * 2**24
    assert Job(VLLM, "falcon", "falcon", planned).environment("key")["VLLM_CPU_KVCACHE_SPACE"] == gib


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
    job = serving._job(source, VLLM, planned, Files(Path("x"), "", "", None), 8000, ())
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
        call = f"# falcon = fk.load({str(folder)!r}); falcon.save('falcon-2023')\n"
        assert served.command.startswith(call)
    assert json.loads(file.read_text())["eos_token_id"] == 2
    assert (folder / "model.safetensors").is_file()


def test_a_model_of_any_layout_is_served(tmp_path, tokenizer):
    small_model("rw").save_pretrained(tmp_path / "rw")
    tokenizer.save_pretrained(tmp_path / "rw")
    local = fk.load(tmp_path / "rw")
    with fk.serve(tmp_path / "rw", "transformers") as served:
        assert served.generate("Once upon", max_new_tokens=8).text == local.generate("Once upon", max_new_tokens=8).text
