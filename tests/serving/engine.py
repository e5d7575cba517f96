"""A stand-in for an engine of `fk.serve`: a program that does what a plan says."""

import json
import sys
import time
from pathlib import Path

import psutil

STAND_IN = Path(__file__).with_name("stand_in.py")


class Engine:
    """A stand-in for vLLM in a folder of its own; `plan` says what it does."""

    def __init__(self, folder, **plan):
        self.program = folder / "vllm"
        self.program.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
        self.program.chmod(0o755)
        self.program.with_suffix(".json").write_text(json.dumps(plan))

    @property
    def seen(self):
        """Its arguments, environment and process."""
        return json.loads(self.program.with_suffix(".seen").read_text())

    @property
    def requests(self):
        """What it was asked, in this order: "GET /health"."""
        return self.program.with_suffix(".requests").read_text().splitlines()

    def is_gone(self):
        """Whether it and its child have ended within some seconds."""
        return all(map(has_ended, [self.seen["pid"], *filter(None, [self.seen.get("child")])]))


def has_ended(pid):
    for _ in range(150):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def make_folder(folders, prefix):
    folder = folders / f"{prefix}{len([*folders.iterdir()])}"
    folder.mkdir()
    return str(folder)
