"""Executes notebooks in place, on the embedded model, and stamps them with the hash of their source.

    python notebooks/stamp.py              # every notebook and every solution
    python notebooks/stamp.py PATH ...     # only these

The stamp shows that the committed outputs belong to the committed source:
tests/project/test_notebooks.py compares the two.
"""

import base64
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
LARGEST_WIDGET_STATE = 30_000  # bytes; a larger widget is shown by its text output only


FIRST_CELL = """\
import importlib
import os
import subprocess
import sys
from pathlib import Path

MODEL = os.environ.get("FALCON_KIT_MODEL", "falconet-instruct")
try:
    import falcon_kit as fk
except ImportError:
    folders = Path(globals().get("__vsc_ipynb_file__", "notebook")).resolve().parents
    checkout = next((str(each) for each in folders if (each / "falcon_kit").is_dir()), "")
    source = os.environ.get("FALCON_KIT_SOURCE") or checkout
    if not source or not ("://" in source or Path(source).exists()):
        remedy = "set FALCON_KIT_SOURCE to Falcon Kit's wheel, folder or git address, run this again"
        raise ImportError(remedy) from None
    source = source if "://" in source else str(Path(source).resolve())  # no name in an index
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
    importlib.invalidate_caches()
    import falcon_kit as fk"""


def set_first_cell(notebook: NotebookNode) -> None:
    """Makes the first code cell `FIRST_CELL`: it finds or installs the kit, and names the model."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if "FALCON_KIT_MODEL" in first.source:
        first.source = FIRST_CELL


def source_hash(notebook: NotebookNode) -> str:
    """SHA-256 of the type and source of every cell, without outputs and metadata."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def tidy(notebook: NotebookNode) -> None:
    """Keeps only metadata that is the same on every machine and in every run."""
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    kept = {"kernelspec": kernel, "language_info": {"name": "python"}}
    widgets = notebook.metadata.get("widgets")
    if widgets and len(json.dumps(widgets)) <= LARGEST_WIDGET_STATE:
        kept["widgets"] = widgets
    notebook.metadata = nbformat.from_dict(kept)
    notebook.nbformat_minor = 5  # the first version with cell ids

    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps
        # Ids from content: a cell keeps its id when other cells change, so that a diff shows only the
        # cells that changed.
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        for output in cell.get("outputs", []):
            if "widgets" not in kept:
                output.get("data", {}).pop(WIDGET_VIEW, None)


def save_picture(notebook: NotebookNode, path: Path) -> None:
    """Writes the picture of the cell tagged "readme", if any, to docs/<name of notebook>.png."""
    for cell in notebook.cells:
        if "readme" in cell.metadata.get("tags", []):
            shown = (each.get("data", {}).get("image/png") for each in cell.outputs)
            encoded = next(filter(None, shown))
            (HERE.parent / "docs" / f"{path.stem}.png").write_bytes(base64.b64decode(encoded))


def stamp(path: Path) -> None:
    """Executes one notebook in its own folder; the file changes only if every cell succeeds."""
    notebook = nbformat.read(path, as_version=4)
    set_first_cell(notebook)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=600, resources=resources)
    client.record_timing = False
    client.coalesce_streams = True  # one output per stream, however the text is split on arrival
    # Hides the kernel's warnings about its transport, and bitsandbytes' about a missing kernel.
    quiet = "import logging; logging.getLogger('bitsandbytes').setLevel('ERROR')"
    client.extra_arguments = ["--log-level=ERROR", f"--IPKernelApp.exec_lines={quiet}"]
    client.execute()
    tidy(notebook)
    notebook.metadata["falcon_kit"] = {"source_sha256": source_hash(notebook)}
    save_picture(notebook, path)
    nbformat.write(notebook, path)


def main() -> None:
    """Command line: stamps the named notebooks, or all of them."""
    # Committed outputs come from the embedded model and rows, and from no account.
    for name in ("FALCON_KIT_MODEL", "FALCON_KIT_SOURCE", "FALCON_KIT_DATA", "FALCON_KIT_AWS"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    everything = [*sorted(HERE.glob("[0-9]*.ipynb")), *sorted(HERE.glob("solutions/*.ipynb"))]
    for path in [Path(argument).resolve() for argument in sys.argv[1:]] or everything:
        print(f"{path.parent.name}/{path.name}", flush=True)
        stamp(path)


if __name__ == "__main__":
    main()
