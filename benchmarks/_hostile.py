"""Hostile files for every reader of the kit: bytes flipped, cut and inserted, JSON values exchanged, nested or removed.

A reader returns, or raises an error of the kit's own kinds that names a file. Anything else is a fault.
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import falcon_kit as fk
from benchmarks.planning import LAYOUTS, checkpoint
from falcon_kit.evaluation.bias import _pair
from falcon_kit.evaluation.perplexity import Part, Perplexity
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.task_results import TaskResult
from falcon_kit.evaluation.tasks import parsed, read_task
from falcon_kit.playground import files as playground_files
from falcon_kit.playground.records import Answer, Span, Token, Turn
from falcon_kit.tuning import run_folder
from falcon_kit.tuning.files import rows as rows_of_files
from falcon_kit.tuning.verdict import verdict

NAMED = (ValueError, FileNotFoundError, NotADirectoryError, OSError, LookupError, fk.NotEnoughMemory)
"""The kinds of errors that readers raise, and not their subclasses, which libraries raise."""
VALUES = [None, True, False, 0, -1, 1, 2, 7, 2**31, 10**30, 0.5, -1e308, "", "x", "no", "../x", "\ud800", [], {}, [1]]
VALUES += [[[]], {"a": 1}, "[" * 100, float("nan"), float("inf")]
_TEMPLATE = "{% for each in messages %}### {{ each['role'] }}: {{ each['content'] }}\n{% endfor %}### assistant:"
TALK = [{"role": "user", "content": "What do giraffes eat?"}, {"role": "assistant", "content": "Leaves."}]


@dataclass(frozen=True)
class Reader:
    """A reader of the kit, with good files for it."""

    write: Callable[[Path], Any]
    """Writes good files into an empty folder."""
    hostile: tuple[str, ...]
    """The names of the files to be spoiled."""
    read: Callable[[Path], Any]
    """Reads the folder."""


def _rows(folder: Path, suffix: str) -> None:
    rows: list[Any] = [{"messages": TALK}, {"text": "Giraffes."}, {"instruction": "Say a", "output": "a"}]
    rows += [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "weight": 1}]
    texts = {
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows, indent=1),
        ".csv": 'prompt,completion\n"Say ""a""",a\n"b\n",\n',
        ".txt": "One.\n\n[|Human|] Hi\n[|AI|] Hello\n",
    }
    (folder / f"rows{suffix}").write_text(texts[suffix], encoding="utf-8")


def _session(folder: Path) -> None:
    span = Span("a", (Token("a", -0.5, (("b", -1.0),)),))
    answer = Answer("falconet", "fk.load('falconet')", TALK[:1], {"seed": 3, "stop": ["."]}, [span], "eos")
    playground_files.save([Turn("id", "chat", "Hello", (answer,))], folder / "session.json")


def _evaluation(folder: Path) -> None:
    parts = (Part("document 1", 10, 40, 8, 12.0), Part("document 2", 9, 36, 7, 15.0))
    items = ({"where": "a:1", "acc": 1.0}, {"where": "a:2", "acc": 0.0})
    task = TaskResult("a", "multiple choice", "hash", {"acc": (1.0, 0.0)}, items, {"chance": 0.5})
    text = Perplexity("lions", parts, "hash", 2)
    fk.Evaluation("falconet", {"settings": {"chat": False}}, (text,), (task,)).save(folder / "evaluation.json")


def _run(folder: Path) -> list[Any]:
    """The first call computes a part of a run, a further one reads it."""
    return Progress(folder, {"model": "falconet", "probe": [-0.5, -2.5]}).map("task", [1, 2], list)


def _checkpoint(folder: Path, **saving: Any) -> Path:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_kv_heads": 1, "num_hidden_layers": 1}
    checkpoint(folder, LAYOUTS["40B"] | sizes | {"vocab_size": 2048}, **saving)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


