"""Plans: the sum of the parts, what fits, and what is suggested otherwise."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import FalconConfig

import falcon_kit as fk
from falcon_kit.catalogue import memory
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.loading.checkpoints import find
from falcon_kit.loading.load import choose_dtype
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.planning.machines import MACHINES
from falcon_kit.planning.placement import GPU_OVERHEAD

GIB = 2**30


# What adds up


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-7b", "falcon-rw-1b", "falcon-180B"])
@pytest.mark.parametrize("dtype", ["bfloat16", "nf4"])
def test_the_rows_hold_all_weights_and_the_whole_cache(name, dtype):
    plan = fk.plan(name, dtype, context=500, batch=3, devices="16xA100-80GB")
    weights = [row.bytes for row in plan.rows if row.part.startswith(("layers", "embedding", "last"))]
    spec = fk.spec(name)
    assert sum(weights) == plan.weight_bytes == memory.weight_bytes(spec, dtype)
    assert plan.kv_bytes == spec.kv_bytes_per_token() * 500 * 3


def test_transformers_cache_is_sixteen_times_as_large_for_the_40b():
    ours, theirs = (fk.plan("falcon-40b", devices="8xA100-80GB", cache=kind) for kind in ("grouped", "transformers"))
    assert theirs.kv_bytes == 16 * ours.kv_bytes == 3.75 * GIB


PREFILL, CUDA = "the peak of the prefill of 2048 tokens", "CUDA context and library workspaces: assumed"
QUANTISED = "for products with quantised weights"
BACKWARD = "recomputation and backward pass of one layer"


@pytest.mark.parametrize(
    ("dtype", "purpose", "device", "reasons"),
    [
        ("bfloat16", "inference", Device("gpu", 0, GIB), {"activations": PREFILL, "overhead": CUDA}),
        ("int8", "inference", Device("gpu", 0, GIB), {"activations": PREFILL, "workspace": QUANTISED}),
        ("nf4", "qlora", Device("gpu", 0, GIB), {"activations": BACKWARD, "workspace": QUANTISED}),
        ("float32", "full", Device("gpu", 0, GIB), {"activations": BACKWARD, "loss": "logits of 256 tokens at a time"}),
        (
            "bfloat16",
            "inference",
            Device("cpu", "cpu", GIB),
            {
                "activations": PREFILL,
                "workspace": "for the prefill in float32, on a CPU without instructions for bfloat16",
                "overhead": "Python with torch and transformers",
            },
        ),
    ],
)
def test_every_row_has_the_reason_of_its_own_size(monkeypatch, dtype, purpose, device, reasons):
    monkeypatch.setattr("falcon_kit.planning.placement.has_instructions_for", lambda dtype: False)
    rows = {row.part: row.reason for row in fk.plan("falcon-7b", dtype, purpose=purpose, devices=[device]).rows}
    assert all(rows.values())
    assert {part: rows[part][: len(reason)] for part, reason in reasons.items()} == reasons


def test_training_takes_more_the_more_is_trained():
    order = ["qlora", "lora", "full"]
    sizes = [fk.plan("falcon-7b", purpose=each, devices="8xH200").total_bytes for each in order]
    assert sizes == sorted(set(sizes))


def test_inference_takes_the_bytes_of_the_formulas():
    """`tests/catalogue/test_memory.py` compares the formulas with models."""
    plan = fk.plan("falcon-7b", batch=3, devices="H200")
    size = (plan.spec, "bfloat16", 2048, 3)
    parts = memory.logits_bytes(plan.spec, 3) + memory.prefill_bytes(*size) + GPU_OVERHEAD
    assert plan.total_bytes == plan.weight_bytes + plan.kv_bytes + parts


@pytest.mark.parametrize("purpose", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_takes_the_bytes_of_the_formulas_for_what_is_trained(purpose, checkpointing):
    """`tests/catalogue/test_memory.py` compares the formulas with training steps."""
    plan = fk.plan("falcon-7b", purpose=purpose, gradient_checkpointing=checkpointing, devices="8xH200")
    size, adapters = (plan.spec, "bfloat16", 2048, 1), purpose == "lora"
    layer, kept = memory.backward_bytes(*size, adapters), 0 if checkpointing else memory.kept_bytes(*size, adapters)
    rows = [(row.part, row.bytes) for row in plan.rows if row.device == 0]
    assert dict(rows)["activations"] == layer - kept
    assert ("loss", memory.loss_bytes(*size, trains_head=not adapters)) in rows
    assert sum(row.bytes for row in plan.rows if row.part == "kept activations") == plan.spec.layers * kept


# The dtype


def test_without_a_dtype_it_is_that_of_the_work():
    dtypes = {each: fk.plan("falcon-40b", purpose=each, devices="A100-80GB").dtype for each in ("qlora", "lora")}
    assert dtypes == {"qlora": "nf4-double", "lora": "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": "float32", "purpose": "qlora"},
            "dtype='float32' with purpose='qlora', which trains LoRA on quantised",
        ),
        ({"dtype": "nf4", "purpose": "full"}, "dtype='nf4' with purpose='full': quantised weights are not trained"),
        (
            {"dtype": "int8", "devices": [Device("gpu", 0, GIB), Device("host", "cpu", GIB, offload_target=True)]},
            "dtype='int8' with an offload target: quantised layers compute where their weights are",
        ),
    ],
)
def test_a_dtype_that_the_work_cannot_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fk.plan("falcon-7b", **{"devices": "T4"} | arguments)


@pytest.mark.parametrize(
    ("dtype", "devices"), [("float16", "T4"), ("float32", "T4"), ("int8", None), ("float16", None)]
)
def test_the_dtype_auto_is_that_of_the_checkpoint_as_load_chooses_it(tmp_path, monkeypatch, dtype, devices):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fk.load("falconet", dtype=dtype).model.save_pretrained(tmp_path)
    fk.load("falconet").tokenizer.save_pretrained(tmp_path)
    expected = dtype if devices else fk.load(tmp_path).dtype
    assert fk.plan(tmp_path, "auto", devices=devices).dtype == expected


def test_the_dtype_auto_of_a_model_that_is_not_here_is_the_published_one():
    assert fk.plan("falcon-7b", "auto", devices="T4").dtype == "bfloat16"


def test_the_dtype_auto_on_a_gpu_without_bfloat16_is_the_one_that_load_chooses(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    planned = fk.plan("falconet", "auto", devices=[Device("T4", 0, 2**34, here=True)])
    assert planned.dtype == choose_dtype(None, find("falconet", {}), on_cpu=False)[0] == "float16"


# What is published


@pytest.mark.parametrize(
    ("name", "dtype", "purpose", "devices", "fits"),
    [
        # huggingface.co/blog/falcon, 2023
        ("falcon-7b", "bfloat16", "inference", "A10G", True),
        ("falcon-7b", "nf4", "qlora", "T4", True),
        ("falcon-40b", "nf4", "qlora", "A100-80GB", True),
        ("falcon-40b", "bfloat16", "inference", "2xA100-80GB", True),
        ("falcon-40b", "int8", "inference", "A100-80GB", True),
        ("falcon-40b", "int8", "inference", "A100-40GB", False),
        ("falcon-40b", "nf4", "inference", "A100-40GB", True),
        # served on it by AWS's own examples, 2023
        ("falcon-40b", "bfloat16", "inference", "ml.g5.12xlarge", True),
    ],
)
def test_what_is_known_to_run_fits_and_what_is_not_does_not(name, dtype, purpose, devices, fits):
    assert fk.plan(name, dtype, purpose=purpose, devices=devices).fits is fits


@pytest.mark.parametrize(
    ("dtype", "devices", "words"),
    [
        # huggingface.co/blog/falcon; huggingface.co/tiiuae/falcon-40b-instruct/discussions/32; vllm#2447
        ("bfloat16", "A100-80GB", "it may not fit into A100-80GB 79.1 GiB: published reports needed 83.8 GiB"),
        ("bfloat16", "H100", "it may not fit into H100-80GB 79.1 GiB: published reports needed"),
        ("nf4-double", "RTX 4090", "it may not fit into RTX-4090 23.5 GiB: published reports needed 25.1 GiB"),
        ("nf4-double", "RTX 3090", "it may not fit into RTX-3090 23.7 GiB: published reports needed"),
        ("nf4", "RTX 4090", "it does not fit into RTX-4090"),
        ("nf4", "24GiB", "it does not fit into 24GiB"),
        ("nf4", "L4", "it does not fit into L4"),
    ],
)
def test_what_is_published_as_not_fitting_does_not_fit(dtype, devices, words):
    plan = fk.plan("falcon-40b-instruct", dtype, devices=devices)
    assert (plan.fits, words in plan.verdict()) == (False, True)
    assert plan.suggestions


def test_a_model_that_leaves_almost_nothing_of_a_gpu_is_tight():
    needed = fk.plan("falcon-rw-1b", devices="T4").total_bytes
    tight, fits = (fk.plan("falcon-rw-1b", devices=[Device("gpu", 0, int(needed * by))]) for by in (1.01, 1.05))
    assert (tight.fits, fits.fits, fits.tight) == (False, True, "")
    assert "it may not fit into gpu" in tight.verdict()
    assert "less than 4% of a GPU would stay free" in tight.tight


def test_a_tight_plan_can_still_be_loaded_by_force():
    plan = fk.plan("falcon-40b", devices="A100-80GB")
    assert set(plan.device_map.values()) == {0}
    assert fk.plan("falcon-40b", devices="A100-40GB").device_map == {}


def test_ranks_that_fill_their_gpus_are_tight():
    part = fk.plan("falcon-40b", devices="8xL4", tensor_parallel=8).total_bytes // 8
    devices = [Device("gpu", key, int(part * 1.01)) for key in range(8)]
    plan = fk.plan("falcon-40b", devices=devices, tensor_parallel=8, dtype="bfloat16", context=2048)
    assert (plan.fits, bool(plan.tight)) == (False, True)


# Disk


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of huggingface_hub on a disk with 100 GB free."""
    monkeypatch.setattr("falcon_kit.planning.downloads.cache_directory", lambda: tmp_path)
    monkeypatch.setattr("falcon_kit.planning.downloads.free_disk", lambda path: 100 * 10**9)
    return tmp_path


