"""While `fk.tune` trains a model, other threads get an error and no wrong texts; the thread that trains may use it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import falcon_kit as fk
from falcon_kit.tuning.trainer import AdapterTrainer
from tests.tuning.small_runs import QUICK, ROWS

TEXT = "The giraffe eats"
USES = {
    "generate": lambda falcon, _: falcon.generate(TEXT, max_new_tokens=2),
    "stream": lambda falcon, _: list(falcon.stream(TEXT, max_new_tokens=2)),
    "chat": lambda falcon, _: falcon.chat([{"role": "user", "content": TEXT}], max_new_tokens=2),
    "attention": lambda falcon, _: fk.attention(falcon, TEXT),
    "lens": lambda falcon, _: fk.lens(falcon, TEXT),
    "attribute": lambda falcon, _: fk.attribute(falcon, TEXT, steps=2),
    "ablate": lambda falcon, _: fk.ablate(falcon, TEXT, [(0, 0)]),
    "explain": lambda falcon, folder: fk.explain(falcon, TEXT).to_html(folder.with_suffix(".html")),
    "evaluate": lambda falcon, _: fk.evaluate(falcon, text=TEXT),
    "save": lambda falcon, folder: falcon.save(folder),
    "merge": lambda falcon, folder: fk.merge(folder, falcon),
    "export_gguf": lambda falcon, folder: fk.export_gguf(falcon, folder.with_suffix(".gguf")),
    "tune": lambda falcon, folder: fk.tune(falcon, ROWS, output_dir=folder, quiet=True, **QUICK),
}


@pytest.fixture
def falcon():
    return fk.load("falconet", dtype="float32")


def while_it_trains(monkeypatch, falcon, folder, call):
    """Trains the Falcon and returns what `call` returns at the beginning of that."""
    train, found = AdapterTrainer.train_or_resume, []
    monkeypatch.setattr(AdapterTrainer, "train_or_resume", lambda trainer: (found.append(call()), train(trainer)))
    fk.tune(falcon, ROWS, output_dir=folder, quiet=True, **QUICK)
    return found[0]


def test_another_thread_cannot_use_a_model_that_is_trained(monkeypatch, falcon, tmp_path):
    def call():
        with ThreadPoolExecutor(1) as thread:
            return {name: thread.submit(use, falcon, tmp_path / name).exception() for name, use in USES.items()}

    errors = while_it_trains(monkeypatch, falcon, tmp_path / "run", call)
    for name, error in errors.items():
        assert isinstance(error, RuntimeError), (name, error)
        assert str(error).startswith("fk.tune is training this model in another thread"), name
    assert falcon.generate(TEXT, max_new_tokens=2).text == fk.load("falconet").generate(TEXT, max_new_tokens=2).text


INSPECTIONS = ("attention", "lens", "attribute", "ablate", "explain", "evaluate")
UNDER_WAY = {
    **{name: USES[name] for name in INSPECTIONS},
    "beam search": lambda falcon, _: falcon.generate(TEXT, max_new_tokens=2, num_beams=2),
}


@pytest.mark.parametrize("name", UNDER_WAY)
def test_what_is_under_way_when_another_thread_trains_ends_with_the_error(falcon, tmp_path, name):
    def train(*_):
        hook.remove()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(fk.tune, falcon, ROWS, output_dir=tmp_path / "run", quiet=True, **QUICK).result()

    hook = falcon.model.transformer.h[1].register_forward_hook(train)
    with pytest.raises(RuntimeError, match=r"fk\.tune has begun to train this model in another thread meanwhile, so"):
        UNDER_WAY[name](falcon, tmp_path / "uses")
    falcon.generate(TEXT, max_new_tokens=2)


def test_a_stream_that_was_begun_before_ends_with_the_error_and_keeps_its_text(monkeypatch, falcon, tmp_path):
    stream = falcon.stream(TEXT, max_new_tokens=20)
    first = next(stream)

    def call():
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(list, stream).exception()

    assert "fk.tune is training this model" in str(while_it_trains(monkeypatch, falcon, tmp_path / "run", call))
    assert stream.generation.text.startswith(first.text)


def test_the_thread_that_trains_may_use_the_model(monkeypatch, falcon, tmp_path):
    text = while_it_trains(monkeypatch, falcon, tmp_path / "run", lambda: falcon.generate(TEXT, max_new_tokens=2).text)
    assert text
