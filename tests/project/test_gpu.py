"""On a GPU the public functions give what they give on a CPU, weights in 8 and 4 bits do, and the notebooks run.

The GPU is used in a process of its own, because all other tests are made for a CPU (tests/conftest.py).
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import falcon_kit as fk
from tests.conftest import LAYOUTS, small_model
from tests.project.cases import (
    CASES,
    RANDOM,
    Places,
    export_gguf,
    loss,
    merge,
    merge_and_save,
    notebook_04,
    serve,
    tune,
    value,
)
from tests.project.notebook_memory import cells, shorten

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("0*.ipynb"))
"""All but 10_serving, whose servers are programs of others."""
TOLERANCE = {tune: 1e-3}
"""Relative to the largest value; for all others 1e-4. The weights of a run differ as the gradients' last digits do."""


def whole(spec):
    return 0


def offloaded(spec):
    """Three of five layers on the GPU, two in the host's memory."""
    parts = ("transformer.word_embeddings", "transformer.rotary_emb", "transformer.ln_f", "lm_head")
    layers = {f"transformer.h.{index}": 0 if index < 3 else "cpu" for index in range(spec.layers)}
    return dict.fromkeys(parts, 0) | layers


PLACES = {"7b": whole, "40b": whole, "rw": whole, "40b, offloaded": offloaded}
REFUSED = {("rw", export_gguf), ("rw", notebook_04)}
"""What a layout does not have on a CPU either: llama.cpp has no ALiBi, the notebook needs a tied head."""
REFUSES_OFFLOADED = {
    tune: "cannot be trained",
    merge: "nothing can be added to it",
    merge_and_save: "nothing can be added to it",
    export_gguf: "some weights are offloaded",
    serve: "some weights are offloaded",
}
"""What refuses a model whose layers are offloaded, and its words."""
NOT_OFFLOADED = {*REFUSES_OFFLOADED, loss, notebook_04}
"""These, and the cases that use the weights of each layer themselves."""


# In the process with the GPU


def start():
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(1)


@cache
def places_of(name):
    return Places(name.split(",")[0], PLACES[name])


def both(name, case):
    """The values of a case on the CPU and on the GPU; a random one twice on the GPU, which draws other numbers."""
    places, case = places_of(name), CASES[case]
    falcons = (places.elsewhere if case in RANDOM else places.one, places.elsewhere)
    return [value(case, falcon, places) for falcon in falcons]


def quantised(layout, dtype, folder):
    """The logits of a model in 8 or 4 bits on the CPU and on the GPU, and of the one that was saved from the GPU."""
    small_model(layout).save_pretrained(folder / "base")
    fk.load("falconet").tokenizer.save_pretrained(folder / "base")
    gpu = fk.load(folder / "base", dtype=dtype, device_map=0)
    gpu.model.save_pretrained(folder / "saved")
    gpu.tokenizer.save_pretrained(folder / "saved")
    models = [fk.load(folder / "base", dtype=dtype, device_map="cpu"), gpu, fk.load(folder / "saved", device_map=0)]
    ids = torch.arange(12, 52)[None]
    with torch.inference_mode():
        return [each.model(ids.to(each.model.device)).logits.float().cpu().numpy() for each in models]


def compiled(layout, folder):
    """The tokens of texts that are generated with and without torch.compile."""
    small_model(layout).save_pretrained(folder)
    fk.load("falconet").tokenizer.save_pretrained(folder)
    texts = []
    for compile in (False, True):
        falcon = fk.load(folder, dtype="float32", compile=compile, device_map=0)
        streamed = falcon.stream("The giraffe", max_new_tokens=20, suppress_tokens=[11])
        settings = {"max_new_tokens": 20, "suppress_tokens": [11]}
        texts.append(
            [
                [piece.token_id for piece in streamed],
                [each.tokens for each in falcon.generate(["The giraffe eats", "A"], **settings)],
            ]
        )
    return texts


def ran(notebook, folder):
    """The devices of the models that a notebook loaded, with short runs of tuning."""
    os.chdir(folder)
    shorten()
    torch.set_grad_enabled(True)
    load, found = fk.load, set()

    def watched(*arguments, **options):
        falcon = load(*arguments, **options)
        found.update(str(each.device) for each in getattr(falcon, "model", torch.nn.Module()).parameters())
        return falcon

    fk.load = watched
    try:
        for _, run in cells(notebook):
            run()
    finally:
        fk.load = load
        os.chdir("/")
    return found


@pytest.fixture(scope="module")
def process():
    """Runs a function of this file in the process with the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FALCON_KIT_TESTS_SEE_GPUS", "1")
        patch.delenv("CUDA_VISIBLE_DEVICES")
        if (hidden := os.environ["FALCON_KIT_HIDDEN_GPUS"]) != "all":
            patch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start) as pool:
            if not pool.submit(torch.cuda.is_available).result():
                pytest.skip("without a GPU")
            yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in PLACES for case in CASES if name in LAYOUTS or case not in NOT_OFFLOADED],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_gpu_gives_what_a_cpu_gives(name, case, process):
    one, gpu = process(both, name, CASES.index(case))
    assert isinstance(one, str) == ((name, case) in REFUSED), one
    if isinstance(one, str) or one.dtype.kind not in "fc":
        assert np.array_equal(one, gpu)
    else:
        np.testing.assert_allclose(gpu, one, rtol=1e-4, atol=TOLERANCE.get(case, 1e-4) * np.abs(one).max())


@pytest.mark.parametrize("case", REFUSES_OFFLOADED, ids=lambda each: each.__name__)
def test_what_needs_all_weights_refuses_offloaded_ones(case, process):
    assert REFUSES_OFFLOADED[case] in str(process(both, "40b, offloaded", CASES.index(case))[1])


@pytest.mark.parametrize("dtype", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("name", ["7b", "40b", "rw"])
def test_weights_in_8_and_4_bits_give_what_they_give_on_a_cpu(name, dtype, process, tmp_path):
    cpu, gpu, saved = process(quantised, name, dtype, tmp_path)
    assert np.linalg.norm(gpu - cpu) < 0.05 * np.linalg.norm(cpu)
    assert np.array_equal(saved, gpu)


@pytest.mark.parametrize("name", ["7b", "40b"])
def test_compiled_decoding_gives_the_same_tokens(name, process, tmp_path):
    eager, found = process(compiled, name, tmp_path)
    assert found == eager


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda each: each.stem)
def test_a_notebook_runs_on_a_gpu(notebook, process, tmp_path):
    assert "cuda:0" in process(ran, notebook, tmp_path)
