"""python -m tests.browser.picture: draws the pictures of the README that need a browser, into docs/.

02_playground.png is the playground as JupyterLab shows it, and stands in notebook 02 for readers without a kernel;
explanation.gif goes through layers and heads of a text.
"""

import base64
import io
import json
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

import falcon_kit as fk

from .chromium import MISSING, find
from .lab import ROOT, Guarded, Notebook, chromium, jupyterlab

CELL = """
import falcon_kit as fk
pad = fk.playground(fk.load("falconet-instruct"))
pad.session.set(seed=6)
pad.token_probabilities = True
pad.session.generate(fk.CARD.prompt)
pad
"""
TEXT = "The giraffe eats the leaves of"
STEPS = [("0", "0"), ("1", "0"), ("1", "1"), ("1", "2"), ("2", "2"), ("3", "2"), ("4", "2"), ("5", "2")]
"""Layers and heads, one for each frame."""
SIZE = {"width": 860, "height": 1300}
FRAME_MS = 1200


def draw_playground(browser: Browser, file: Path) -> None:
    """Opens a playground, generates a text, focuses an unlikely token, and saves a screenshot."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "notebooks"
        folder.mkdir()
        with jupyterlab(folder) as address:
            page = Guarded(browser, address, device_scale_factor=1.5).page
            page.set_viewport_size({"width": 1240, "height": 1000})
            notebook = Notebook.new(page, address, folder)
            page.evaluate("jupyterapp.shell.collapseLeft()")
            pad = notebook.start(CELL).locator(".fk-playground")
            pad.locator(".fk-history li").wait_for(timeout=60_000)
            pad.locator(".fk-token.fk-p4").last.focus()  # hovering fails after the page has scrolled
            Image.open(io.BytesIO(pad.screenshot())).convert("RGB").quantize(256).save(file, optimize=True)


def attach(file: Path, notebook: Path) -> None:
    """Puts a picture in the place of the notebook's attachment."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    (attached,) = (cell["attachments"] for cell in content["cells"] if "attachments" in cell)
    attached["playground.png"]["image/png"] = base64.b64encode(file.read_bytes()).decode()
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_explanation(browser: Browser, file: Path) -> None:
    """Goes through layers and heads of an explanation, and saves an animation."""
    with tempfile.TemporaryDirectory() as folder:
        written = fk.explain(fk.load("falconet-instruct"), TEXT).to_html(Path(folder) / "page.html")
        page = browser.new_page(viewport=SIZE)
        page.goto(written.as_uri())
        frames = [_frame(page, layer, head) for layer, head in STEPS]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, optimize=True)


def _frame(page: Page, layer: str, head: str) -> Image.Image:
    """The stages around attention, for one layer and head."""
    page.get_by_role("combobox", name="Layer").select_option(layer)
    page.get_by_role("combobox", name="Head").select_option(head)
    page.wait_for_function(
        "text => document.querySelector('[data-stage=tokens] .fk-sentence').textContent.startsWith(text)",
        arg=f"Head {head} of layer {layer}",
    )
    page.evaluate(
        "for (const name of ['embedding', 'norms']) document.querySelector(`[data-stage=${name}]`).hidden = true"
    )
    return Image.open(io.BytesIO(page.screenshot())).quantize(64)


def main() -> None:
    """Draws all pictures."""
    path = find()
    if path is None:
        raise SystemExit(MISSING)
    with chromium(path) as browser:
        draw_explanation(browser, ROOT / "docs" / "explanation.gif")
        draw_playground(browser, ROOT / "docs" / "02_playground.png")
    attach(ROOT / "docs" / "02_playground.png", ROOT / "notebooks" / "02_playground.ipynb")


if __name__ == "__main__":
    main()
