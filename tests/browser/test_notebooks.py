"""The notebooks with interactive outputs, opened and run in JupyterLab."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .lab import ROOT, Guarded, Notebook


@pytest.fixture
def page(guarded: Guarded) -> Iterator[Guarded]:
    guarded.left_the_host.clear()
    guarded.errors.clear()
    yield guarded
    assert guarded.left_the_host == []
    assert guarded.errors == []


def opened(guarded: Guarded, lab: str, folder: Path, name: str) -> Notebook:
    """A copy of a committed notebook, opened."""
    shutil.copy(ROOT / "notebooks" / name, folder / name)
    notebook = Notebook(guarded.page, lab, name)
    notebook.open()
    return notebook


def test_the_playground_of_its_notebook_is_alive(page: Guarded, lab: str, folder: Path):
    notebook = opened(page, lab, folder, "02_playground.ipynb")
    pad = notebook.run_until("playground = fk.playground(falcon)").locator(".fk-playground")
    pad.get_by_label("Examples").select_option("Counting")
    pad.locator(".fk-composer textarea").press("Control+Enter")
    expect(pad.locator(".fk-history li")).to_have_count(1)
    typed = notebook.python("print(playground.session.turns[0].answers[0].text)")
    expect(pad.locator(".fk-generated")).to_have_text(typed)
    notebook.run_until("session.generate(fk.CARD.prompt)")
    called = notebook.python("print(playground.session.turns[0].answers[0].text)")
    expect(pad.locator(".fk-generated")).to_have_text(called)


def test_attention_lights_up_what_a_token_looks_at(page: Guarded, lab: str, folder: Path):
    notebook = opened(page, lab, folder, "05_attention.ipynb")
    view = notebook.run_until("fk.attention(falcon, text, layers=1).page()").locator(".jp-RenderedHTML > div")
    description, tokens = view.locator(".description"), view.locator(".tokens span")
    heads = view.locator(".heads button")
    tokens.nth(2).hover()
    expect(description).to_contain_text("token 2,")
    expect(tokens.nth(2)).to_have_class("current")
    tokens.nth(2).focus()
    notebook.page.keyboard.press("ArrowRight")
    expect(description).to_contain_text("token 3,")
    before = description.inner_text()
    heads.nth(1).click()
    expect(heads.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(heads.nth(0)).to_have_attribute("aria-pressed", "false")
    expect(description).not_to_have_text(before)
    expect(view.locator(".large figcaption")).to_have_text(heads.nth(1).get_attribute("title"))
    lens = notebook.start("fk.lens(falcon, 'The baby of a giraffe is called a').page()").locator(
        ".jp-RenderedHTML > div"
    )
    lens.locator(".tokens span").nth(1).hover()
    expect(lens.locator(".description")).to_contain_text("bits; expected")


def test_a_token_says_what_it_is_to_the_pointer_and_to_the_keyboard(page: Guarded, lab: str, folder: Path):
    notebook = opened(page, lab, folder, "03_tokenizer.ipynb")
    view = notebook.run_until("The giraffe eats acacia leaves.").locator(".jp-RenderedHTML > div")
    description, tokens = view.locator(".description"), view.locator(".tokens span[title]")
    for number in (2, 3):
        tokens.nth(number).hover()
        expect(description).to_have_text(tokens.nth(number).get_attribute("title"))
    tokens.nth(3).focus()
    notebook.page.keyboard.press("ArrowRight")
    expect(tokens.nth(4)).to_be_focused()
    expect(description).to_have_text(tokens.nth(4).get_attribute("title"))
    typed = notebook.start("fk.tokens('<img src=x onerror=window.hacked=1>\\u202e<s>', tokenizer)")
    shown = typed.locator(".jp-RenderedHTML > div")
    expect(shown.locator(".tokens")).to_contain_text("[U+202E]")
    assert shown.locator("img, s").count() == 0
    assert notebook.page.evaluate("window.hacked") is None
