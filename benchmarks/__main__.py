"""python -m benchmarks [NAME ...]: runs the named benchmarks, or all that can run on this machine.

Writes benchmarks/results/NAME.json with the date, the commit and the machine, and NAME.png where the benchmark has a
`draw`.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import CannotRun
from falcon_kit.display.saving import atomic_file, write_text

HERE = Path(__file__).parent
NAMES = sorted(file.stem for file in HERE.glob("[a-z]*.py"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the kit beside its peers.")
    parser.add_argument(
        "names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=f"one or more of: {', '.join(NAMES)}"
    )
    chosen = parser.parse_args().names
    for name in chosen or NAMES:
        try:
            _run(name)
        except (CannotRun, ModuleNotFoundError) as reason:  # a peer that is not installed
            print(f"\n{name} cannot run here: {reason}", file=sys.stderr)
            if chosen:
                sys.exit(1)


def _run(name: str) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    file = HERE / "results" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    found = benchmark.run()
    for figures in found if isinstance(found, Iterator) else [found]:  # an iterator gives them after each of its parts
        write_text(file, json.dumps(_made() | {"machine": _machine(), "figures": figures}, indent=2) + "\n")
        print(*list(figures.items())[-1:], flush=True)
    print(f"\n{name}", *(f"  {key}: {value}" for key, value in figures.items()), f"written to {file}", sep="\n")
    if hasattr(benchmark, "draw"):
        with atomic_file(file.with_suffix(".png")) as picture:
            benchmark.draw(figures).savefig(picture, format="png", dpi=120)
        print(f"drawn to {file.with_suffix('.png')}")


def _made() -> dict[str, str]:
    """When, and by which code: the commit, with "+" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    described = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    return {"date": date.today().isoformat(), "commit": described or "no git repository"}


def _machine() -> dict[str, str | int | None]:
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
    return machine | {package: version(package) for package in ("torch", "transformers")}


if __name__ == "__main__":
    main()
