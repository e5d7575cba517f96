"""Coverage-guided fuzzing of the readers by atheris (libFuzzer), one process a reader. An extra tool: no test needs it.

python -m benchmarks._fuzz READER SECONDS CORPUS      fuzzes one reader and keeps what reached new code in CORPUS
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

READERS = {
    "documents in lines": "rows.jsonl",
    "documents in an array": "rows.json",
    "documents in a table": "rows.csv",
    "documents as text": "rows.txt",
    "session": "session.json",
    "config": "config.json",
    "shards": "model.safetensors.index.json",
    "adapter's config": "adapter_config.json",
    "adapter's weights": "adapter_model.safetensors",
}
"""The file that each reader is given."""


def fuzzed(name: str, seconds: int) -> dict[str, Any]:
    """Runs of one reader in a new process, inputs that reached new code, and the first finding if there is one."""
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, "-m", "benchmarks._fuzz", name, str(seconds), corpus]
        ended = subprocess.run(command, cwd=corpus, capture_output=True, text=True, check=False, env=_environment())
        kept = len(list(Path(corpus).iterdir()))
    runs = re.findall(r"^#(\d+)", ended.stderr, re.MULTILINE)
    finding = "" if ended.returncode == 0 else ended.stderr[-2000:]
    return {"runs": int(runs[-1]) if runs else 0, "corpus": kept, "finding": finding}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def is_installed() -> bool:
    """Whether atheris is there."""
    return importlib.util.find_spec("atheris") is not None


def main() -> None:
    """Command line."""
    import atheris

    name, seconds, corpus = sys.argv[1:]
    with atheris.instrument_imports(include=["falcon_kit"]):
        import falcon_kit as fk
        from falcon_kit.catalogue.names import spec
        from falcon_kit.loading import adapter_checks, adapters, checkpoints
        from falcon_kit.playground import files
    from benchmarks._hostile import READERS as HOSTILE

    file = Path(tempfile.mkdtemp(), READERS[name])
    next(each for each in HOSTILE.values() if file.name in each.hostile).write(file.parent)
    shutil.copy(file, corpus)  # the seed is a good file
    read = {
        "session.json": lambda: files.load(file),
        "config.json": lambda: (spec(file.parent), checkpoints.find(str(file.parent), {})),
        "model.safetensors.index.json": lambda: checkpoints._shards(file),
        "adapter_config.json": lambda: adapters.Adapter(file.parent).config,
        "adapter_model.safetensors": lambda: adapter_checks.check_contents(adapters.Adapter(file.parent)),
    }.get(file.name, lambda: fk.dialogues(file))
    read()

    def run(content: bytes) -> None:
        file.write_bytes(content)
        try:
            read()
        except Exception as error:
            if type(error) not in (ValueError, FileNotFoundError, LookupError) or file.parent.name not in str(error):
                raise

    warnings.simplefilter("ignore")
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4000", corpus], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
