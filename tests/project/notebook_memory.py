"""Runs the code cells of a notebook on a checkpoint, and reports the peak memory of the process and the files it left.

    python -m tests.project.notebook_memory NOTEBOOK CHECKPOINT

`checkpoint` writes a Falcon whose weights are much larger than anything else that a notebook holds. It ends every text
at once. Training is cut to one step and Falconet's corpus to four documents, and torchrun starts nothing: none of this
changes how many copies of the weights this process holds. The last line printed is a JSON object with both figures in
multiples of the weights, and the cell of the peak. `MALLOC` has variables of the environment with which the C library
returns freed memory at once.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTS = ("falcon_kit.tuning.tune", "bitsandbytes", "datasets", "matplotlib.pyplot", "pandas", "peft", "transformers")
"""Imported before the first measurement, because notebooks import them."""


MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def checkpoint(directory: Path) -> Path:
    """A Falcon of the 40B layout with 52 million parameters in float32, and Falconet's tokenizer."""
    import torch
    from transformers import FalconForCausalLM

    import falcon_kit as fk
    from tests.conftest import small_config

    model = FalconForCausalLM(small_config("40b", hidden_size=1024, num_hidden_layers=4, num_attention_heads=16)).eval()
    ln_f, end = model.transformer.ln_f, model.get_input_embeddings().weight[11]
    with torch.no_grad():  # so that the end-of-sequence token has the highest logit after every text
        ln_f.weight.fill_(0.01)
        ln_f.bias.copy_(1000 * end)
    model.save_pretrained(directory)
    fk.load("falconet").tokenizer.save_pretrained(directory)
    return directory


def resident() -> int:
    """Bytes of this process in memory, without files that are only mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def stored(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


@contextmanager
def peak() -> Iterator[list[int]]:
    """The highest resident memory within the block, sampled a hundred times a second."""
    highest, done = [resident()], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def shorten() -> None:
    """Replaces the settings of every run of `fk.tune` by a single short step, and the corpus by four documents."""
    from falcon_kit.falconet import corpus
    from falcon_kit.tuning.settings import Tuning

    documents = corpus.documents
    corpus.documents = lambda kind, count, seed: documents(kind, min(count, 4), seed)

    with_defaults = Tuning.for_model
    short = {"max_steps": 1, "answers": 1, "context": 64, "per_device_train_batch_size": 1}

    def for_model(self: Tuning, spec: Any) -> Tuning:
        for name, value in short.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        return with_defaults(self, spec)

    Tuning.for_model = for_model  # type: ignore[method-assign]


def without_torchrun() -> None:
    """Replaces torchrun, whose processes are not measured, by a program that prints nothing."""
    run = subprocess.run

    def other(command: list[Any], **options: Any) -> subprocess.CompletedProcess[Any]:
        if "torch.distributed.run" in command:
            return subprocess.CompletedProcess(command, 0, "", "")
        return run(command, **options)

    subprocess.run = other  # type: ignore[assignment]


def is_mapped(model: Path) -> bool:
    """Whether a loaded model reads its weights from the mapped checkpoint, and so holds no copy of its own."""
    return str(model) in Path("/proc/self/maps").read_text()


def cells(notebook: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The source of each code cell of a notebook, and a function that runs it in a fresh IPython shell."""
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance(colors="NoColor")
    shell.reset()
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            yield cell.source, lambda source=cell.source: shell.run_cell(source).raise_error()


def measure(notebook: Path, model: Path) -> dict[str, Any]:
    """The peak over all cells and the largest amount of files, as multiples of the weights."""
    found: dict[str, Any] = {"memory": 0.0, "cell": "", "files": 0.0}
    before, weights = resident(), stored(model)
    for source, run in cells(notebook):
        with peak() as highest:
            run()
        copies = (highest[0] - before) / weights + is_mapped(model)
        if copies > found["memory"]:
            found |= {"memory": copies, "cell": source}
        found["files"] = max(found["files"], stored(Path.cwd()) / weights)
    return found


def main() -> None:
    """Command line."""
    notebook, model = (Path(each).resolve() for each in sys.argv[1:])
    for name in IMPORTS:
        import_module(name)
    shorten()
    without_torchrun()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FALCON_KIT_MODEL": str(model), "TMPDIR": folder}
        tempfile.tempdir = folder
        os.chdir(folder)
        sys.stdout.write(f"\n{json.dumps(measure(notebook, model))}\n")
        os.chdir("/")


if __name__ == "__main__":
    main()