def _pickled(folder: Path) -> None:
    file = _checkpoint(folder) / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def _lora(folder: Path, base: str) -> None:
    """The files of PEFT for an adapter of one layer."""
    matrices = {"lora_A.weight": torch.ones(2, 128), "lora_B.weight": torch.ones(128, 2)}
    layer = "base_model.model.transformer.h.0.self_attention.dense"
    save_file({f"{layer}.{name}": each for name, each in matrices.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["dense"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def _adapter(folder: Path) -> None:
    _lora(folder, str(_checkpoint(folder / "base")))
    format = asdict(fk.ChatFormat("mine", template=_TEMPLATE, stop=("###",)))
    (folder / "tuning.json").write_text(json.dumps({"chat_format": format, "base_fingerprint": None}))


def _finished_run(folder: Path) -> None:
    (folder / "adapter").mkdir()
    _lora(folder / "adapter", "falconet")
    figures = {
        f"{name} {when}": 2.0 for name in ("held-out loss", "generated-text loss") for when in ("before", "after")
    }
    record = {"history": [{"loss": 2.5, "step": 1}, {"loss": 2.0, "step": 2}], "figures": figures}
    (folder / "adapter/tuning.json").write_text(json.dumps(record))


def _read_finished_run(folder: Path) -> str:
    record = run_folder.read_record(folder) or {}
    return verdict(tuple(record["history"]), record["figures"], fk.Tuning(learning_rate=1e-4), 1)


def _tasks(folder: Path) -> None:
    rows: list[Any] = [{"question": "What do owls eat?", "choices": ["mice", "grass"], "answer": 0, "level": 1}]
    rows += [{"question": "What do lions eat?", "choices": ["meat", "grass"], "answer": "meat"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _pairs(folder: Path) -> None:
    rows = [{"axis": "age", "stereotype": "Old owls sleep.", "counterpart": "Young owls sleep."}]
    rows += [{"bias_type": "age", "sent_more": "Old cats sleep.", "sent_less": "Young cats sleep."}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _named(folder: Path) -> Path:
    """The rows in a file with the name of the folder: errors about a row name its file without the folder."""
    return Path(shutil.copy(folder / "rows.jsonl", folder / f"{folder.name}.jsonl"))


def _gguf(folder: Path) -> None:
    falcon = fk.load(_checkpoint(folder / "checkpoint"))
    fk.export_gguf(falcon, folder / "falcon.gguf", "q8_0")
    shutil.rmtree(folder / "checkpoint")


_CONFIGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
READERS = {
    **{
        f"dialogues, {suffix}": Reader(
            lambda folder, suffix=suffix: _rows(folder, suffix),
            (f"rows{suffix}",),
            lambda folder: list(fk.dialogues(folder)),
        )
        for suffix in (".jsonl", ".json", ".csv", ".txt")
    },
    "session": Reader(_session, ("session.json",), lambda folder: playground_files.load(folder / "session.json")),
    "evaluation": Reader(
        _evaluation, ("evaluation.json",), lambda folder: repr(fk.Evaluation.load(folder / "evaluation.json"))
    ),
    "run of fk.evaluate": Reader(_run, ("run.json", "parts/task-000000-3a316d6d3226.json"), _run),
    "tasks": Reader(_tasks, ("rows.jsonl",), lambda folder: repr(read_task(_named(folder)))),
    "pairs of fk.bias": Reader(
        _pairs, ("rows.jsonl",), lambda folder: parsed(rows_of_files(_named(folder)), _pair, str(folder), "{}")
    ),
    "finished run of fk.tune": Reader(_finished_run, ("adapter/tuning.json",), _read_finished_run),
    "config": Reader(_checkpoint, _CONFIGS, fk.load),
    "weights": Reader(_checkpoint, ("model.safetensors",), fk.load),
    "shards": Reader(
        lambda folder: _checkpoint(folder, max_shard_size="400KB"), ("model.safetensors.index.json",), fk.load
    ),
    "pickled weights": Reader(_pickled, ("pytorch_model.bin",), fk.load),
    "GGUF file": Reader(_gguf, ("falcon.gguf",), lambda folder: fk.load(folder / "falcon.gguf")),
    "adapter": Reader(_adapter, ("adapter_config.json", "tuning.json", "adapter_model.safetensors"), fk.load),
    "adapter to merge": Reader(
        _adapter, ("adapter_config.json", "adapter_model.safetensors"), lambda folder: fk.merge(folder, folder / "base")
    ),
}
"""Every reader of files that other people write."""


@contextmanager
def spoiled(reader: Reader, good: Path, folder: Path, chance: random.Random) -> Iterator[str]:
    """A copy of the good files with one of them spoiled; yields what was done."""
    name = chance.choice(reader.hostile)
    content, done = spoil((good / name).read_bytes(), chance)
    try:
        shutil.copytree(good, folder)
        (folder / name).write_bytes(content)
        yield f"{name}: {done}"
    finally:
        shutil.rmtree(folder)


def spoil(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Spoiled content, and what was done."""
    if content[:1] in b"[{" and chance.random() < 0.7:
        return _spoil_json(content, chance)
    start = chance.choice([chance.randrange(len(content) + 1), chance.randrange(min(len(content), 300) + 1)])
    end = min(len(content), start + chance.choice([0, 1, 8, 1000, len(content)]))
    inserted = chance.choice(
        [b"", bytes([chance.randrange(256)]), chance.randbytes(9), b"[" * 10**5, b"\xff\xfe", b"\n"]
    )
    return content[:start] + inserted + content[end:], f"bytes {start} to {end} become {inserted[:9]!r}"


def _spoil_json(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """JSON with one value replaced, removed or nested; in lines, one line of it."""
    lines = content.split(b"\n") if content.count(b"\n{") and content[:1] == b"{" else [content]
    number = chance.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        return content[: len(content) // 2], "half of it"
    places = list(_places(value))
    if not places:
        return b"null", "null"
    holder, key = chance.choice(places)
    new = chance.choice(VALUES)
    if chance.random() < 0.2:
        del holder[key]
        new = "nothing"
    else:
        holder[key] = new
    lines[number] = json.dumps(value).encode()
    return b"\n".join(lines), f"line {number}, {key!r} becomes {new!r:.40}"


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every holder and key of a value; of a long list only the first ones."""
    keys = list(value)[:40] if isinstance(value, dict) else range(min(len(value), 5)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        if depth < 6:
            yield from _places(value[key], depth + 1)


def outcome(reader: Reader, folder: Path) -> str:
    """Empty where the reader returns or raises a named error; else the fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader.read(folder)
        except Exception as error:  # noqa: BLE001  # the kinds are told apart below
            named = type(error) in NAMED and (folder.name in str(error) or isinstance(error, MemoryError))
            named = named or str(error).startswith("after merging, logits differ")  # of an adapter that overflows
            return "" if named else f"{type(error).__name__}: {str(error)[:300]}"
    return ""


def attack(name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """The counts of one reader, and its faults."""
    reader, chance, faults = READERS[name], random.Random(seed), []
    (good := folder / "good").mkdir()
    reader.write(good)
    if fault := outcome(reader, good):
        raise ValueError(f"the good files are not read: {fault}")
    for number in range(count):
        with spoiled(reader, good, folder / f"hostile-{number}", chance) as done:
            if fault := outcome(reader, folder / f"hostile-{number}"):
                faults.append(f"{done}: {fault}")
    return {"inputs": count, "faults": faults}
