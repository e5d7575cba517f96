"""The benchmarks on small models: their figures agree with what was computed."""

import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import CompileConfig, DynamicCache

import falcon_kit as fk
from benchmarks import __main__ as command
from benchmarks import _gpu_models, _gpu_parts, _gpu_step, cpu, full_size, gpu, inspection, reliability
from benchmarks._memory import WAYS, mapped_bytes, measured
from falcon_kit import FalconSpec
from falcon_kit.catalogue.memory import linear_shapes
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.model import modeling

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(monkeypatch):
    """Of steps of a millisecond a row and argument of `generate`; `make gpu` below really decodes."""

    def decode(model, batch, context, arguments):
        return full_size.Decoding((batch + len(arguments)) / 1000, None)

    monkeypatch.setattr(full_size, "_decode", decode)
    return full_size.measure(fk.spec("falconet"), torch.device("cpu"), (1, 2), 60, CompileConfig())


def test_the_full_size_benchmark_measures_every_contestant_at_every_batch(figures):
    measured = [(row["model"], row["decoding"], row["batch"]) for row in figures["decode"]]
    expected = [
        (model, how, batch) for batch in (1, 2) for how in ("eager", "compiled") for model in ("kit", "transformers")
    ]
    assert measured == expected


def test_tokens_per_second_are_rows_over_the_time_of_a_step(figures):
    for row in figures["decode"]:
        assert row["tokens/s"] == pytest.approx(row["batch"] / row["ms per step"] * 1000, rel=0.02)


def test_both_models_of_the_full_size_benchmark_compute_the_same():
    models = full_size.pair(fk.spec("falconet"), torch.device("cpu"))
    ids = torch.arange(20, 40)[None]
    with torch.inference_mode():
        kit, stock = (model(ids).logits for model in models.values())
    torch.testing.assert_close(kit, stock, atol=0.05, rtol=0)


def test_out_of_memory_is_a_result_and_not_the_end(monkeypatch):
    model = full_size.pair(fk.spec("falconet"), torch.device("cpu"))["kit"]

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", full)
    decoding = full_size._decode(model, 1, 60, {})
    assert decoding.figures(fk.spec("falconet"), 1, 60, 1e9) == {"fits": False}


@pytest.mark.parametrize(("gigabytes", "expected"), [(141, "falcon-40b"), (24, "falcon-7b")])
def test_the_largest_falcon_that_fits_is_measured(monkeypatch, gigabytes, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, gigabytes * 1e9))
    monkeypatch.setattr(full_size, "measure", lambda shape, *_: {"shape": shape.name})
    assert full_size.run() == {"shape": expected}


def test_a_gpu_that_is_too_small_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 16e9))
    with pytest.raises(full_size.CannotRun, match="the GPU has 16 GB; the 7B needs 18 GB, the 40B 100 GB"):
        full_size.run()


# make gpu


@pytest.fixture(scope="module")
def on_a_cpu():
    """The whole of `make gpu` in a tiny form: the figures after each part."""
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True  # otherwise transformers does not compile on a CPU
    seven = FalconSpec("7b", 2, 320, 5, 1, 2048, 1280, 256, norms_per_block=1, new_decoder_architecture=False)
    forty = FalconSpec("40b", 60, 256, 4, 2, 2048, 1024, context=256)
    settings = gpu.Settings(seven, forty, torch.device("cpu"), (1, 2), 96, {"kit": options, "transformers": options})
    return list(gpu.measure(settings))


def test_every_part_of_make_gpu_runs_on_a_cpu(on_a_cpu):
    figures = on_a_cpu[-1]
    bad = {name: part for name, part in figures.items() if "failed" in part or part.get("fits") is False}
    assert bad == {}
    skipped = {name for name, part in figures.items() if "skipped" in part}
    assert all("SFTTrainer" in name for name in skipped)  # TRL is no part of the environment for tests
    assert len(figures) == len(on_a_cpu) + 1


def test_the_results_grow_with_each_part(on_a_cpu):
    assert [len(figures) for figures in on_a_cpu] == [*range(2, len(on_a_cpu) + 2)]
    assert list(on_a_cpu[-1])[:3] == ["packages", "products against float64", "logits against float64"]


def test_computation_agrees_with_float64(on_a_cpu):
    largest = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02, "rows": 0.02}
    found = on_a_cpu[-1]["logits against float64"] | on_a_cpu[-1]["products against float64"]
    assert len(found) == 18 + 8 + 1
    for name, error in found.items():
        assert name.startswith("seconds") or error < next(most for word, most in largest.items() if word in name), name


