"""How often the kit was attacked, and what that cost: kills, full disks, hostile files, threads, streams, fuzzing.

The fuzzing is left out where atheris is not installed. `python -m benchmarks.reliability` writes the table of
ARCHITECTURE.md from the figures that were written last.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import falcon_kit as fk
from benchmarks import CannotRun, _fuzz, _hostile, _threads
from falcon_kit.display.saving import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/reliability.json"
KILLS, WRITES, ROUNDS, CYCLES, FUZZ_SECONDS = 100, 20, 100, 1000, 20
INPUTS = {"dialogues": 200, "session": 200}
OTHER_INPUTS = 60
ROW = re.compile(r"^\| (?:Promise|---|[A-Z]).*\|\n", re.MULTILINE)


def run() -> dict[str, Any]:
    """The counts and the faults of each attack; `faults` counts them all."""
    if sys.platform != "linux":
        raise CannotRun("the attacks use calls of Linux")
    figures = {
        "writers": _writers(),
        "hostile files": _hostile_files(),
        "threads": _on_one_model(),
        "fuzzing": _fuzzing(),
    }
    return {"faults": sum(len(faults) for faults in _faults(figures)), **figures}


def _writers() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks._writers", "0", str(KILLS), str(WRITES)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"the attacks on the writers failed: {ended.stderr[-2000:]}")
    counts: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return counts


def _hostile_files() -> dict[str, Any]:
    counts = {}
    for name in _hostile.READERS:
        with tempfile.TemporaryDirectory() as folder:
            count = INPUTS.get(name.partition(",")[0], OTHER_INPUTS)
            counts[name] = _hostile.attack(name, count, 0, Path(folder))
        print(name, counts[name], flush=True)
    return counts


def _on_one_model() -> dict[str, Any]:
    falcon = fk.load("falconet-instruct")
    encodings = _threads.by_eight_threads(falcon, _threads.ENCODINGS, ROUNDS)
    texts = _threads.by_eight_threads(falcon, _threads.TEXTS, 5)
    _threads.start_and_stop(falcon, 50)  # what is kept once
    left = _threads.start_and_stop(falcon, CYCLES)
    faults = [str(each) for each in [*encodings, *texts]]
    faults += [f"streams left {left}"] if left["threads"] or left["tensors"] or left["megabytes"] >= 1 else []
    results = 8 * (ROUNDS * len(_threads.ENCODINGS) + 5 * len(_threads.TEXTS))
    return {"results": results, "streams": CYCLES, "left": left, "faults": faults}


def _fuzzing() -> dict[str, Any]:
    if not _fuzz.is_installed():
        return {}
    counts = {name: _fuzz.fuzzed(name, FUZZ_SECONDS) for name in _fuzz.READERS}
    print(counts, flush=True)
    return {name: {**each, "faults": [each["finding"]] if each["finding"] else []} for name, each in counts.items()}


def _faults(figures: Any) -> list[list[str]]:
    """Every list of faults in nested figures."""
    if not isinstance(figures, dict):
        return []
    own = [figures["faults"]] if isinstance(figures.get("faults"), list) else []
    return own + [found for value in figures.values() for found in _faults(value)]


# The table of ARCHITECTURE.md


def table(figures: dict[str, Any]) -> str:
    """What is promised, which tests hold it, and how many cases ran."""
    writers, threads = figures["writers"].values(), figures["threads"]
    files, fuzzing = figures["hostile files"].values(), figures["fuzzing"].values()
    kills, writes = (sum(each[kind] for each in writers) for kind in ("kills", "writes that fail"))
    disks = sum(each["full disks"] for each in writers)
    rows = [
        ("After a kill, a file is complete: the old or the new one", "project/test_writers.py", f"{kills:,} kills"),
        ("A failing write costs nothing and leaves nothing", "project/test_writers.py", f"{writes:,} writes cut off"),
        ("A full disk is noticed, and the older version stays", "project/test_writers.py", f"{disks:,} full disks"),
        (
            "A damaged or hostile file is read, or refused by name",
            "project/test_hostile_files.py",
            f"{sum(each['inputs'] for each in files):,} files, {sum(each['runs'] for each in fuzzing):,} fuzzed",
        ),
        (
            "Eight threads on one model get the results of one",
            "generation/test_threads.py",
            f"{threads['results']:,} results",
        ),
        ("A stopped stream leaves nothing", "generation/test_threads.py", f"{threads['streams']:,} streams"),
    ]
    head = ["| Promise | Test | Cases |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {promise} | `tests/{test}` | {cases} |" for promise, test, cases in rows)]) + "\n"


def main() -> None:
    """Command line: writes the table."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    figures = json.loads(RESULTS.read_text(encoding="utf-8"))["figures"]
    first, *_, last = ROW.finditer(page)
    write_text(ROOT / "ARCHITECTURE.md", page[: first.start()] + table(figures) + page[last.end() :])


if __name__ == "__main__":
    main()
