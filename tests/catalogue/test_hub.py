"""The config of a hub id, and plain texts for the errors of the hub. No test connects to the hub."""

import json
import socket
from unittest.mock import Mock

import pytest
from huggingface_hub import errors

import falcon_kit as fk
from falcon_kit.catalogue.hub import hub_errors, is_cut_off
from tests.conftest import small_config


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A hub cache with the configs of two Falcons, without weights."""
    for name in ("somebody--my-falcon", "tiiuae--falcon-11B"):
        folder = tmp_path / f"models--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        small_config("40b").save_pretrained(folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("cached")
def test_a_hub_id_has_a_spec_by_its_config_alone():
    spec = fk.spec("somebody/my-falcon")
    expected = fk.FalconSpec.from_config(json.loads(small_config("40b").to_json_string()), "somebody/my-falcon")
    assert (spec.parameters, spec.layers, spec.name) == (expected.parameters, expected.layers, "somebody/my-falcon")


@pytest.mark.usefixtures("cached")
def test_a_hub_id_can_be_planned_for():
    assert fk.plan("somebody/my-falcon", devices="T4").fits


@pytest.mark.usefixtures("cached")
def test_a_falcon_of_its_makers_that_the_catalogue_lacks_has_a_spec_too():
    assert fk.spec("tiiuae/falcon-11B").name == "tiiuae/falcon-11B"


def test_a_hub_id_that_cannot_be_reached_says_so():
    with pytest.raises(ConnectionError, match="somebody/their-falcon is not in the local cache and the hub cannot be"):
        fk.spec("somebody/their-falcon")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def unreachable(repository, name, **hub):
        asked.append((name, hub.get("local_files_only", False)))
        raise errors.LocalEntryNotFoundError("x")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        fk.spec("somebody/their-falcon")
    assert asked == [("config.json", False), ("adapter_config.json", True)]


@pytest.fixture
def online(monkeypatch):
    """As on a machine without a proxy where huggingface_hub may connect, with the hub at this host and port."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return lambda port: monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_machine_that_is_cut_off_asks_the_cache_alone_and_waits_for_no_further_try(online, monkeypatch):
    online(9)
    assert is_cut_off()
    tries = []
    monkeypatch.setattr("time.sleep", tries.append)
    with pytest.raises(ConnectionError, match="somebody/their-falcon is not in the local cache and the hub cannot be"):
        fk.spec("somebody/their-falcon")
    assert tries == []


def test_a_hub_that_accepts_a_connection_or_is_behind_a_proxy_is_asked(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        online(server.getsockname()[1])
        assert not is_cut_off()
    assert is_cut_off()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:3128")
    assert not is_cut_off()


@pytest.mark.usefixtures("cached")
def test_the_hub_is_not_asked_again_for_a_file_that_it_has_not(tmp_path, monkeypatch):
    config = tmp_path / "models--somebody--my-falcon" / "snapshots" / ("0" * 40) / "config.json"
    absent = tmp_path / "models--somebody--my-falcon" / ".no_exist" / ("0" * 40) / "adapter_config.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name, **hub: asked.append(name) or str(config))
    assert fk.spec("somebody/my-falcon").layers == 2
    assert asked == ["config.json"]


@pytest.mark.parametrize("name", ["a/b/c", "../models/falcon", "/no/such/place"])
def test_a_path_is_not_taken_for_a_hub_id(name):
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*: give one that holds a config\.json"):
        fk.spec(name)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), ConnectionError, "copy the checkpoint into a directory"),
        (errors.OfflineModeIsEnabled("x"), ConnectionError, "or use 'falconet', which needs no download"),
        (
            errors.HFValidationError("x"),
            LookupError,
            r"the hub has no who/what, or not this revision: .*; a private one needs `hf auth login` or token=\.\.\.",
        ),
        (
            errors.GatedRepoError("401", response=Mock()),
            PermissionError,
            r"who/what is gated: accept its terms on the hub, then log in with `hf auth login` or pass token=\.\.\.",
        ),
        (errors.HfHubHTTPError("429", response=Mock()), ConnectionError, "return who/what, try again later: 429"),
        (
            errors.RemoteEntryNotFoundError("config.json", response=Mock()),
            FileNotFoundError,
            r"who/what lacks a file that a Falcon repository needs \(.*config\.json",
        ),
    ],
)
def test_an_error_of_the_hub_says_what_to_do(raised, kind, message):
    with pytest.raises(kind, match=message), hub_errors("who/what"):
        raise raised
