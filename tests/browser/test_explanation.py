"""The view of `fk.explain`: every number on the screen is the model's, in a page and as a widget in JupyterLab."""

import re
import unicodedata

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import falcon_kit as fk
from falcon_kit.display.page import DOM_SCRIPT, visible
from falcon_kit.explanation.record import record
from falcon_kit.explanation.route import attention_rows
from falcon_kit.explanation.view import _SOURCE
from falcon_kit.inspection.hooks import inspect_model
from tests.conftest import LAYOUTS
from tests.inspection.models import model

from .lab import Notebook, faint_fields, small_targets, violations

TEXT = "The giraffe eats the leaves of"
LAYER, HEAD = 4, 2


@pytest.fixture(scope="module")
def falcon():
    return fk.load("falconet-instruct")


@pytest.fixture(scope="module")
def file(falcon, tmp_path_factory):
    """A page without a kernel."""
    return fk.explain(falcon, TEXT, layer=LAYER, head=HEAD).to_html(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def found(falcon):
    inspected = inspect_model(falcon)
    return record(inspected, inspected.encode(TEXT), LAYER)


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


def opened(browser: Browser, file, errors=None, **options) -> Page:
    """A page of its own; the errors of its scripts are added to `errors`."""
    page = browser.new_context(**{"viewport": {"width": 1100, "height": 900}} | options).new_page()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: errors is None or errors.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector("[data-drawn]")
    return page


@pytest.fixture(scope="module")
def page(browser: Browser, file):
    page = opened(browser, file)
    yield page
    page.context.close()


def numbers(page: Page, stage: str, column: int) -> list[float]:
    """The exact values behind the numbers in a column of a stage's table."""
    rows = page.locator(f"[data-stage={stage}] tbody tr td:nth-child({column})")
    return [float(value) for value in rows.evaluate_all("cells => cells.map(cell => cell.dataset.value)")]


def distribution(page: Page, **settings: float) -> list[float]:
    """The probabilities that the sliders give to the tokens that are shown."""
    for name, value in {"temperature": 1, "topK": 0, "topP": 1, **settings}.items():
        page.locator(f"[data-setting={name}]").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
        )
    return numbers(page, "prediction", 6)


# Numbers


def test_scores_and_probabilities_are_the_models(page, found):
    width = len(found.layer.heads.query[0])
    rows = attention_rows(found.layer.heads, None, 0, width)[HEAD, -1]
    np.testing.assert_allclose(numbers(page, "attention", 4), rows, rtol=1e-5)
    scores = found.layer.heads.key[HEAD // 2] @ found.layer.heads.query[HEAD, -1] / 8
    np.testing.assert_allclose(numbers(page, "attention", 2), scores, rtol=1e-5)


def test_the_written_number_is_the_exact_one_rounded(page):
    cells = page.locator("[data-stage=attention] tbody td[data-value]")
    for exact, written in cells.evaluate_all("cells => cells.map(cell => [+cell.dataset.value, cell.textContent])"):
        if written.endswith("%"):
            assert written in ("<0.1%", ">99.9%") or abs(100 * exact - float(written[:-1])) <= 0.051
        else:
            assert float(written.replace("−", "-")) == pytest.approx(exact, rel=1e-3)


def test_the_components_of_the_residual_stream_are_the_models(page, found):
    shown = page.locator("[data-stage=residual] .fk-strip").evaluate_all(
        "strips => strips.map(strip => [...strip.children].map(cell => +cell.dataset.value))"
    )
    vectors = [found.layer.vectors[name].first[-1] for name in ("input", "attention", "mlp", "output")]
    np.testing.assert_allclose(shown, torch.stack(vectors), rtol=1e-5)


def test_the_strongest_neurons_are_the_models(page, found):
    np.testing.assert_allclose(numbers(page, "mlp", 3), found.layer.activations[-1], rtol=1e-5)


def test_logits_and_probabilities_of_the_next_token_are_the_models(page, found):
    best = found.logits.topk(12)
    np.testing.assert_allclose(numbers(page, "prediction", 2), best.values, rtol=1e-5)
    np.testing.assert_allclose(distribution(page), found.logits.softmax(-1)[best.indices], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"topK": 3},
        {"topP": 0.9},
        {"topP": 0.05},
        {"temperature": 1.5, "topK": 8, "topP": 0.6},
    ],
    ids=str,
)
def test_the_sliders_give_what_the_warpers_of_transformers_give(page, found, settings):
    logits, best = found.logits[None], found.logits.topk(12).indices
    warpers = {"temperature": TemperatureLogitsWarper, "topK": TopKLogitsWarper, "topP": TopPLogitsWarper}
    for name, warper in warpers.items():
        if name in settings:
            logits = warper(settings[name])(None, logits)
    expected = logits[0].softmax(-1)[best]
    np.testing.assert_allclose(distribution(page, **settings), expected, rtol=1e-3, atol=1e-7)