def test_the_files_to_download_are_part_of_a_plan(cache):
    plan = fk.plan("falcon-40b")
    assert (plan.disk.bytes, plan.disk.shortage) == (83_671_941_120, "")
    assert "77.93 GiB</td><td" in plan._repr_html_()
    assert "93.1 GiB free" in plan._repr_html_()


def test_a_disk_that_is_too_small_is_named_with_the_way_out(cache):
    words = "Its files take 334 GiB of disk, and 93.1 GiB are free in the cache of huggingface_hub: set HF_HOME"
    assert words in fk.plan("falcon-180B").verdict()


def test_files_in_the_cache_are_not_downloaded_again(cache):
    snapshot = cache / "models--tiiuae--falcon-7b" / "snapshots" / "0" / "model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"0" * 1000)
    assert fk.plan("falcon-7b").disk.bytes == fk.spec("falcon-7b").stored_bytes - 1000


def test_a_link_in_the_cache_to_a_file_that_is_gone_counts_as_no_file(cache):
    snapshot = cache / "models--tiiuae--falcon-7b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(cache / "gone")
    assert fk.plan("falcon-7b").disk.bytes == fk.spec("falcon-7b").stored_bytes


def test_an_adapter_of_the_hub_needs_the_files_of_its_base(cache):
    base = fk.spec("falcon-7b")
    adapter = replace(
        base,
        name="somebody/lora",
        published=False,
        fine_tuned_from="falcon-7b",
        source="https://huggingface.co/somebody/lora",
    )
    snapshot = cache / "models--tiiuae--falcon-7b" / "snapshots" / "0" / "model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"0" * 1000)
    assert fk.plan(adapter).disk.bytes == base.stored_bytes - 1000


