"""The catalogue: the spec of a name, a directory or a config.json, and the embedded models."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import falcon_kit as fk
from falcon_kit import load
from falcon_kit.catalogue.card import CARD
from falcon_kit.catalogue.names import catalogue, embedded_directory, spec
from tests.catalogue.test_spec import OLD_7B, built_parameters
from tests.conftest import small_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["falcon-180B", "FALCON-180b", "tiiuae/falcon-180B", " falcon-180B "])
def test_names_are_found_in_any_case_and_with_their_owner(name: str) -> None:
    assert spec(name).name == "falcon-180B"


@pytest.mark.parametrize("call", [fk.spec, fk.plan, fk.load, fk.serve], ids=lambda each: each.__name__)
def test_a_name_that_no_path_can_have_is_answered_as_a_name(call: Any) -> None:
    with pytest.raises(LookupError, match=r"^'xxx.*\.\.\. is longer than any path, and no model has such a name"):
        call("x" * 300)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(LookupError) as error:
        spec("falcon-40b-instuct")
    assert str(error.value).startswith(
        "Unknown model 'falcon-40b-instuct'. Nearest: falcon-40b-instruct, falcon-7b-instruct"
    )


def test_a_falcon_that_only_the_hub_has_is_named_by_its_id_there() -> None:
    with pytest.raises(LookupError, match=r"or an id of the hub, such as 'tiiuae/falcon-11B'\.$"):
        spec("falcon-11b")


@pytest.mark.parametrize("name", ["tiiuae/falcon-11B", "tiiuae/falcon-40b-instuct"])
def test_a_name_of_the_publisher_may_be_on_the_hub_when_that_cannot_be_reached(name: str) -> None:
    with pytest.raises(ConnectionError, match=rf"{name} is not .*the hub cannot be reached.*Nearest: falcon-"):
        spec(name)


@pytest.mark.parametrize(
    "path", ["./x", "../x", "/no/where", "~/no/where", "runs/x", "a/b/c", "C:\\models\\x", "./falcon-7b", "tiiuae/x/"]
)
def test_a_path_is_named_as_one_where_it_does_not_exist(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for find in (spec, load):
        with pytest.raises(FileNotFoundError) as error:
            find(path)
        assert str(error.value) == f"there is no directory {path}: give one that holds a config.json, or a model's name"


def test_a_folder_comes_before_a_published_name_and_after_an_embedded_one(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("falcon-7b", "falconet"):
        small_model("rw").save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert [spec(name).layers for name in ("falcon-7b", "falconet", Path("falconet"))] == [2, 6, 2]
    assert [load(name).spec.layers for name in ("falcon-7b", "falconet", Path("falconet"))] == [2, 6, 2]


@pytest.mark.parametrize("path", ["~nobodyx/m", "~nobodyx"])
def test_the_home_of_a_user_who_does_not_exist_is_a_missing_directory(path: str) -> None:
    for find in (spec, load):
        with pytest.raises(FileNotFoundError, match=f"there is no directory {path}: give one that holds"):
            find(path)


@pytest.mark.parametrize("path", ["a.json", "./config.json", "runs/x/config.json"])
def test_a_file_is_named_as_one_where_it_does_not_exist(path: str) -> None:
    for find in (spec, load):
        with pytest.raises(FileNotFoundError, match=f"there is no file {path}: give a config.json, its directory, or"):
            find(path)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_directory(name: str) -> None:
    for find in (spec, load):
        with pytest.raises(LookupError, match="falcon-40b-instruct"):
            find(name)


def test_a_name_in_a_folder_that_exists_may_be_a_directory_or_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for find in (spec, load):
        with pytest.raises(FileNotFoundError, match=r"there is no directory models/typo; as the name of a hub"):
            find("models/typo")
        with pytest.raises(FileNotFoundError, match=r"there is no directory runs/typo: give one that holds a config"):
            find("runs/typo")


def test_a_loaded_falcon_is_no_name_but_has_a_spec() -> None:
    with pytest.raises(TypeError, match=r"not a SimpleNamespace; for a loaded Falcon, use falcon\.spec"):
        spec(SimpleNamespace())  # type: ignore[arg-type]


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(LookupError) as error:
        spec("gpt2")
    assert all(each.name in str(error.value) for each in catalogue())


@pytest.mark.parametrize("as_text", [True, False])
def test_a_directory_and_its_config_describe_the_same_falcon(tmp_path: Path, as_text: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD_7B))
    directory, file = (str(each) if as_text else each for each in (tmp_path, tmp_path / "config.json"))

    assert spec(directory) == spec(file)
    assert (tmp_path.name, spec("falcon-7b").parameters) == (spec(file).name, spec(file).parameters)


def test_a_directory_without_a_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(
        FileNotFoundError, match=r"config.json does not exist; its directory contains model.safetensors"
    ):
        spec(tmp_path)


def test_a_path_that_does_not_exist_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; its directory contains nothing"):
        spec(tmp_path / "nowhere")


def test_a_config_that_was_cut_off_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "fal')

    with pytest.raises(ValueError, match=r"config.json is not valid JSON .*it may be incomplete: download it again"):
        spec(tmp_path)


def test_a_config_that_is_no_object_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")

    with pytest.raises(ValueError, match=r"contains a list, but a config.json is a JSON object"):
        spec(tmp_path)


def test_the_catalogue_holds_the_published_family_and_the_embedded_two() -> None:
    expected = {"falconet", "falconet-instruct", "falcon-rw-1b", "falcon-rw-7b"}
    expected |= {
        "falcon-7b",
        "falcon-7b-instruct",
        "falcon-40b",
        "falcon-40b-instruct",
        "falcon-180B",
        "falcon-180B-chat",
    }

    assert expected == {each.name for each in catalogue()}


def test_instruct_models_name_the_model_they_come_from() -> None:
    expected = ["falconet-instruct", "falcon-40b-instruct", "falcon-7b-instruct", "falcon-180B-chat"]

    assert expected == [each.name for each in catalogue() if each.fine_tuned_from]
    assert all(spec(each.fine_tuned_from).fine_tuned_from is None for each in catalogue() if each.fine_tuned_from)


def test_an_embedded_model_has_no_hub_id() -> None:
    assert ("tiiuae/falcon-7b", None) == (spec("falcon-7b").hub_id, spec("falconet").hub_id)


@pytest.mark.parametrize("name", ["falconet", "falconet-instruct"])
def test_an_embedded_falcon_is_described_by_the_config_of_the_base(name: str) -> None:
    config = json.loads((embedded_directory("falconet") / "config.json").read_text())

    assert (name, built_parameters(config)) == (spec(name).name, spec(name).parameters)


@pytest.mark.parametrize("name", ["falconet", "falconet-instruct"])
def test_an_embedded_falcon_has_the_layout_of_40b(name: str) -> None:
    small, large = spec(name), spec("falcon-40b")
    keys = ("layout", "head_dim", "positions", "parallel_block", "norms_per_block", "bias", "tied_head")

    assert [getattr(large, key) for key in keys] == [getattr(small, key) for key in keys]


def test_only_the_embedded_models_have_a_directory() -> None:
    with pytest.raises(LookupError) as error:
        embedded_directory("falconett")
    assert str(error.value) == "Unknown embedded model 'falconett'. Nearest: falconet, falconet-instruct."


def test_the_catalogue_is_a_table_in_jupyter() -> None:
    shown = catalogue()._repr_html_()

    assert all(f">{each.name}</th>" in shown for each in catalogue())
    assert shown.count("<tr>") == len(catalogue()) + 1


def test_tables_bring_no_colours_and_fetch_nothing() -> None:
    shown = catalogue()._repr_html_() + spec("falcon-7b")._repr_html_() + CARD._repr_html_()

    assert not [word for word in ("color", "background", "<script", "src=", "href=") if word in shown]


def test_the_catalogue_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from falcon_kit.catalogue.names import catalogue; catalogue(); "
        "print({'torch', 'transformers'} & {*sys.modules})"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


@pytest.mark.parametrize("file", ["adapter_config.json", "config.json"])
def test_a_folder_above_the_model_is_answered_with_the_models(tmp_path: Path, file: str) -> None:
    for name in ("adapter", "checkpoint-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    with pytest.raises(FileNotFoundError, match=rf"Give {tmp_path}/adapter, which holds one\."):
        spec(tmp_path)