def test_temperature_zero_is_the_likeliest_token(page):
    assert distribution(page, temperature=0)[:2] == [1, 0]


def test_the_map_shows_the_models_probabilities(page, found):
    rows = attention_rows(found.layer.heads, None, 0, 6)[HEAD]
    map = page.locator(".fk-map")
    alphas = map.evaluate(
        "map => [...map.getContext('2d').getImageData(0, 0, 6, 6).data].filter((_, at) => at % 4 === 3)"
    )
    expected = (255 * rows.sqrt()).round() + 28 * torch.ones(6, 6).triu(1)
    np.testing.assert_allclose(np.reshape(alphas, (6, 6)), expected, atol=1)
    cell = map.bounding_box()["width"] / 6
    map.hover(position={"x": 1.5 * cell, "y": 4.5 * cell})
    written = page.locator("[data-stage=attention] .fk-info").inner_text()
    assert written.startswith("query 4, key 1: ")
    assert float(written.split()[-1][:-1]) == pytest.approx(100 * float(rows[4, 1]), abs=0.051)


def test_moving_both_tokens_leaves_the_score(page):
    stage = page.locator("[data-stage=rotary]")
    before = stage.locator("output").inner_text().split()[-1]
    stage.locator("input").evaluate("slider => { slider.value = 64; slider.dispatchEvent(new Event('input')); }")
    assert stage.locator("output").inner_text().split() == ["64", "tokens:", "score", before]


# Used by everybody


def test_the_page_asks_for_nothing_and_no_script_fails(browser, file):
    page = browser.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    page.wait_for_selector("[data-drawn]")
    assert (asked, errors) == ([file.as_uri()], [])
    page.close()


@pytest.mark.parametrize("width", [390, 1100])
def test_axe_finds_no_violation(browser, file, scheme, width):
    page = opened(browser, file, color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True)
    page.get_by_role("button", name="Start the tour").click()
    assert violations(page, ".fk-explanation") == []
    page.context.close()


def test_the_edge_of_each_field_stands_out(browser, file, scheme):
    page = opened(browser, file, color_scheme=scheme)
    assert faint_fields(page.locator(".fk-explanation")) == []
    page.context.close()


@pytest.mark.parametrize("width", [390, 1100])
def test_every_control_is_large_enough_for_the_pointer(layout_page, width):
    _, page, _ = layout_page
    wide = page.viewport_size
    page.set_viewport_size({"width": width, "height": 900})
    assert small_targets(page.locator(".fk-explanation")) == []
    page.set_viewport_size(wide)