def test_what_is_in_the_cache_as_a_whole_needs_no_disk(cache):
    small = replace(fk.spec("falconet"), name="somebody/small", source="https://huggingface.co/somebody/small")
    assert fk.plan(small, devices=resolve_devices(None)).disk.bytes == small.stored_bytes
    snapshot = cache / "models--somebody--small" / "snapshots" / "0" / "model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"0" * small.stored_bytes)
    assert fk.plan(small, devices=resolve_devices(None)).disk is None


def test_the_disk_of_another_machine_is_not_known():
    assert fk.plan("falcon-40b", devices="ml.g5.12xlarge").disk.free_bytes is None
    assert fk.plan("falconet", devices="T4").disk is None


# Suggestions


def test_fewer_bits_come_before_everything_else():
    assert fk.plan("falcon-40b", devices="A100-40GB").suggestions[0] == "dtype='nf4'"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"devices": "A100-80GB", "batch": 128, "dtype": "int8"}, "batch=32"),
        ({"devices": "2xL40S", "batch": 4, "cache": "transformers"}, "cache='grouped'"),
        ({"devices": "T4"}, "another model: falcon-7b"),
        ({"devices": "A100-40GB"}, "more devices: 3 x A100-40GB"),
        (
            {"devices": "A100-40GB"},
            "fk.load(..., offload='cpu'): 33 of 60 layers in host memory (41.8 GiB of it), copied to the GPU for each "
            "token",
        ),
        (
            {"devices": "colab-a100"},
            "fk.load(..., offload='cpu'): 33 of 60 layers in host memory, copied to the GPU for each token",
        ),
        ({"devices": "colab-t4", "dtype": "nf4"}, "another machine: colab-a100, 1 x A100-40GB"),
        ({"devices": "ml.g5.xlarge"}, "another machine: ml.g5.12xlarge, 4 x A10G"),
        ({"devices": "g2-standard-4"}, "another machine: g2-standard-48, 4 x L4"),
        ({"devices": "2xA100-80GB", "purpose": "full"}, "purpose='lora'"),
    ],
)
def test_what_would_help_is_suggested(arguments, expected):
    assert expected in fk.plan("falcon-40b", **arguments).suggestions


