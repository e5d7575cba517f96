"""`make gallery`: a page for every notebook, and an index with a picture of each, without a network."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
from gallery import write_gallery

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def notebook(title, *cells):
    opening = nbformat.v4.new_markdown_cell(f"# {title}\n\nShows **a** [link](01_other.ipynb).\n\nMore.")
    return nbformat.v4.new_notebook(cells=[opening, *cells])


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("gallery")
    (source / "solutions").mkdir()
    picture = nbformat.v4.new_output("display_data", data={"image/png": PNG})
    nbformat.write(notebook("A <b> title", nbformat.v4.new_code_cell("1", outputs=[picture])), source / "00_a.ipynb")
    nbformat.write(notebook("Other"), source / "01_other.ipynb")
    nbformat.write(notebook("Solutions"), source / "solutions" / "00_a.ipynb")
    return write_gallery(source, folder)


def test_the_index_links_every_notebook_and_solution(gallery):
    links = re.findall(r'href="([^"]+)"', gallery.read_text())
    assert links == ["00_a.html", "01_other.html", "solutions/00_a.html"]
    assert all((gallery.parent / each).is_file() for each in links)


def test_the_index_shows_title_text_and_picture_escaped(gallery):
    text = gallery.read_text()
    assert "<h2>A &lt;b&gt; title</h2><p>Shows a link.</p>" in text
    assert text.count(f"base64,{PNG}") == 1


def test_the_index_is_as_wide_as_the_screen_of_a_phone(gallery):
    assert '<meta name="viewport" content="width=device-width">' in gallery.read_text()


def test_links_between_notebooks_lead_to_pages(gallery):
    assert 'href="01_other.html"' in (gallery.parent / "00_a.html").read_text()


def test_no_page_loads_anything_from_a_network(gallery):
    for path in gallery.parent.rglob("*.html"):
        assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:[^"]+', path.read_text()) == []