def test_a_narrow_page_does_not_scroll_sideways(browser, file):
    page = opened(browser, file, viewport={"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.context.close()


def test_the_token_and_the_route_of_a_long_text_are_in_sight(browser, falcon, tmp_path):
    file = fk.explain(falcon, "The giraffe eats leaves. " * 40).to_html(tmp_path / "page.html")
    page = opened(browser, file, viewport={"width": 390, "height": 900})
    page.wait_for_timeout(200)
    inside = """([name, part]) => {
        const box = (selector) => document.querySelector(selector).getBoundingClientRect();
        const [outer, inner] = [box(name), box(`${name} ${part}`)];
        const across = inner.left >= outer.left && inner.right <= outer.right;
        return across && inner.top >= outer.top && inner.bottom <= outer.bottom;
    }"""
    assert page.evaluate(inside, [".fk-tokens", "[aria-pressed=true]"])
    assert page.evaluate(inside, [".fk-scroll", "circle"])
    page.context.close()


def test_what_is_coloured_is_printed_and_shown_in_a_users_own_colours(browser, file):
    page = opened(browser, file, forced_colors="active")
    colours = "(nodes, pseudo) => [...new Set(nodes.map((node) => getComputedStyle(node, pseudo).backgroundColor))]"
    for part in ("[data-stage=residual] .fk-strip i", ".fk-bar, .fk-bar i", ".fk-memory i", ".fk-cell"):
        assert len(page.locator(part).evaluate_all(colours)) > 1, part
    widths = "(nodes) => nodes.map((node) => parseFloat(getComputedStyle(node, '::after').width))"
    shares = page.locator(".fk-tokens button").evaluate_all(widths)
    assert max(shares) > 2 * min(shares)
    printed = "(nodes) => nodes.every((node) => getComputedStyle(node).printColorAdjust === 'exact')"
    assert page.locator(".fk-strip i, .fk-bar i, .fk-memory i, .fk-tokens button").evaluate_all(printed)
    page.context.close()


def test_the_tour_leads_through_ten_stages_by_keys_alone(browser, file):
    page = opened(browser, file)
    page.get_by_role("button", name="Start the tour").press("Enter")
    seen = []
    for _ in range(10):
        seen.append(page.locator("section.fk-toured").get_attribute("data-stage"))
        expect(page.locator(".fk-tour")).to_contain_text(f"{len(seen)} of 10")
        page.locator(".fk-tour button", has_text="Done" if len(seen) == 10 else "Next").press("Enter")
    assert len({*seen}) == 10
    expect(page.locator(".fk-tour")).to_be_hidden()
    expect(page.get_by_role("button", name="Start the tour")).to_be_focused()
    page.context.close()


@pytest.fixture(scope="module", params=LAYOUTS)
def layout_page(request, browser: Browser, falcon, tmp_path_factory):
    """The layout, a page of a model of it, and the errors of its script."""
    errors: list[str] = []
    view = fk.explain((model(request.param), falcon.tokenizer), TEXT)
    page = opened(browser, view.to_html(tmp_path_factory.mktemp("page") / "page.html"), bypass_csp=True, errors=errors)
    yield request.param, page, errors
    page.context.close()


def test_every_layout_is_drawn_for_everybody_and_each_box_leads_to_its_stage(layout_page):
    _, page, errors = layout_page
    names = set()
    for box in page.locator("[data-to]").all():
        names.add(name := box.get_attribute("data-to"))
        box.press("Enter")
        expect(page.locator(f"[data-stage={name}] h3")).to_be_focused()
    assert len(names) == 10
    assert violations(page, ".fk-explanation") == []
    assert errors == []


BEHIND_A_BOX = """() => {
    const boxes = [...document.querySelectorAll(".fk-flow g:not([data-to=residual])")];
    const [path, label] = [".fk-flow path", ".fk-flow .fk-times"].map((name) => document.querySelector(name));
    const points = [...Array(Math.ceil(path.getTotalLength())).keys()].map((at) => path.getPointAtLength(at));
    const { x, y, width, height } = label.getBBox();
    points.push({ x, y }, { x, y: y + height }, { x: x + width, y }, { x: x + width, y: y + height });
    const between = (at, start, size) => at > start + 1 && at < start + size - 1;
    const inside = ({ x, y }, box) => between(x, box.x, box.width) && between(y, box.y, box.height);
    return boxes.filter((box) => points.some((point) => inside(point, box.getBBox()))).map((box) => box.dataset.to);
}"""


def test_nothing_of_the_diagram_is_behind_a_box(layout_page):
    assert layout_page[1].evaluate(BEHIND_A_BOX) == []


def test_a_key_is_described_with_the_queries_that_read_it(layout_page):
    layout, page, _ = layout_page
    stage = page.locator("[data-stage=projection]")
    stage.locator(".fk-cell.fk-key").hover()
    shared = {"7b": "shared by query heads 0 to 3", "40b": "shared by query heads 0 to 1"}
    shared |= {"180b": "shared by query heads 0 to 2", "rw": "read by query head 0"}
    expect(stage.locator(".fk-info")).to_have_text(f"key head 0, {shared[layout]}")


def test_the_tour_tells_what_the_model_has(layout_page):
    layout, page, _ = layout_page
    page.get_by_role("button", name="Start the tour").click()
    told = {}
    for _ in range(10):
        stage = page.locator("section.fk-toured").get_attribute("data-stage")
        told[stage] = page.locator(".fk-tour p").inner_text()
        page.locator(".fk-tour button", has_text=re.compile("Next|Done")).click()
    expected = {
        "7b": {"norms": "in parallel, and both read the result of one", "projection": "All query heads share one key"},
        "40b": {
            "norms": "in parallel, and each has a LayerNorm of its own",
            "projection": "Several query heads share one key",
        },
        "180b": {
            "norms": "in parallel, and each has a LayerNorm of its own",
            "projection": "Several query heads share one key",
        },
        "rw": {
            "norms": "after attention, and each has a LayerNorm of its own",
            "projection": "has its own key and value",
        },
    }
    for stage, words in expected[layout].items():
        assert words in told[stage]
    rotary = page.locator("[data-stage=rotary] input").count() == 1
    assert ("slider" in told["rotary"], "turned by an angle" in told["rotary"]) == (rotary, rotary)
    assert told["mlp"].startswith("After" if layout == "rw" else "Beside")


def test_another_head_and_layer_are_drawn(browser, file, falcon):
    page = opened(browser, file)
    page.get_by_role("combobox", name="Layer").select_option("0")
    page.get_by_role("combobox", name="Head").select_option("3")
    expect(page.locator("[data-stage=tokens] .fk-sentence")).to_contain_text("Head 3 of layer 0")
    expect(page.locator("[data-stage=projection] [aria-pressed=true]")).to_have_text("Q3")
    inspected = inspect_model(falcon)
    ids = inspected.encode(TEXT)
    rows = attention_rows(record(inspected, ids, 0).layer.heads, None, 0, len(ids))[3, -1]
    np.testing.assert_allclose(numbers(page, "attention", 4), rows, rtol=1e-5)
    page.context.close()


def test_a_page_stays_at_the_last_token_whatever_key_or_button_is_pressed(browser, file):
    page, errors = opened(browser, file), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    sentence = page.locator("[data-stage=tokens] .fk-sentence")
    page.locator(".fk-tokens [aria-pressed=true]").press("ArrowLeft")
    expect(sentence).to_contain_text("(5), attends most")
    steps = page.locator(".fk-steps button")
    expect(steps).to_have_count(6)
    for at in range(6):
        steps.nth(at).evaluate("button => button.click()")  # also one that is disabled
    assert [steps.nth(at).is_disabled() for at in range(6)] == [False, True, True, True, True, True]
    page.get_by_role("combobox", name="Layer").select_option("1")
    expect(sentence).to_contain_text("of layer 1")
    expect(page.locator(".fk-notice")).to_be_hidden()
    assert errors == []
    page.context.close()


@pytest.fixture
def unanswered(browser: Browser, falcon):
    """A view whose kernel is this test, before the first answer: `sent` are its requests."""
    data = fk.explain(falcon, TEXT).page([0, 1]).data
    source = _SOURCE.replace("NO_ANSWER = 5000", "NO_ANSWER = 100").replace("HELLO_AGAIN = 2000", "HELLO_AGAIN = 40")
    page = browser.new_page()
    page.set_content("<body></body>")
    page.evaluate(
        f"""(data) => {{ {source}
        window.sent = [];
        window.start = data.start;
        window.hello = () => answer({{ type: "start", key: "hello", ...start }});
        window.part = (key) => answer({{ type: "part", key, part: key === "route" ? data.route : data.parts[key] }});
        const model = {{ on: (_, run) => (window.answer = run), off() {{}}, send: (message) => sent.push(message) }};
        render({{ model, el: document.body }}); }}""",
        data,
    )
    yield page
    page.close()


@pytest.fixture
def live(unanswered: Page):
    """The same after the first drawing."""
    unanswered.evaluate("hello(); ['layer 0 5', 'head 0 5 0 '].forEach(part)")
    unanswered.wait_for_selector("[data-drawn]")
    return unanswered


def test_a_view_that_is_not_greeted_back_says_so(unanswered: Page):
    expect(unanswered.locator(".fk-notice")).to_contain_text("No answer from the kernel")


def test_a_greeting_that_was_lost_is_repeated_until_the_kernel_answers(unanswered: Page):
    unanswered.wait_for_function("sent.filter(message => message.do === 'hello').length > 5")
    unanswered.evaluate("hello(); ['layer 0 5', 'head 0 5 0 '].forEach(part)")
    expect(unanswered.locator("[data-stage=tokens] .fk-sentence")).to_contain_text("Head 0 of layer 0")
    expect(unanswered.locator(".fk-notice")).to_be_hidden()
    unanswered.evaluate("sent.length = 0")
    unanswered.wait_for_timeout(200)
    assert unanswered.evaluate("sent") == []


def test_an_error_is_not_asked_for_again(unanswered: Page):
    unanswered.evaluate("answer({ type: 'error', key: 'hello', text: 'out of memory' }); sent.length = 0")
    unanswered.wait_for_timeout(200)
    assert unanswered.evaluate("sent") == []
    expect(unanswered.locator(".fk-notice")).to_have_text("out of memory")


def test_an_answer_to_a_repeated_greeting_leaves_what_was_chosen(live: Page):
    live.get_by_role("combobox", name="Layer").select_option("1")
    live.evaluate("['layer 1 5', 'head 1 5 0 '].forEach(part); hello()")
    live.wait_for_timeout(200)
    assert live.evaluate("sent.filter(message => message.do === 'layer').length") == 2
    expect(live.locator("[data-stage=tokens] .fk-sentence")).to_contain_text("of layer 1")


def test_a_part_is_asked_for_once_however_often_it_is_wanted(live: Page):
    button = live.get_by_role("button", name="Follow it back")
    button.click()
    button.click()
    assert live.evaluate("sent.filter(message => message.do === 'route').length") == 1
    live.evaluate("part('route')")
    expect(live.locator(".fk-steps li")).to_have_count(6)
    live.wait_for_timeout(200)
    expect(live.locator(".fk-notice")).to_be_hidden()


def test_an_answer_that_comes_late_is_drawn_and_takes_the_notice_away(live: Page):
    live.get_by_role("combobox", name="Layer").select_option("1")
    expect(live.locator(".fk-notice")).to_contain_text("No answer from the kernel")
    live.evaluate("['layer 1 5', 'head 1 5 0 '].forEach(part)")
    expect(live.locator("[data-stage=tokens] .fk-sentence")).to_contain_text("of layer 1")
    expect(live.locator(".fk-notice")).to_be_hidden()


@pytest.fixture
def taken(falcon):
    """What a kernel sends: the route of a text, the text with another token, its route, and what is drawn of it."""
    view, sent = fk.explain(falcon, TEXT), []
    view.send = sent.append
    route, place = {"do": "route", "key": "route"}, {"layer": 0, "position": 6}
    parts = [{"do": "layer", "key": "layer 0 6", **place}, {"do": "head", "key": "head 0 6 0 ", "head": 0, **place}]
    for message in ({**route}, {"do": "take", "id": 5}, {**route}, *parts):
        view._on_message(None, message, None)
    return sent


def receive(page: Page, *messages):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.evaluate("(messages) => messages.forEach(answer)", messages)
    page.wait_for_timeout(200)
    assert errors == []


def test_a_route_that_comes_before_its_text_is_drawn_waits_for_it(live: Page, taken):
    _, start, route, *parts = taken
    live.get_by_role("button", name="Draw a token").click()
    live.get_by_role("button", name="Follow it back").click()
    receive(live, start, route)
    expect(live.locator(".fk-steps li")).to_have_count(0)
    receive(live, *parts)
    expect(live.locator(".fk-steps li").first).to_contain_text(re.compile(r" 6( |$)"))  # the new last token


def test_a_route_of_the_text_before_is_not_drawn_but_asked_for_again(live: Page, taken):
    before, start, route, *parts = taken
    live.get_by_role("button", name="Follow it back").click()
    receive(live, start, *parts, before)
    expect(live.locator(".fk-steps li")).to_have_count(0)
    assert live.evaluate("sent.filter(message => message.do === 'route').length") == 2
    receive(live, route)
    expect(live.locator(".fk-steps li").first).to_contain_text(re.compile(r" 6( |$)"))


def test_a_token_that_no_kernel_takes_is_reported(live: Page):
    live.get_by_role("button", name="Draw a token").click()
    expect(live.locator(".fk-notice")).to_contain_text("No answer from the kernel")


def test_a_second_click_takes_no_second_token(live: Page):
    live.get_by_role("button", name="Draw a token").dblclick()
    assert live.evaluate("sent.filter(message => message.do === 'take').length") == 1


def test_a_kernel_that_was_restarted_is_noticed_at_once(live: Page):
    errors = []
    live.on("pageerror", lambda error: errors.append(str(error)))
    live.evaluate("() => { sent.push = () => { throw new Error('Cannot send'); }; }")
    live.get_by_role("button", name="Draw a token").click()
    assert "No answer from the kernel" in live.locator(".fk-notice").inner_text()
    assert errors == []


def test_a_token_that_is_taken_in_time_is_not_reported(live: Page):
    live.get_by_role("button", name="Draw a token").click()
    live.evaluate("answer({ type: 'start', ...start }); ['layer 0 5', 'head 0 5 0 '].forEach(part)")
    live.wait_for_timeout(200)
    expect(live.locator(".fk-notice")).to_be_hidden()


def test_after_an_error_the_view_shows_what_was_chosen_before(live: Page):
    errors = []
    live.on("pageerror", lambda error: errors.append(str(error)))
    live.get_by_role("combobox", name="Head").select_option("3")
    live.evaluate("answer({ type: 'error', key: 'head 0 5 3 ', text: 'out of memory' })")
    expect(live.get_by_role("combobox", name="Head")).to_have_value("0")
    expect(live.locator(".fk-notice")).to_have_text("out of memory")
    live.get_by_role("combobox", name="Layer").select_option("1")
    live.evaluate("['layer 1 5', 'head 1 5 0 '].forEach(part)")
    expect(live.locator("[data-stage=tokens] .fk-sentence")).to_contain_text("Head 0 of layer 1")
    assert errors == []


@pytest.mark.parametrize(
    ("probability", "shown"), [(1, "100.0%"), (0.9996, ">99.9%"), (0.29, "29.0%"), (0.0004, "<0.1%"), (0, "0.0%")]
)
def test_nothing_is_certain_by_rounding(live: Page, probability, shown):
    assert live.evaluate(f"() => {{ {DOM_SCRIPT} return share({probability}); }}") == shown


def test_invisible_characters_have_the_marks_of_the_pages(live: Page):
    texts = [each for each in map(chr, range(0x10000)) if unicodedata.category(each) not in ("Cs", "Cn")]
    shown = live.evaluate(f"(texts) => {{ {DOM_SCRIPT} return texts.map(visible); }}", texts)
    assert shown == [visible(each, spaces=True) for each in texts]
    assert live.evaluate(f"() => {{ {DOM_SCRIPT} return visible('\\ud800'); }}") == "[U+D800]"


def test_what_is_focused_is_described_as_what_is_pointed_at(page):
    page.locator("[data-stage=projection] button").first.focus()
    expect(page.locator("[data-stage=projection] .fk-info")).to_contain_text("query head")


def luminance(colour: str) -> float:
    """The relative luminance (WCAG 2.2) of a computed colour."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_the_hands_of_query_and_key_stand_out_from_their_dial(browser, file, scheme):
    page = opened(browser, file, color_scheme=scheme)
    dial = page.locator(".fk-dial svg").first
    ground = luminance(dial.locator("circle").evaluate("node => getComputedStyle(node).fill"))
    for kind in ("query", "key"):
        hand = dial.locator(f".fk-hand.fk-{kind}:not(.fk-before)")
        ink = luminance(hand.evaluate("node => getComputedStyle(node).stroke"))
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 3, kind
    page.context.close()


def test_the_arrow_keys_walk_through_the_groups_of_the_projection(page):
    page.locator(".fk-memory").press("ArrowRight")
    expect(page.locator("[data-stage=projection] .fk-info")).to_contain_text("group 0: rows 0 to")


def test_the_arrow_keys_walk_through_components(page):
    strip = page.locator("[data-stage=embedding] .fk-strip")
    strip.press("ArrowRight")
    strip.press("ArrowRight")
    expect(page.locator("[data-stage=embedding] .fk-info")).to_contain_text("component 1:")


def test_hostile_text_is_shown_as_text(browser, falcon, tmp_path):
    text = '</script><img src=x onerror="window.broken=1">$\\frac{$'
    page = opened(browser, fk.explain(falcon, text).to_html(tmp_path / "page.html"))
    assert page.evaluate("window.broken") is None
    assert page.locator(".fk-explanation img").count() == 0
    shown = page.locator(".fk-tokens bdi").all_inner_texts()
    assert "".join(shown).replace("·", " ") == text
    page.context.close()


# The keyboard


@pytest.fixture
def kernel(browser: Browser, falcon):
    """A view whose kernel is this process."""
    view, answers = fk.explain(falcon, TEXT), []
    view.send = answers.append

    def ask(message):
        answers.clear()
        view._on_message(None, message, None)
        return answers

    page = browser.new_page()
    page.set_content("<body></body>")
    page.expose_function("ask", ask)
    page.evaluate(
        f"""() => {{ {_SOURCE}
        let receive = null;
        const send = async (message) => (await ask(message)).forEach(receive);
        render({{ model: {{ on: (_, run) => (receive = run), off() {{}}, send }}, el: document.body }}); }}"""
    )
    page.wait_for_selector("[data-drawn='1']")
    yield page
    page.close()


@pytest.mark.parametrize(
    ("control", "key", "focused"),
    [
        ("[data-stage=tokens] [data-at='5']", "ArrowLeft", "[data-stage=tokens] [data-at='4']"),
        ("[aria-label='query head 1']", "Enter", "[aria-label='query head 1'][aria-pressed=true]"),
        ("[data-stage=attention] tr:nth-child(2) button", "Enter", "tr:nth-child(2) button[aria-pressed=true]"),
        ("[data-stage=prediction] tr:nth-child(2) button", "Enter", "[data-stage=prediction] tr:nth-child(2) button"),
        ("[data-stage=prediction] .fk-go", "Enter", "[data-stage=prediction] .fk-go"),
    ],
    ids=["token", "query head", "key", "take", "draw"],
)
def test_a_control_that_changes_the_view_keeps_the_focus(kernel: Page, control, key, focused):
    kernel.locator(control).press(key)
    kernel.wait_for_selector("[data-drawn='2']")
    expect(kernel.locator(focused)).to_be_focused()


def test_a_box_of_the_diagram_keeps_the_focus_when_a_token_joins_the_text(kernel: Page):
    box = kernel.get_by_role("button", name="MLP")
    box.focus()
    kernel.get_by_role("button", name="Draw a token").dispatch_event("click")
    kernel.wait_for_selector("[data-drawn='2']")
    expect(box).to_be_focused()


def test_a_route_stays_and_has_the_focus_when_one_of_its_steps_is_chosen(kernel: Page):
    kernel.get_by_role("button", name="Follow it back").press("Enter")
    expect(kernel.get_by_role("group", name="The route as a picture")).to_be_focused()
    steps = kernel.locator(".fk-steps button")
    steps.nth(2).press("Enter")
    kernel.wait_for_selector("[data-drawn='2']")
    expect(steps).to_have_count(6)
    expect(steps.nth(2)).to_be_focused()


def test_a_new_text_takes_the_route_of_the_text_before_away(kernel: Page):
    kernel.get_by_role("button", name="Follow it back").click()
    expect(kernel.locator(".fk-steps button")).to_have_count(6)
    kernel.get_by_role("button", name="Draw a token").click()
    kernel.get_by_role("button", name="Follow it back").click()
    first = kernel.locator(".fk-steps li").first
    expect(first).to_contain_text(re.compile(r" 6( |$)"))  # the new last token


def test_the_tour_has_the_focus_until_escape_gives_it_back(page):
    start = page.get_by_role("button", name="Start the tour")
    start.press("Enter")
    [back, next] = [page.get_by_role("button", name=name, exact=True) for name in ("Back", "Next")]
    expect(next).to_be_focused()
    next.press("Enter")
    back.press("Enter")  # it is disabled at the first card
    expect(next).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".fk-tour")).to_be_hidden()
    expect(start).to_be_focused()


def test_the_tab_key_goes_through_the_diagram_as_the_data_flows(layout_page):
    boxes = [each.get_attribute("data-to") for each in layout_page[1].locator("[data-to]").all()]
    assert boxes[:3] == ["tokens", "embedding", "norms"]
    assert boxes[-3:] == ["residual", "prediction", "cache"]


def test_tokens_that_are_scrolled_stay_so_when_one_is_chosen(kernel: Page):
    row = kernel.locator(".fk-tokens")
    row.evaluate("row => { row.style = 'height: 40px; width: 120px; overflow: auto'; row.scrollTop = 20; }")
    row.locator("[data-at='3']").dispatch_event("click")
    kernel.wait_for_selector("[data-drawn='2']")
    assert row.evaluate("row => row.scrollTop") == 20


def test_what_did_not_change_is_not_read_out_again(kernel: Page):
    kernel.evaluate(
        """() => {
            window.read = [];
            const note = (changes) => read.push(...changes.map((each) => each.target.closest("section").dataset.stage));
            const lines = [...document.querySelectorAll(".fk-info")];
            lines.forEach((line) => new MutationObserver(note).observe(line, { childList: true }));
        }"""
    )
    kernel.get_by_role("combobox", name="Head").select_option("3")
    kernel.wait_for_selector("[data-drawn='2']")
    assert kernel.evaluate("read") == []


# In JupyterLab


def test_a_taken_token_joins_the_text_and_the_cache_grows(notebook: Notebook):
    view = notebook.start(f"view = fk.explain(falcon, {TEXT!r}); view").locator(".fk-explanation")
    expect(view.locator(".fk-tokens button")).to_have_count(6)
    before = view.locator("[data-stage=cache] td[data-value]").first.get_attribute("data-value")
    first = view.locator("[data-stage=prediction] tbody th").first.inner_text()
    view.get_by_role("button", name="Take the token").first.click()
    expect(view.locator(".fk-tokens button")).to_have_count(7)
    assert notebook.python("print(len(view.ids))") == "7"
    assert view.locator(".fk-tokens bdi").last.inner_text() == first
    after = view.locator("[data-stage=cache] td[data-value]").first.get_attribute("data-value")
    assert float(after) / float(before) == pytest.approx(7 / 6)


def test_a_kernel_that_does_not_answer_is_named(notebook: Notebook):
    view = notebook.start(f"view = fk.explain(falcon, {TEXT!r}); view").locator(".fk-explanation")
    expect(view.locator(".fk-tokens button")).to_have_count(6)
    notebook.python("view._msg_callbacks.callbacks.clear()")
    view.get_by_role("combobox", name="Layer").select_option("2")
    expect(view.locator(".fk-notice")).to_contain_text("If it was restarted, run the cell again")


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_violation_in_a_widget_with_a_route_and_a_notice(notebook: Notebook, dark):
    notebook.change_theme(dark)
    view = notebook.start(f"view = fk.explain(falcon, {TEXT!r}); view").locator(".fk-explanation")
    view.get_by_role("button", name="Follow it back").click()
    expect(view.locator(".fk-steps li")).to_have_count(6)
    view.get_by_role("button", name="Start the tour").click()
    notebook.python("view.send({'type': 'error', 'key': '', 'text': 'out of memory'})")
    expect(view.locator(".fk-notice")).to_have_text("out of memory")
    assert view.evaluate("view => getComputedStyle(view).colorScheme") == ("dark" if dark else "light")
    assert violations(notebook.page, ".fk-explanation") == []


def test_a_token_that_is_chosen_shows_its_own_row(notebook: Notebook):
    view = notebook.start(f"fk.explain(falcon, {TEXT!r})").locator(".fk-explanation")
    view.locator(".fk-tokens button").nth(3).click()
    expect(view.locator("[data-stage=tokens] .fk-sentence")).to_contain_text("(3)")
    expect(view.locator("[data-stage=attention] tbody tr")).to_have_count(4)
    view.locator("[data-stage=attention] tbody button").nth(1).click()
    expect(view.locator("[data-stage=rotary] .fk-legend")).to_contain_text("key at position 1")
    view.get_by_role("button", name="Follow it back").click()
    expect(view.locator(".fk-steps li")).to_have_count(6)


@pytest.mark.parametrize(("light", "found"), [("true", "light"), ("false", "dark")])
def test_a_page_in_a_notebook_follows_the_theme_of_the_notebook(light, found, browser: Browser, falcon):
    """As nbconvert writes it: the theme is an attribute around the output, whatever the system prefers."""
    view = fk.explain(falcon, TEXT)._repr_html_()
    page = browser.new_page(color_scheme="light" if found == "dark" else "dark")
    page.set_content(f'<body data-jp-theme-light="{light}">{view}</body>')
    assert page.locator(".fk-explanation").evaluate("view => getComputedStyle(view).colorScheme") == found
    page.close()