HOST = Device("host memory", "cpu", 20 * GIB, offload_target=True)


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({"devices": "2xA100-40GB", "batch": 16, "dtype": "bfloat16"}, "dtype='int8'"),
        ({"devices": "2xL40S", "batch": 4, "cache": "transformers"}, "cache='grouped'"),
        ({"devices": "A100-80GB", "cache": "transformers"}, "another model: falcon-rw-7b"),
        ({"devices": [Device("gpu", 0, 40 * GIB), HOST]}, "another model: falcon-rw-7b"),
        ({"devices": "8xA100-80GB", "purpose": "full", "dtype": "float32"}, "dtype='bfloat16'"),
        ({"devices": "2xA100-80GB", "purpose": "full", "dtype": "bfloat16"}, "purpose='lora'"),
        ({"devices": "A100-40GB", "purpose": "lora", "dtype": "bfloat16"}, "dtype='nf4'"),
        ({"devices": "2xA100-40GB", "tensor_parallel": 2}, "tensor_parallel=4 on 4 x A100-40GB"),
    ],
)
def test_each_change_that_is_suggested_makes_it_fit_by_itself(given, first):
    suggestions = fk.plan("falcon-40b", **given).suggestions
    assert suggestions[0] == first
    for change in suggestions:
        changes = {name: value for name, value in change.changes.items() if name != "offload"}
        assert not changes or fk.plan(**{"name": "falcon-40b"} | given | changes).fits
        assert ("offload" in change.changes) == ("offload='cpu'" in change)
        assert changes.get("name") == (change.split(": ")[1] if change.startswith("another model") else None)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantised_layers_are_not_suggested_for_host_memory(dtype):
    """`fk.load` refuses it: they compute where their weights are."""
    suggestions = fk.plan("falcon-40b", dtype, devices="T4").suggestions
    assert suggestions
    assert not any("offload" in each for each in suggestions)


def test_no_larger_model_is_suggested_even_if_its_cache_is_smaller():
    given = {"batch": 64, "devices": "A100-40GB"}
    assert fk.plan("falcon-7b", **given).fits
    suggestions = fk.plan("falcon-rw-1b", **given).suggestions
    assert suggestions
    assert not any(each.startswith("another model") for each in suggestions)


@example(sizes=[1, 1, 24])
@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_where_the_later_gpus_fit_the_model_without_the_first_they_are_suggested(sizes):
    devices = [Device("gpu", key, size * GIB) for key, size in enumerate(sizes)]
    plan = fk.plan("falcon-7b", devices=devices)
    alone = [first for first in range(1, len(sizes)) if fk.plan("falcon-7b", devices=devices[first:]).fits]
    expected = [{key: f"{sizes[key]}GiB" for key in range(first, len(sizes))} for first in alone[: not plan.fits]]
    assert [each.changes["max_memory"] for each in plan.suggestions if "max_memory" in each.changes] == expected


def test_only_what_can_train_is_suggested_for_training():
    suggestions = fk.plan("falcon-40b", "bfloat16", purpose="lora", devices="A100-40GB").suggestions
    assert "purpose='qlora', dtype='nf4-double'" in suggestions
    assert not any("fk.connect" in each or "offload" in each for each in suggestions)


