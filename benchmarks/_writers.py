"""Attacks on everything that the kit writes: kills, full disks, links and obstacles, in a process without threads.

python -m benchmarks._writers SEED KILLS CUTS [WRITER ...]      prints the counts as one line of JSON

A writer writes one of two versions to the same path. After each attack the path holds a whole version.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_SECONDS = 120  # for a fork
Snapshot = dict[str, str]
"""The hash of each file by its path; a symbolic link by what it leads to."""


@dataclass(frozen=True)
class Writer:
    """A function of the kit that writes files."""

    target: str
    """The name that it writes to."""
    write: Callable[[Path, int], Any]
    """Writes version 0 or 1 to a path."""
    is_folder: bool = True
    """Whether the target is a folder."""


def attack(seed: int, kills: int, cuts: int, names: list[str]) -> dict[str, Any]:
    """The counts of each writer: attacks, and descriptions of those that lost or damaged something."""
    with ExitStack() as stack:
        writers = _writers(stack)
        return {name: _attack(writers[name], random.Random(seed), kills, cuts) for name in names or writers}


def _attack(writer: Writer, chance: random.Random, kills: int, cuts: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "place", writer.target)
        target.parent.mkdir()
        versions, seconds = [], 0.0
        for version in (1, 0):
            started = time.perf_counter()
            writer.write(target, version)
            seconds = time.perf_counter() - started
            versions.append(snapshot(target))
        faults = [_kill(writer, target, versions, chance.uniform(0, 2 * seconds)) for _ in range(kills)]
        faults += [_cut(writer, target, chance) for _ in range(cuts)]
        writer.write(target, 1)
        left = [each.name for each in target.parent.rglob(".*partial")]
        faults += [f"left behind: {left}"] if left else []
        faults += [
            _linked(writer, Path(folder)),
            _obstructed(writer, Path(folder)),
            full := _full(writer, Path(folder)),
        ]
    counts = {"kills": kills, "writes that fail": cuts, "full disks": 0 if full is None else 1}
    return {**counts, "faults": [fault for fault in faults if fault]}


def snapshot(target: Path) -> Snapshot:
    """What a path holds, without the temporary files of other processes."""
    files = [target] if target.is_symlink() or not target.is_dir() else sorted(target.rglob("*"))
    return {
        str(each.relative_to(target)): f"-> {each.readlink()}" if each.is_symlink() else _hash(each)
        for each in files
        if (each.is_symlink() or each.is_file()) and not each.name.endswith(".partial")
    }


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _kill(writer: Writer, target: Path, versions: list[Snapshot], seconds: float) -> str:
    """Ends a process that writes both versions in turn with SIGKILL after some seconds."""
    child = _fork(lambda: [writer.write(target, number % 2) for number in range(10**9)])
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return f"the writer ended by itself with {status}"
    return "" if snapshot(target) in versions else f"after a kill: {_differing(snapshot(target), versions[0])}"


def _differing(one: Snapshot, other: Snapshot) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _cut(writer: Writer, target: Path, chance: random.Random) -> str:
    """Lets a write fail at a random byte of any of its files."""
    writer.write(target, 1)
    largest = max(each.stat().st_size for each in ([target] if target.is_file() else target.rglob("*")))
    writer.write(target, 0)
    before, limit = snapshot(target), chance.randrange(largest)

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails and the process goes on
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with suppress(OSError):
            writer.write(target, 1)
            os._exit(2)

    status = os.waitpid(_fork(write), 0)[1]
    if status:
        ending = {2: "a write that failed was not noticed", 3: "another error than OSError"}
        ending[-signal.SIGALRM] = f"no end within {_MOST_SECONDS} seconds"
        return f"at byte {limit}: {ending.get(os.waitstatus_to_exitcode(status), status)}"
    left = [each.name for each in target.parent.rglob(".*partial")]
    return (
        ""
        if (snapshot(target), left) == (before, [])
        else f"at byte {limit}: {_differing(snapshot(target), before)}, {left}"
    )


def _fork(work: Callable[[], Any]) -> int:
    """The process id of a child that does some work; it ends with 3, and the traceback, on any error."""
    if child := os.fork():
        return child
    signal.alarm(_MOST_SECONDS)  # ends a child that waits for ever
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001  # nothing may return into the parent's code
        traceback.print_exc()
    os._exit(3)


def _linked(writer: Writer, folder: Path) -> str:
    """Writes to a symbolic link that leads to a file or folder with other content."""
    precious = folder / "precious"
    _fill(precious, writer.is_folder)
    before = snapshot(precious)
    target = folder / "linked" / writer.target
    target.parent.mkdir()
    target.symlink_to(precious, target_is_directory=writer.is_folder)
    with suppress(OSError, ValueError):  # a refusal is right too
        writer.write(target, 1)
    return "" if snapshot(precious) == before else "it wrote through a symbolic link"


def _fill(path: Path, is_folder: bool) -> None:
    if is_folder:
        path.mkdir()
    (path / "a.txt" if is_folder else path).write_text("precious")


def _obstructed(writer: Writer, folder: Path) -> str:
    """Writes to a file where a folder belongs, or the other way round."""
    target = folder / "obstructed" / writer.target
    target.parent.mkdir()
    _fill(target, not writer.is_folder)
    before = snapshot(target)
    try:
        writer.write(target, 1)
    except OSError:
        return "" if snapshot(target) == before else "an obstacle was changed"
    return "an obstacle was not refused"


def _full(writer: Writer, folder: Path) -> str | None:
    """Writes to a disk that holds one version and has no room for a second; None where no disk can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        return None
    try:
        target = disk / "place" / writer.target
        target.parent.mkdir()
        writer.write(target, 1)
        before = snapshot(target)
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        try:
            writer.write(target, 0)
        except OSError:
            left = [each.name for each in target.parent.rglob(".*partial")]
            return "" if (snapshot(target), left) == (before, []) else "a full disk cost the older version"
        return "a full disk was not noticed"
    finally:
        subprocess.run([shutil.which("umount") or "umount", disk], check=True)