def test_both_models_of_the_seven_b_are_measured_eager_and_compiled(on_a_cpu):
    eager, compiled = (on_a_cpu[-1][f"7B, bfloat16{how}"] for how in ("", ", compiled"))
    assert list(eager["decode"]) == ["kit, batch 1", "kit, batch 2", "transformers, batch 1", "transformers, batch 2"]
    assert list(compiled["decode"]) == ["kit, batch 1", "transformers, batch 1"]
    assert list(eager["ratios"]) == ["batch 1", "batch 2"]
    assert list(compiled["ratios"]) == ["batch 1"]
    assert eager["prefill"]["kit"]["cache bytes"] == eager["prefill"]["kit"]["planned cache bytes"]


def test_every_form_of_a_steps_attention_computes_the_same(on_a_cpu):
    part = on_a_cpu[-1]["attention of a step"]
    rows = {size: forms for size, forms in part.items() if not size.startswith("seconds")}
    assert list(rows) == ["7B, batch 1", "7B, batch 2", "40B, batch 1", "40B, batch 2"]
    for forms in rows.values():
        assert len(forms) == 7
        assert all(form["error"] < 0.01 and form["microseconds"] > 0 for form in forms.values())


def test_the_products_of_a_step_are_timed_each_and_joined(on_a_cpu):
    part = on_a_cpu[-1]["products of a step"]
    own = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    by_rows, by_columns = "query_key_value and dense_h_to_4h", "dense and dense_4h_to_h"
    rows = {size: list(each) for size, each in part.items() if not size.startswith("seconds")}
    seven, forty = [*own, by_rows, by_columns], [*own, by_columns]  # two layer norms in the 40B: two inputs
    assert rows == {"7B, batch 1": seven, "7B, batch 2": seven, "40B, batch 1": forty, "40B, batch 2": forty}
    assert all(row["microseconds"] > 0 for size in rows for row in part[size].values())


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b"])
def test_projections_joined_have_the_weights_of_both(name):
    shape = fk.spec(name)
    sizes = dict(zip(_gpu_step._PROJECTIONS, linear_shapes(shape), strict=True))
    for parts, (out, into) in _gpu_step.joined(shape).items():
        assert out * into == sum(sizes[each][0] * sizes[each][1] for each in parts)


def test_the_kernels_of_a_step_and_its_gaps_are_its_time(on_a_cpu):
    part = on_a_cpu[-1]["kernels of a compiled step"]
    largest = [row["microseconds"] for row in part["largest kernels"].values()]
    assert len(largest) == 10
    assert largest == sorted(largest, reverse=True)
    total = sum(largest) + part["other kernels"]["microseconds"] + part["gaps"]["microseconds"]
    assert total == pytest.approx(1000 * part["ms per step"], abs=1)
    products = next(row for name, row in part["largest kernels"].items() if name == "aten::mm")
    assert products["calls"] == 9  # four in each of two layers, and the head


def test_a_slice_of_the_forty_b_has_as_many_layers_as_fit(on_a_cpu):
    assert 1 < on_a_cpu[-1]["slice of the 40B, bfloat16"]["layers"] < 60


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "nf4", "nf4-double"])
def test_a_model_with_random_weights_has_the_bytes_of_its_plan(dtype):
    model = _gpu_models.built(SMALL, torch.device("cpu"), modeling.FalconForCausalLM, dtype)
    assert _gpu_models.weight_bytes(model) == pytest.approx(fk.plan(SMALL, dtype).weight_bytes, rel=0.005)


def test_a_prefill_is_measured_with_one_cache_in_memory(monkeypatch):
    living, caches = [], []

    def model(ids, **options):
        living.append(sum(each() is not None for each in caches))
        cache = DynamicCache()
        caches.append(weakref.ref(cache))
        return SimpleNamespace(past_key_values=cache)

    monkeypatch.setattr(_gpu_parts, "cache_bytes", lambda _: 0)
    spec = fk.spec("falconet")
    _gpu_parts._prefill(model, spec, "bfloat16", gpu.Settings(spec, spec, torch.device("cpu"), context=8))
    assert living == [0] * 4


def test_the_speed_of_training_is_that_of_the_median_step_once_kernels_are_loaded():
    speed = _gpu_parts._speed([0.0, 9.0, 9.5, 10.0, 10.6], 100)
    assert speed == {"steps": 5, "ms per step": 500.0, "tokens/s": 200.0}


@pytest.mark.parametrize(
    ("error", "figure"),
    [
        (ImportError("no bnb"), {"skipped": f"no bnb; transformers here is {transformers.__version__}"}),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), {"fits": False, "error": "CUDA out of memory"}),
        (TypeError("another version"), {"failed": "TypeError: another version"}),
    ],
)
def test_a_part_that_cannot_run_is_a_figure_with_the_reason(error, figure):
    def part():
        raise error

    assert gpu.attempted(part) == figure


