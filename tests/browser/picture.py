"""python -m tests.browser.picture: draws docs/02_playground.png, the playground as JupyterLab shows it."""

import tempfile
from pathlib import Path

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


def draw(file: Path) -> None:
    """Opens a playground, generates a text, focuses an unlikely token, and saves a screenshot."""
    path = find()
    if path is None:
        raise SystemExit(MISSING)
    with tempfile.TemporaryDirectory() as home, chromium(path) as browser:
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
            pad.screenshot(path=file)


if __name__ == "__main__":
    draw(ROOT / "docs" / "02_playground.png")
