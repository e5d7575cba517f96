"""In CI a test that is skipped fails, except for a few reasons."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environ", "reason", "outcome"),
    [
        ({"CI": "1"}, "there is no browser", "1 failed"),
        ({"CI": "1"}, "this rule is for machines without a GPU", "1 skipped"),
        ({}, "there is no browser", "1 skipped"),
    ],
)
def test_in_ci_a_skipped_test_fails_unless_its_reason_is_known(tmp_path, environ, reason, outcome):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(f"import pytest\n\ndef test_it():\n    pytest.skip({reason!r})\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", tmp_path]
    environ = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environ
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1].startswith(f"{outcome} in ")
