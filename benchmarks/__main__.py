"""python -m benchmarks [NAME ...]: runs the named benchmarks, or all, and writes benchmarks/results/NAME.json."""

import argparse
import importlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(file.stem for file in HERE.glob("[a-z]*.py"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the kit beside its peers.")
    parser.add_argument(
        "names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=f"one or more of: {', '.join(NAMES)}"
    )
    for name in parser.parse_args().names or NAMES:
        figures = importlib.import_module(f"benchmarks.{name}").run()
        machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
        machine |= {package: version(package) for package in ("torch", "transformers")}
        file = HERE / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
        print(f"\n{name}", *(f"  {key}: {value}" for key, value in figures.items()), f"written to {file}", sep="\n")


if __name__ == "__main__":
    main()
