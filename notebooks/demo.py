"""The main job in a minute: the model card's example on the embedded Falcon, then the notebook that explains it.

python notebooks/demo.py     what `make demo` runs
"""

import os
import warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

import falcon_kit as fk

NOTEBOOK = Path(__file__).with_name("01_inference.ipynb")
PAGE = Path("runs/01_inference.html")


def answer_the_card(model: str) -> None:
    """Prints the card's prompt, the answer as it comes, and what it took."""
    falcon = fk.load(model)
    print(f"{falcon}\n\n{fk.CARD.prompt}", end="", flush=True)
    answer = falcon.stream(fk.CARD.prompt, seed=0, **fk.CARD.sampling)
    for piece in answer:
        print(piece.text, end="", flush=True)
    print(f"\n\n{answer.generation.stats}\n")


def execute(notebook: Path, page: Path) -> None:
    """Runs a notebook from top to bottom and writes it as one HTML page; the notebook itself stays as it is."""
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(content, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}})
    client.extra_arguments = ["--log-level=ERROR"]  # the kernel's own remarks on its transport are no news here
    client.coalesce_streams = True  # one output per stream, however the text happened to arrive
    client.execute()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nbconvert's remarks on pictures without alternative text
        html, _ = HTMLExporter().from_notebook_node(content)
    page.parent.mkdir(exist_ok=True)
    page.write_text(html, encoding="utf-8")


def main() -> None:
    """The demo."""
    answer_the_card(os.environ.get("FALCON_KIT_MODEL", "falconet-instruct"))
    print(f"Executing {NOTEBOOK.name} ...", flush=True)
    execute(NOTEBOOK, PAGE)
    print(f"Done. The executed notebook, to look at: {PAGE}\nTo work in it yourself: make lab")


if __name__ == "__main__":
    main()