# The writers


def _writers(stack: ExitStack) -> dict[str, Writer]:
    """All writers, on a small model that exists as long as the stack."""
    import torch
    from tqdm import tqdm

    import falcon_kit as fk
    from benchmarks.planning import LAYOUTS, checkpoint
    from falcon_kit.display.page import Page
    from falcon_kit.playground import files
    from falcon_kit.tuning import run_folder

    torch.set_num_threads(1)
    # All forks share tqdm's own lock, which a killed one would keep; and its thread could hold a lock during a fork.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_kv_heads": 2, "num_hidden_layers": 2}
    directory = checkpoint(home / "base", LAYOUTS["40B"] | sizes | {"vocab_size": 2048})
    base, turns = fk.load(directory, dtype="float32"), [_turn(version) for version in (0, 1)]
    save = Trainers(fk.load(directory, dtype="float32"), home, stack)
    adapters = [save.adapter(home / str(version) / "adapter", version) for version in (0, 1)]
    kinds = ("float32", "float16")

    def start(path: Path, version: int) -> None:
        run_folder.prepare_output_dir(path.parent, {"patience": None, "seed": version}, resume=False)

    return {
        "page": Writer("page.html", lambda path, version: Page(str(version), "x" * 99_999).write(path), False),
        "session": Writer("session.json", lambda path, version: files.save([turns[version]], path), False),
        "run.json": Writer("run.json", start, False),
        "evaluation": Writer("evaluation.json", lambda path, version: _evaluation(version).save(path), False),
        "GGUF file": Writer("a.gguf", lambda path, version: fk.export_gguf(base, path, kinds[version]), False),
        "merged model": Writer("merged", lambda path, version: fk.merge(adapters[version], base, output_dir=path)),
        "adapter": Writer("adapter", save.adapter),
        "tuning.json": Writer("tuning.json", save.record, False),
        "checkpoint": Writer("checkpoint-1", save.checkpoint),
    }


def _evaluation(version: int) -> Any:
    import falcon_kit as fk
    from falcon_kit.evaluation.perplexity import Part, Perplexity

    parts = tuple(Part(f"document {number}", 10, 40, 8, 12.0 + version) for number in range(500))
    return fk.Evaluation("falconet", {"settings": {"chat": False}}, (Perplexity("lions", parts, "hash", 2),), ())


def _turn(version: int) -> Any:
    from falcon_kit.playground.records import Answer, Span, Turn

    spans = [Span(str(version) * 9999, ())]
    return Turn("id", "chat", "Hello", (Answer("falconet", "fk.load('falconet')", "Hello", {}, spans, "eos"),))


class Trainers:
    """What `fk.tune` saves during and after a run, without the training between."""

    def __init__(self, falcon: Any, home: Path, stack: ExitStack) -> None:
        import falcon_kit as fk
        from falcon_kit.loading.merging import unchanged
        from falcon_kit.tuning import trainer, tune

        settings = fk.Tuning(r=2, max_steps=1, context=64).for_model(falcon.spec)
        packed = fk.pack(fk.dialogues([{"text": "Giraffes eat leaves. "}]), falcon, context=64)
        self._run = falcon, settings, falcon.plan, packed
        stack.enter_context(unchanged(falcon.model))
        model = tune._new_adapter(falcon, settings)
        options = trainer.arguments(settings, home, falcon.model, len(packed), evaluated=False, cpu=True)
        self._trainer = trainer.AdapterTrainer(model, options, packed)
        self._trainer.create_optimizer_and_scheduler(1)
        for weight in self._trained():
            weight.grad = weight.detach().clone()
        self._trainer.optimizer.step()  # so that there is a state to save

    def _trained(self) -> list[Any]:
        return [each for each in self._trainer.model.parameters() if each.requires_grad]

    def _set(self, version: int) -> None:
        random.seed(0)  # its state is part of a checkpoint, and a fork begins with another
        for number, weight in enumerate(self._trained()):
            weight.data.fill_(0.01 * (number % 7 + version))

    def adapter(self, path: Path, version: int) -> Path:
        """Saves the adapter of a finished run."""
        from falcon_kit.tuning import run_folder

        self._set(version)
        return run_folder.save_adapter(self._trainer, path.parent)

    def record(self, path: Path, version: int) -> None:
        """Writes the record of a finished run, beside its model card."""
        from falcon_kit.tuning import run_folder
        from falcon_kit.tuning.runs import TuningRun

        history = tuple({"loss": 2.5 + version, "step": step} for step in range(500))
        run = TuningRun(path.parent, *self._run, history, {"held-out loss after": 2.5 + version})
        run_folder.write_record(run, "hash")

    def checkpoint(self, path: Path, version: int) -> None:
        """Saves the checkpoint of step 1."""
        self._set(version)
        self._trainer._run, self._trainer.args.output_dir = path.parent, str(path.parent)
        self._trainer.state.global_step = 1
        self._trainer._save_checkpoint(self._trainer.model, None)


if __name__ == "__main__":
    seed, kills, cuts = map(int, sys.argv[1:4])
    print(json.dumps(attack(seed, kills, cuts, sys.argv[4:])))
