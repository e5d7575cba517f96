"""Writes the executed notebooks and solutions as HTML pages, with an index that has a picture of each.

    python notebooks/gallery.py              # runs/gallery/index.html
    python notebooks/gallery.py FOLDER       # FOLDER/index.html

Nothing is executed: the pages show the committed outputs. They load no script from a network, so
formulas and widgets stay text.
"""

import html
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
SCRIPTS = ("mathjax", "require_js", "jquery", "mermaid_js", "jupyter_widgets_base")
OFFLINE = {f"{name}_url": "" for name in SCRIPTS}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>Falcon Kit: the notebooks</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }}
a.card {{ border: 1px solid #7777; border-radius: 6px; padding: 1rem;
  color: inherit; text-decoration: none; }}
img {{ width: 100%; height: 9rem; object-fit: contain; }}
</style><h1>Falcon Kit: the notebooks</h1><main>{cards}</main></html>
"""
CARD = '<a class="card" href="{link}">{picture}<h2>{title}</h2><p>{text}</p></a>'


def introduction(notebook: NotebookNode) -> tuple[str, str]:
    """The title of a notebook and its first paragraph, as plain text."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title, _, rest = first.partition("\n")
    paragraph = rest.strip().partition("\n\n")[0]
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", paragraph)  # links become their text
    return title.lstrip("# "), re.sub(r"[*`]", "", plain)


def thumbnail(notebook: NotebookNode) -> str:
    """The last picture among the outputs as an <img>; empty if there is none."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [each.data["image/png"] for each in outputs if "image/png" in each.get("data", {})]
    if not pictures:
        return ""
    return f'<img alt="" src="data:image/png;base64,{html.escape(pictures[-1].strip())}">'


def page(notebook: NotebookNode) -> str:
    """The notebook as HTML; links to notebooks become links to pages."""
    body, _ = HTMLExporter(template_name="lab", **OFFLINE).from_notebook_node(notebook)
    return re.sub(r'(href="(?!https?:)[^"]+)\.ipynb', r"\1.html", body)


def write_gallery(notebooks: Path, folder: Path) -> Path:
    """Writes a page for every notebook and the index; returns the index."""
    (folder / "solutions").mkdir(parents=True, exist_ok=True)
    cards = []
    paths = [*sorted(notebooks.glob("[0-9]*.ipynb")), *sorted(notebooks.glob("solutions/*.ipynb"))]
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        link = path.relative_to(notebooks).with_suffix(".html")
        (folder / link).write_text(page(notebook), encoding="utf-8")
        title, text = (html.escape(each) for each in introduction(notebook))
        picture = thumbnail(notebook)
        cards.append(CARD.format(link=link.as_posix(), picture=picture, title=title, text=text))
    index = folder / "index.html"
    index.write_text(PAGE.format(cards="\n".join(cards)), encoding="utf-8")
    return index


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "gallery"
    print(write_gallery(HERE, folder))
