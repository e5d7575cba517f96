"""For all tests: no network, the embedded model, reproducible examples, and the marker of slow tests."""

import gc
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch
    from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerBase

    from falcon_kit import Falcon

# Before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# The user's model, rows and account must not affect the tests and the notebooks that run with them.
for _name in ("FALCON_KIT_MODEL", "FALCON_KIT_SOURCE", "FALCON_KIT_DATA", "FALCON_KIT_AWS"):
    os.environ.pop(_name, None)

# The tests are made for a CPU. tests/project/test_gpu.py shows the GPUs again, to a process of its own.
if "FALCON_KIT_TESTS_SEE_GPUS" not in os.environ:
    os.environ.setdefault("FALCON_KIT_HIDDEN_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell that starts the tests in the background makes them ignore SIGINT, but some tests are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No property is about time, and machines can be busy: no deadlines, no check for slow inputs.
settings.register_profile(
    "falcon-kit",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=50,
    derandomize="CI" in os.environ,
)
settings.load_profile("falcon-kit")


SLOW = {*Path(__file__).with_name("slow.txt").read_text().split()}
"""What `make quick` leaves out: test functions of over 0.3 s a case or 0.8 s in all, and files with slow fixtures."""


LONGEST = """
test_notebook_memory.py test_notebook_devices.py test_benchmarks.py test_notebooks.py test_serve.py test_tune.py
test_checkpoint_files.py test_distributed.py test_nodes.py test_launching.py test_playground.py test_limits.py
""".split()
"""The files that take longest. Workers begin with them and with the notebooks, to end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and marks the slow tests: those of `SLOW`, and all tests in a browser."""
    items.sort(key=lambda item: item.path.name not in LONGEST and item.path.suffix == ".py")
    for item in items:
        if {getattr(item, "originalname", None), item.path.name} & SLOW or item.path.parent.name == "browser":
            item.add_marker(pytest.mark.slow)


SKIPPED_IN_CI = (
    "FALCON_TOKENIZER",
    "refuses system messages",
    "without a GPU",
    "no AVX-512",
    "no disk of a limited size",
)
"""Parts of the reasons for which a test may be skipped in CI. What all other tests need is installed there."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a test that is skipped for another reason fails, so that no group of tests stops running in silence."""
    report = yield
    if "CI" in os.environ and report.skipped and not any(each in str(report.longrepr) for each in SKIPPED_IN_CI):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr}"
    return report


def pytest_collection_finish() -> None:
    """Leaves modules and collected tests out of every later collection of garbage, which would take 0.6 s."""
    gc.collect()
    gc.freeze()


LAYOUTS = {
    "7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    # like the 40B, but with an odd number of query heads per KV head (29 in the 180B)
    "180b": {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_size": 384, "num_attention_heads": 6},
    "rw": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
}
"""The published layouts, as arguments of FalconConfig; `small_config` adds the sizes."""


def small_config(layout: str, **changes: Any) -> "FalconConfig":
    """A Falcon of two layers and four query heads in one of the published layouts, with Falconet's vocabulary."""
    from transformers import FalconConfig

    sizes = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconConfig(**sizes | {"bos_token_id": 11, "eos_token_id": 11} | LAYOUTS[layout] | changes)


def small_model(layout: str, **changes: Any) -> "FalconForCausalLM":
    """A model of `small_config` with the same random weights at every call, large enough that all tokens differ."""
    import torch
    from transformers import FalconForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FalconForCausalLM(small_config(layout, initializer_range=0.1, **changes)).eval()


def simulated_gpus(monkeypatch: pytest.MonkeyPatch, free: list[int]) -> list[int]:
    """Makes torch report GPUs with these free bytes; returns the list of those whose memory is read from then on."""
    import torch

    asked: list[int] = []

    def memory(index: int) -> tuple[int, int]:
        asked.append(index)
        return free[index], free[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    return asked


def logits(model: "FalconForCausalLM") -> "torch.Tensor":
    """The logits of a few fixed tokens."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([[23, 900, 77, 1500, 42]])).logits


def legacy(directory: Path, layout: str, tokenizer: "PreTrainedTokenizerBase") -> Path:
    """A checkpoint as published in 2023: RefinedWeb config, pickled shards with an index, and remote code."""
    import torch

    directory.mkdir()
    model = small_model(layout)
    config = {
        "model_type": "RefinedWeb" if layout == "40b" else "RefinedWebModel",
        "architectures": ["RWForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
        "vocab_size": 2048,
        "hidden_size": 256,
        "n_layer": 2,
        "n_head": 4,
        "torch_dtype": "bfloat16",
        "bos_token_id": 11,
        "eos_token_id": 11,
        **({"n_head_kv": 2, "parallel_attn": True} if layout == "40b" else {}),
        **({"multi_query": True, "parallel_attn": True, "bias": False} if layout == "7b" else {}),
        **({"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False} if layout == "rw" else {}),
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modelling_RW.py").write_text("raise SystemExit('remote code ran')")
    (directory / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    names = sorted(model.state_dict())
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, stored in shards.items():
        torch.save({name: model.state_dict()[name].clone() for name in stored}, directory / file)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, stored in shards.items() for name in stored},
    }
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Each published layout in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def instruct() -> "Falcon":
    """falconet-instruct, loaded with the defaults."""
    import falcon_kit as fk

    return fk.load("falconet-instruct")


@pytest.fixture(scope="session")
def tokenizer(instruct: "Falcon") -> "PreTrainedTokenizerBase":
    """Falconet's tokenizer."""
    return instruct.tokenizer


@pytest.fixture
def checkpoint(layout: str, tokenizer: "PreTrainedTokenizerBase", tmp_path: Path) -> Path:
    """A directory with a small model of the layout and a tokenizer, written by `save_pretrained`."""
    small_model(layout).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
