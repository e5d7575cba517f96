"""The pages of the inspections, in Chromium."""

import pytest
from playwright.sync_api import Browser, Page

import falcon_kit as fk

TEXT = "The giraffe eats the leaves of"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The addresses of pages."""
    falcon, folder = fk.load("falconet-instruct"), tmp_path_factory.mktemp("pages")
    views = {"lens": fk.lens(falcon, TEXT), "tokens": fk.tokens(TEXT, falcon)}
    views["attention"] = fk.attention(falcon, TEXT, layers=[4])
    return {name: view.to_html(folder / f"{name}.html").as_uri() for name, view in views.items()}


def colours(page: Page, parts: str) -> set[str]:
    """The backgrounds of some elements."""
    script = "(nodes) => nodes.map((node) => getComputedStyle(node).backgroundColor)"
    return set(page.locator(parts).evaluate_all(script))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lens", ".tokens span"),
        ("lens", ".scale span"),
        ("lens", ".lens td"),
        ("tokens", ".tokens span"),
        ("attention", ".tokens span"),
    ],
)
def test_colours_are_printed_and_shown_in_a_users_own_colours(browser: Browser, pages, name: str, parts: str):
    context = browser.new_context(forced_colors="active", color_scheme="dark")
    page = context.new_page()
    page.goto(pages[name])
    assert len(colours(page, parts)) > 1
    ink = page.locator(parts).first.evaluate("(node) => getComputedStyle(node).color")
    assert ink == page.evaluate("getComputedStyle(document.body).color")
    printed = "(node) => getComputedStyle(node).printColorAdjust"
    assert page.locator(parts).first.evaluate(printed) == "exact"
    context.close()
