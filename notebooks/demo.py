"""The model card's example on the embedded model, then the notebook that explains it: about a minute.

python notebooks/demo.py     # `make demo` runs this
"""

import os
import warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

import falcon_kit as fk
from falcon_kit.display.saving import write_text
from falcon_kit.planning.environment import empty_gpu_cache

NOTEBOOK = Path(__file__).with_name("01_inference.ipynb")
PAGE = Path("runs/01_inference.html")


def answer_the_card(model: str) -> None:
    """Prints the card's prompt, streams the generated text, and prints its statistics."""
    falcon = fk.load(model)
    print(f"{falcon}\n\n{fk.CARD.prompt}", end="", flush=True)
    stream = falcon.stream(fk.CARD.prompt, seed=0, **fk.CARD.sampling)
    for piece in stream:
        print(piece.text, end="", flush=True)
    print(f"\n\n{stream.generation.stats}\n")


def execute(notebook: Path, page: Path) -> None:
    """Executes a notebook and writes it as one HTML page; the notebook file does not change."""
    content = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(notebook.parent)}}
    client = NotebookClient(content, kernel_name="python3", resources=resources)
    client.extra_arguments = ["--log-level=ERROR"]  # hides warnings of the kernel's transport
    client.coalesce_streams = True  # one output per stream, however the text is split on arrival
    client.execute()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nbconvert warns about pictures without alternative text
        html, _ = HTMLExporter().from_notebook_node(content)
    page.parent.mkdir(exist_ok=True)
    write_text(page, html)


def main() -> None:
    """Command line: both parts of the demo."""
    answer_the_card(os.environ.get("FALCON_KIT_MODEL", "falconet-instruct"))
    empty_gpu_cache()  # the notebook loads the model again, in a process of its own
    print(f"Executing {NOTEBOOK.name} ...", flush=True)
    execute(NOTEBOOK, PAGE)
    print(f"Done. The executed notebook: {PAGE}\nTo open the notebooks yourself: make lab")


if __name__ == "__main__":
    main()
