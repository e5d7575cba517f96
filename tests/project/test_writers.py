"""Everything that the kit writes is complete, the old version or the new one, whatever happens while it is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITERS = ["page", "session", "run.json", "evaluation", "GGUF file", "merged model", "adapter", "tuning.json"]
WRITERS += ["checkpoint"]
IN_PLACE = """
import json, random
from benchmarks._writers import Writer, _attack

def write(path, version):
    with path.open("wb", buffering=0) as file:
        for part in range(200):
            file.write(bytes([version]) * 10_000)

print(json.dumps(_attack(Writer("a", write, is_folder=False), random.Random(0), 5, 5)["faults"]))
"""


def printed(*command):
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def attacked():
    """The counts of a few attacks on each writer; `python -m benchmarks reliability` runs a hundred."""
    return printed("-m", "benchmarks._writers", "0", "4", "4")


@pytest.mark.skipif(sys.platform != "linux", reason="the attacks use calls of Linux")
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_loses_nothing_whatever_happens_while_it_writes(attacked, name):
    assert [*attacked] == WRITERS
    assert (attacked[name]["kills"], attacked[name]["faults"]) == (4, [])


@pytest.mark.skipif(sys.platform != "linux", reason="the attacks use calls of Linux")
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_notices_a_full_disk_and_keeps_the_older_version(attacked, name):
    if not any(each["full disks"] for each in attacked.values()):
        pytest.skip("no disk of a limited size can be mounted here")
    assert (attacked[name]["full disks"], attacked[name]["faults"]) == (1, [])


@pytest.mark.skipif(sys.platform != "linux", reason="the attacks use calls of Linux")
def test_the_attacks_find_what_a_writer_in_place_loses():
    faults = " ".join(printed("-c", IN_PLACE))
    expected = ["after a kill", "at byte", "through a symbolic link"]
    assert [each for each in expected if each not in faults] == []