@pytest.mark.parametrize(
    ("device", "purpose", "advice"),
    [
        (Device("cpu", "cpu", 30 * GIB), "inference", "dtype='int4'"),
        (Device("gpu", 0, 30 * GIB), "inference", "dtype='nf4'"),
        (Device("cpu", "cpu", 40 * GIB), "lora", "dtype='nf4'"),
    ],
)
def test_four_bits_on_a_cpu_are_those_with_a_fast_kernel_unless_they_are_trained_on(device, purpose, advice):
    assert fk.plan("falcon-40b", devices=[device], purpose=purpose).suggestions[0] == advice


@pytest.mark.parametrize("machine", MACHINES)
def test_no_machine_is_told_to_offload_more_than_its_host_memory(machine):
    plan = fk.plan("falcon-40b", devices=machine)
    host = plan.devices[0].host_bytes
    for change in plan.suggestions:
        if host is not None and (offloaded := re.match(r"fk.load\(..., offload='cpu'\): (\d+) of", change)):
            assert int(offloaded[1]) * memory.layer_bytes(plan.spec, "bfloat16") < host
    if machine == "colab-t4":
        assert not any("offload" in each for each in plan.suggestions)


@pytest.mark.parametrize("machine", ["colab-t4", "ml.g5.xlarge", "g2-standard-4", "Standard_NC24ads_A100_v4"])
def test_the_machine_that_is_suggested_does_fit(machine):
    changes = fk.plan("falcon-40b", devices=machine).suggestions
    named = [each.split(": ")[1].split(",")[0] for each in changes if each.startswith("another machine")]
    assert all(fk.plan("falcon-40b", devices=each).fits for each in named)
    assert named or machine == "colab-t4"


def test_a_plan_that_fits_suggests_nothing():
    assert fk.plan("falconet").suggestions == ()