def test_an_older_transformers_is_survived_with_the_reason(monkeypatch):
    """One that lacks what the kit's model imports; the parts without the model are measured."""
    monkeypatch.setattr(gpu, "import_module", lambda _: (_ for _ in ()).throw(ModuleNotFoundError("no parallel_utils")))
    spec = fk.spec("falconet")
    *_, figures = gpu.measure(gpu.Settings(spec, spec, torch.device("cpu")))
    assert figures["7B, bfloat16"]["skipped"].startswith("no parallel_utils; transformers here is")
    assert figures["products against float64"]["int4, 1 rows"] < 0.02


def test_parts_for_which_no_time_is_left_say_so():
    spec = fk.spec("falconet")
    *_, figures = gpu.measure(gpu.Settings(spec, spec, torch.device("cpu"), seconds=-1))
    assert {tuple(part) for name, part in figures.items() if name != "packages"} == {("skipped",)}


SMALL = FalconSpec("small", layers=2, d_model=256, query_heads=4, kv_heads=2, vocabulary=2048, intermediate_size=1024)


def test_the_contestants_of_inspection_see_the_same_attention():
    inspection.check_agreement(SMALL, 40)


def test_contestants_that_differ_are_refused(monkeypatch):
    stock = inspection._stock
    monkeypatch.setattr(inspection, "_stock", lambda model, ids: stock(model, ids.flip(-1)))
    with pytest.raises(AssertionError, match="not close"):
        inspection.check_agreement(SMALL, 40)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak memory of a process")
def test_the_memory_of_a_contestant_is_its_peak():
    def turn():
        first = torch.ones(2**24)  # 64 MiB
        return first * 2  # another 64 MiB

    assert inspection.measure_memory(turn) == pytest.approx(128, abs=4)


def test_the_picture_of_inspection_leaves_out_what_did_not_fit():
    rows = [
        {"tokens": length, "peak MiB": {"kit": 10.0, "bertviz": None}, "seconds": {"kit": 1.0}}
        for length in (256, 1024)
    ]
    for axes in inspection.draw({"model": "small", "lengths": rows}).axes:
        assert [line.get_label() for line in axes.lines] == ["kit"]


def test_the_benchmark_of_cpus_leaves_out_the_peers_that_were_not_measured():
    ms = {"kit bfloat16": 20.0, "kit int8": 10.0, "kit int4": 8.0, "kit float32": 40.0, "transformers bfloat16": 50.0}
    works = {"one step of 1 x 512": ms, "prefill of 512": ms}
    ratios = {pair: each["prefill of 512"] for pair, each in cpu._ratios({"ms": works}).items()}
    assert ratios.pop("kit bfloat16 / transformers bfloat16") == 0.4
    assert ratios == {f"kit {one} / kit bfloat16": each for one, each in [("float32", 2), ("int8", 0.5), ("int4", 0.4)]}


def test_a_benchmark_that_cannot_run_says_why_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "full_size"])
    with pytest.raises(SystemExit, match=r"^1$"):
        command.main()
    assert "full_size cannot run here: torch finds no GPU" in capsys.readouterr().err


def test_the_table_of_reliability_is_that_of_the_last_run_in_which_nothing_failed():
    figures = json.loads(reliability.RESULTS.read_text())["figures"]
    assert figures["faults"] == 0
    assert reliability.table(figures) in (ROOT / "ARCHITECTURE.md").read_text()


def test_a_fault_anywhere_is_counted():
    figures = {"writers": {"a": {"kills": 1, "faults": ["x"]}}, "threads": {"faults": ["y", "z"]}, "fuzzing": {}}
    assert sum(map(len, reliability._faults(figures))) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the memory of a process")
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_measured_in_a_process_of_its_own(way):
    figures = measured(way, embedded_directory("falconet"), dtype="float32", context=64, batch=2)
    spec = fk.spec("falconet")
    copies = 1 if way == "kit" else spec.queries_per_kv_head
    assert figures["weights"] == 4 * spec.parameters
    assert figures["cache"] == spec.kv_bytes_per_token(4) * 64 * 2 * copies
    assert figures["peak"] >= figures["before"] + figures["weights"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports mapped memory")
def test_weights_that_stay_in_their_file_are_counted_as_mapped():
    stored, other = (fk.load("falconet", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert mapped_bytes(stored.model.parameters()) == stored.weight_bytes
    assert mapped_bytes(other.model.parameters()) == 0


def test_a_measurement_that_fails_says_why(monkeypatch, tmp_path):
    ended = subprocess.CompletedProcess([], 1, "", "OSError: no config.json")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RuntimeError, match=r"config\.json"):
        measured("kit", tmp_path)
