"""A damaged or hostile file is read, or refused by an error of the kit's own kinds that names it: over 1,000 inputs."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._hostile import READERS, Reader, outcome, spoiled

FILES = ("session", "evaluation", "run of fk.evaluate", "tasks", "pairs of fk.bias", "finished run of fk.tune")
QUICK = [name for name in READERS if name.startswith("dialogues") or name in FILES]
WHOLE = {
    "nothing": b"",
    "too deep": b"[" * 100_000,
    "an object too deep": b'{"a":' * 100_000,
    "not UTF-8": b'{"a": "caf\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "null": b"null",
    "an array": b"[1]",
    "a number": b"7",
    "a text": b'"x"',
    "an empty object": b"{}",
    "half an object": b'{"a": ',
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "zeros": bytes(100),
}
FOLDER = tempfile.TemporaryDirectory()


@cache
def good(name):
    """Good files for a reader."""
    (folder := Path(FOLDER.name, name.replace(" ", "-"))).mkdir()
    READERS[name].write(folder)
    return folder


def fault(name, chance):
    folder = Path(FOLDER.name, "hostile")
    with spoiled(READERS[name], good(name), folder, chance) as done:
        found = outcome(READERS[name], folder)
    return found and f"{done}: {found}"


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(name):
    assert READERS[name].read(good(name))


@pytest.mark.parametrize("content", WHOLE)
def test_a_file_of_something_else_is_read_or_named(tmp_path, content):
    faults = []
    for name, reader in READERS.items():
        for file in reader.hostile:
            shutil.copytree(good(name), folder := tmp_path / f"{name} {file}")
            (folder / file).write_bytes(WHOLE[content])
            faults += [f"{name}, {file}: {found}"] if (found := outcome(reader, folder)) else []
    assert faults == []


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=180)
@given(chance=st.randoms(use_true_random=False))
def test_a_hostile_file_of_documents_is_read_or_named(name, chance):
    assert fault(name, chance) == ""


@pytest.mark.parametrize("name", [name for name in READERS if name not in QUICK])
@settings(max_examples=30)
@given(chance=st.randoms(use_true_random=False))
def test_a_hostile_file_of_a_model_is_read_or_named(name, chance):
    assert fault(name, chance) == ""


@pytest.mark.parametrize("error", [KeyError("weight_map"), TypeError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x")])
def test_an_error_of_a_library_is_a_fault(tmp_path, error):
    def read(folder):
        raise error

    assert type(error).__name__ in outcome(Reader(good, (), read), tmp_path)
