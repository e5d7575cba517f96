"""`requirements`: what a notebook takes, before it starts."""

import json

import pytest

import falcon_kit as fk
from falcon_kit.planning import downloads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An empty download folder with 10 GiB of free disk."""
    monkeypatch.setattr(downloads, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(downloads, "free_disk", lambda folder: 10 * 2**30)
    return tmp_path


def test_an_embedded_model_needs_no_download(machine):
    taken = fk.requirements("falconet-instruct", minutes=5)
    assert taken.download_bytes == 0
    assert "download: nothing" in repr(taken)
    assert "about 5 minutes" in repr(taken)


def test_files_are_compared_with_the_free_disk(machine):
    taken = fk.requirements("tiiuae/falcon-40b-instruct", minutes=5)
    assert taken.download_bytes == 83_671_941_120
    assert "download: 77.9 GiB, once, to the disk that HF_HOME names: 10.0 GiB free" in repr(taken)
    assert "Its files take 77.9 GiB of disk, and 10.0 GiB are free" in repr(taken)
    assert "set HF_HOME" in repr(taken)


def test_cached_files_are_not_downloaded_again(machine):
    snapshot = machine / "models--tiiuae--falcon-rw-1b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x" * 1000)
    assert fk.requirements("falcon-rw-1b", minutes=5).download_bytes == fk.spec("falcon-rw-1b").stored_bytes - 1000


def test_a_directory_needs_no_download(machine, checkpoint):
    assert fk.requirements(checkpoint, minutes=5).download_bytes == 0


def test_the_tokenizer_alone_needs_no_download_of_weights_and_no_other_machine(machine):
    taken = fk.requirements("tiiuae/falcon-40b-instruct", minutes=1, weights=False)
    assert (taken.download_bytes, taken.tiers) == (0, ())
    assert repr(taken).splitlines()[:2] == [
        "memory: 440 MiB, Python with torch and transformers",
        "download: the files of the tokenizer, a few MiB, once",
    ]
    assert taken._repr_html_().count("<table>") == 1


def test_the_tokenizer_of_an_embedded_model_needs_no_download(machine):
    assert "download: nothing" in repr(fk.requirements("falconet", minutes=1, weights=False))


def test_the_plan_takes_the_dtype_of_the_notebook(machine):
    assert fk.requirements("falcon-7b", dtype="int8", minutes=5).plan.dtype == "int8"


def test_the_plan_takes_the_arguments_of_the_notebook(machine):
    taken = fk.requirements("falconet", minutes=5, purpose="lora", context=256)
    assert {each.purpose for each in (taken.plan, *taken.tiers)} == {"lora"}
    assert taken.plan.context == 256


def test_the_plan_is_for_the_dtype_in_which_load_has_the_model(machine, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fk.requirements("falconet-instruct", minutes=5).plan.dtype == fk.load("falconet-instruct").dtype


def test_for_qlora_the_plan_is_for_quantised_weights(machine):
    assert fk.requirements("falconet", minutes=5, purpose="qlora").plan.dtype == "nf4-double"


@pytest.mark.parametrize(
    ("purpose", "expected"),
    [
        ("inference", [("7b", "bfloat16", "T4", 1), ("40b", "bfloat16", "A100-80GB", 2), ("40b", "nf4", "L40S", 1)]),
        ("qlora", [("7b", "nf4-double", "T4", 1), ("40b", "nf4-double", "L40S", 1)]),
        ("full", [("7b", "bfloat16", "A100-80GB", 1), ("40b", "bfloat16", "A100-80GB", 8)]),
    ],
)
def test_each_larger_model_is_shown_once_on_the_cheapest_machine_that_holds_it(machine, purpose, expected):
    tiers = fk.requirements("falconet", minutes=5, purpose=purpose).tiers
    found = [(each.spec.name, each.dtype, each.devices[0].name, len(each.devices)) for each in tiers]
    assert found == [(f"falcon-{size}-instruct", *rest) for size, *rest in expected]
    assert all(each.fits for each in tiers)


def test_what_no_machine_holds_is_left_out(machine):
    tiers = fk.requirements("falconet", minutes=5, purpose="lora", batch=2**20).tiers
    assert tiers == ()


def test_a_context_of_ones_own_model_may_be_longer_than_that_of_the_others(machine, tmp_path):
    config = fk.spec("falconet").to_config() | {"max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    taken = fk.requirements(tmp_path, minutes=5, context=4096)
    assert (taken.plan.context, {each.context for each in taken.tiers}) == (4096, {2048})


def test_in_jupyter_it_is_two_tables(machine):
    html = fk.requirements("falconet", minutes=5)._repr_html_()
    assert html.count("<table>") == 2
    assert "falcon-40b-instruct" in html
    assert html.count("about $") == len(fk.requirements("falconet", minutes=5).tiers)
    assert "about $5.00/h" in html.partition("2 x A100-80GB")[2].partition("</tr>")[0]
