"""The types of `generate`: a type checker knows whether a call returns a `Generation` or a list of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import falcon_kit as fk

ROOT = Path(__file__).parents[2]
CALLS = {
    'generate("one text", seed=0, top_p=0.9)': "Generation",
    "generate([5, 6, 7])": "Generation",
    'generate(["one", "two"], seed=0)': "list[Generation]",
    'generate("one text", num_return_sequences=2)': "list[Generation]",
    "generate(prompt)": "Generation | list[Generation]",
    'chat([{"role": "user", "content": "Hi"}])': "Generation",
}


def test_a_type_checker_knows_what_a_call_returns(tmp_path):
    kinds = ("Falcon", "Merged", "Endpoint", "Served", "ParallelFalcon")
    calls = [f"{kind.lower()}.{call}" for kind in kinds for call in CALLS]
    parameters = ", ".join(f"{kind.lower()}: fk.{kind}" for kind in kinds)
    lines = [f"    reveal_type({each})" for each in calls]
    (tmp_path / "program.py").write_text(
        "import falcon_kit as fk\nfrom falcon_kit.generation.prompts import Prompt\n\n"
        f"def program({parameters}, prompt: Prompt) -> None:\n" + "\n".join(lines)
    )
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "program.py")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = [each.replace("falcon_kit.generation.text.", "") for each in re.findall(r'Revealed type is "(.+)"', said)]
    assert dict(zip(calls, found, strict=True)) == dict(zip(calls, [*CALLS.values()] * len(kinds), strict=True))
    assert " error: " not in said


@pytest.mark.parametrize("kind", [fk.Falcon, fk.Endpoint, fk.ParallelFalcon])
def test_the_help_of_generate_is_that_of_the_method(kind):
    assert kind.generate.__qualname__ == f"{kind.__name__}.generate"