# Measured


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process had at its highest")
@pytest.mark.parametrize(("dtype", "context", "batch"), [("float32", 1024, 1), ("bfloat16", 512, 8)])
def test_the_peak_memory_of_a_process_is_as_planned(tmp_path, dtype, context, batch):
    """Resident memory at its highest, Python and the libraries included: the least of three processes.

    What else the machine does only adds to it: up to 13% were seen on a busy one.
    """
    config = FalconConfig(
        **{**fk.spec("falconet").to_config(), "hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 4096}
    )
    config.save_pretrained(tmp_path)
    program = f"""
import re, torch
from pathlib import Path
from transformers import FalconConfig
from falcon_kit.model.modeling import FalconForCausalLM
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
with torch.inference_mode():
    torch.set_default_dtype(torch.{dtype})
    model = FalconForCausalLM(FalconConfig.from_pretrained({str(tmp_path)!r})).eval()
    model(torch.zeros({batch}, {context}, dtype=torch.long), logits_to_keep=1)
    print(peak())
"""
    command = [sys.executable, "-c", program]
    peaks = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    plan = fk.plan(tmp_path, dtype, context=context, batch=batch, devices=[Device("cpu", "cpu", 4 * GIB)])
    assert plan.total_bytes == pytest.approx(min(peaks), rel=0.1)


# From where


def test_a_plan_is_made_from_a_directory_or_a_config():
    directory = embedded_directory("falconet")
    expected = fk.plan("falconet").rows
    assert fk.plan(directory).rows == fk.plan(directory / "config.json").rows == expected


def test_a_torch_dtype_is_as_good_as_its_name():
    assert fk.plan("falconet", torch.float32, devices="T4") == fk.plan("falconet", "float32", devices="T4")


# How it shows itself


def test_the_repr_says_what_is_needed_and_whether_it_fits():
    assert repr(fk.plan("falcon-40b", devices="T4")) == (
        "Plan(falcon-40b in bfloat16, 1 x 2048 tokens, needs 78.1 GiB: it does not fit into T4 14.6 GiB)"
    )


def test_equal_devices_are_counted_once_in_words_with_the_memory_of_each():
    assert "into 4 x gpu (40.0 GiB each))" in repr(
        fk.plan("falcon-40b", devices=[Device("gpu", key, 40 * GIB) for key in range(4)])
    )


def test_a_table_has_one_unit():
    html = fk.plan("falcon-40b", devices="ml.g5.12xlarge")._repr_html_()
    assert set(re.findall(r"<td[^>]*>[<\d.&lt; ]+ ([KMGT]?i?B)</td>", html)) == {"GiB"}


def test_the_parts_are_a_data_frame():
    found = fk.plan("falcon-7b", devices="2xT4")
    frame = found.to_dataframe()
    assert list(frame.columns) == ["part", "device", "bytes", "reason"]
    assert (len(frame), frame["bytes"].sum()) == (len(found.rows), found.total_bytes)


def test_the_html_escapes_what_it_shows():
    page = fk.plan("falconet", devices=[Device("<img>", 0, GIB)])._repr_html_()
    assert ("<img" in page, "&lt;img&gt;" in page) == (False, True)


def test_the_picture_shows_itself_in_a_notebook():
    planned = fk.plan("falconet", devices="T4")
    assert planned.plot()._repr_png_().startswith(b"\x89PNG")
    assert planned.figure()._repr_png_() == planned.plot()._repr_png_()


def test_the_picture_has_a_bar_for_every_device():
    figure = fk.plan("falcon-40b", devices="4x40GiB").plot()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("devices", ["4xA100-40GB", "A100-80GB"])
def test_the_verdict_above_the_picture_is_not_cut_off(devices):
    figure = fk.plan("falcon-40b-instruct", devices=devices).plot()
    figure.draw_without_rendering()
    text = figure.axes[0].title.get_window_extent()
    assert figure.bbox.x0 <= text.x0 < text.x1 <= figure.bbox.x1


def test_what_has_no_memory_at_all_does_not_fit():
    assert not fk.plan("falcon-7b", devices=[Device("full", 0, 0), Device("full", 1, 0)]).fits


def test_the_error_carries_the_plan_and_its_suggestions():
    plan = fk.plan("falcon-40b", devices="T4")
    error = fk.NotEnoughMemory(plan)
    assert error.plan is plan
    assert all(each in str(error) for each in (plan.verdict(), *plan.suggestions))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bf16"}, "dtype 'bf16' is not known: did you mean 'bfloat16'? Known: float32"),
        ({"dtype": "4bit"}, "did you mean 'nf4'?"),
        ({"dtype": "INT8"}, "dtype 'INT8' is not known: did you mean 'int8'? Known: float32"),
        ({"dtype": "half"}, "did you mean 'float16'?"),
        ({"dtype": 4}, "dtype 4 is not known: did you mean 'int4'?"),
        ({"dtype": "bf17"}, "nf4-double, auto."),
        ({"purpose": "merge"}, "Unknown purpose 'merge'. Known: inference, lora, qlora, full."),
        ({"purpose": "training"}, "Unknown purpose 'training'"),
        ({"cache": "static"}, "Unknown cache 'static'. Known: grouped, transformers."),
        ({"context": 4096}, "context=4096 must be from 1 to 2048, the context of falcon-40b"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"r": 0}, "r=0: the rank of LoRA must be at least 1"),
    ],
)
def test_words_and_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.plan("falcon-40b", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 8}, "plan has no argument rank: LoRA's rank is called r, as in PEFT's LoraConfig"),
        ({"bach": 2}, "plan has no argument bach: did you mean batch?"),
        ({"device": "L4"}, "plan has no argument device: did you mean devices?"),
        ({"offload": "cpu"}, "plan has no argument offload: it is one of fk.load"),
        ({"gpu": "L4"}, "plan has no argument gpu: give devices, such as '2xA100-80GB' or 'ml.g5.12xlarge'"),
        ({"load_in_8bit": True}, "plan has no argument load_in_8bit: give dtype='int8'"),
        ({"seq_len": 512}, "plan has no argument seq_len: give context"),
        ({"colour": 1}, "plan has no argument colour"),
        ({"unknwn": 1}, "plan has no argument unknwn"),
    ],
)
def test_an_unknown_argument_is_refused_and_an_old_name_with_the_new_one(arguments, message):
    with pytest.raises(TypeError) as error:
        fk.plan("falcon-40b", **arguments)
    assert str(error.value) == message


def test_lora_takes_memory_by_its_rank():
    small, large = (fk.plan("falcon-40b", purpose="qlora", devices="A100-80GB", r=r) for r in (1, 64))
    sizes = [sum(row.bytes for row in plan.rows if row.part == "LoRA") for plan in (small, large)]
    assert sizes == [16 * memory.lora_parameters(small.spec, r) for r in (1, 64)]


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(LookupError, match="Nearest: falcon-40b"):
        fk.plan("falcon-40")
