"""`fk.spec` and `fk.load` take each name for the same model: the first loads no torch, so both look it up."""

import json

import pytest

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.loading.checkpoints import find
from tests.catalogue.test_gguf import written
from tests.conftest import small_config
from tests.loading.test_checkpoints import cached

HUB = dict.fromkeys(("revision", "token", "cache_dir"), None) | {"local_files_only": True}
FOUND = """
falconet falconet-instruct FALCONET tiiuae/falconet falcon-7b tiiuae/falcon-40b-instruct Falcon-7B somebody/falcon
somebody/adapter somebody/both somebody/of-falcon-7b ./folder ./folder/ ./adapter ./adapter-of-falconet
./adapter-of-adapter ./adapter-on-hub ./both ./file.gguf ./gguf ./falcon-40b folder/both falcon-40b
""".split()
MISSING = """
./nowhere nowhere/at/all somebody/else /nowhere ~/nowhere runs/adapter falcon-41b gpt2 tiiuae/falcon-41b nowhere.gguf
nowhere.json ./endless ./unnamed ./orphan ./empty ./several ./broken ./other folder/nowhere
""".split()


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A working folder and a hub cache with a model, or with a mistake, for each name."""
    hub, here = tmp_path / "hub", tmp_path / "here"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("folder", "both", "falcon-40b", "folder/both"):
        small_config("7b").save_pretrained(here / name)
    bases = {
        "adapter": "./folder",
        "adapter-of-falconet": "falconet",
        "adapter-of-adapter": "./adapter",
        "adapter-on-hub": "somebody/adapter",
        "both": "./both",
        "folder/both": str(here / "folder" / "both"),
        "endless": "./endless",
        "unnamed": None,
        "orphan": "./nowhere",
    }
    for name, base in bases.items():
        (here / name).mkdir(exist_ok=True)
        (here / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    for name, config in {"empty": None, "broken": "{", "other": '{"model_type": "llama"}', "gguf": None}.items():
        (here / name).mkdir()
        if config:
            (here / name / "config.json").write_text(config)
    written(here).rename(here / "file.gguf")
    for copy in ("gguf/one.gguf", "several/one.gguf", "several/two.gguf"):
        (here / copy).parent.mkdir(exist_ok=True)
        (here / copy).hardlink_to(here / "file.gguf")
    for name, base in {"adapter": "somebody/falcon", "both": "somebody/both", "of-falcon-7b": "falcon-7b"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        cached(hub, f"somebody/{name}", tmp_path / name)
    small_config("7b").save_pretrained(hub / "models--somebody--both" / "snapshots" / ("0" * 40))
    cached(hub, "somebody/falcon", here / "folder")
    for name in ("falcon-7b", "falcon-40b-instruct"):
        published = tmp_path / name
        published.mkdir()
        (published / "config.json").write_text(json.dumps(fk.spec(name).to_config()))
        cached(hub, f"tiiuae/{name}", published)


def outcome(call):
    """What a call returns, or its error."""
    try:
        return call()
    except (ValueError, OSError, LookupError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", FOUND)
def test_spec_and_load_take_a_name_for_the_same_model(names, name):
    assert fk.spec(name) == find(name, HUB).spec


@pytest.mark.parametrize("name", MISSING)
def test_spec_and_load_refuse_a_name_in_the_same_words(names, name):
    expected = outcome(lambda: fk.spec(name))
    assert isinstance(expected, tuple)
    assert outcome(lambda: find(name, HUB)) == expected


def test_the_folder_of_an_embedded_model_is_that_model():
    folder = embedded_directory("falconet-instruct")
    assert fk.spec(folder) == find(folder, HUB).spec
